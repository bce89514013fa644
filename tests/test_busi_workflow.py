"""The pipeline through Snakemake: from class folders to the classification report, and what a change reruns."""

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
import workflow
import yaml
from rerun_cases import BUSI, BUSI_AFTER_TRAINING, BUSI_EXECUTION, BUSI_TRAINING
from vlm_fixtures import tiny_base

from scripts.common.model_folders import identity
from scripts.demo import draw_ultrasound

pytestmark = pytest.mark.slow
DRAWN = {"normal": 24, "benign": 30, "malignant": 26, "identical": 4, "near": 4, "conflicts": 1, "image_size": 64}
SETTINGS = {
    "device": "cpu",
    "resources": {name: {"threads": 1, "mem_mb": 1000} for name in ("light", "cpu", "gpu_single")},
    "busi": {
        "images": "data/images",
        "audits": {"image_wise": {"train": "data/published/train.json", "test": "data/published/test.json"}},
        "base": {"model": "data/base", "family": "qwen"},
        "split": {"train": 0.5, "validation": 0.2, "test": 0.3},
        "lora": {"rank": 4, "alpha": 8},
        "train": {"max_steps": 4, "batch_size": 4, "accumulation": 1, "lr": 2e-3, "workers": 0},
        "predict": {"workers": 0},
    },
}


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory) -> tuple[Path, Path]:
    """A checkout and a run folder in which busi is built."""
    base = tmp_path_factory.mktemp("busi")
    checkout, run = workflow.copy_checkout(base / "checkout"), base / "run one"
    run.mkdir()
    options = ["--output-folder", str(run / "data"), "--meta", str(base / "drawn.json"), "--threads", "1"]
    draw_ultrasound.main([*options, "--settings", json.dumps(DRAWN)])
    tiny_base(run / "data/base")
    (run / "config").mkdir()
    (run / "config/config.yaml").write_text(yaml.safe_dump(SETTINGS))
    workflow.run(checkout, run, "busi")
    return checkout, run


@pytest.fixture
def copied(finished_run, tmp_path) -> tuple[Path, Path]:
    """A copy of both, to be changed."""
    return workflow.copies(finished_run, tmp_path)


def test_what_is_made(finished_run):
    _, run = finished_run
    busi = run / "results/busi"
    metrics = json.loads((busi / "evaluate/main/metrics.json").read_text())
    assert set(metrics["models"]) == {"base", "lora", "majority"}
    splits = pd.read_csv(busi / "split/splits.csv")
    assert metrics["summary"]["balanced_accuracy"]["n"] == (splits["side"] == "test").sum()
    ours, published = (
        json.loads((busi / f"audit_split/{name}/leakage_report.json").read_text()) for name in ("ours", "image_wise")
    )
    assert ours["thresholds"]["0.98"]["test_with_twin_in_train"] == 0
    assert published["thresholds"]["0.98"]["test_with_twin_in_train"] > 0
    assert "not for diagnosis" in (busi / "describe_model/main/lora/README.md").read_text().lower()
    assert identity(busi / "merge/main/lora/model")


def test_the_planted_pairs_and_no_others_are_found(finished_run):
    _, run = finished_run
    planted = pd.read_parquet(run / "data/planted.parquet")
    found = pd.read_parquet(run / "results/busi/find_duplicates/pairs.parquet")
    pairs = [set(map(frozenset, zip(frame["first"], frame["second"], strict=True))) for frame in (planted, found)]
    assert pairs[0] == pairs[1]
    same = found[found["identical"]]
    wanted = planted[planted["kind"] == "identical"]
    assert set(zip(same["first"], same["second"], strict=True)) == set(
        zip(wanted["first"], wanted["second"], strict=True)
    )


def test_nothing_is_left_to_do(finished_run):
    assert workflow.planned(*finished_run, "busi") == {}


def test_execution_settings_rerun_nothing(finished_run):
    """All at once: if one did, its jobs would be there."""
    assert not any(jobs for _, jobs in BUSI_EXECUTION)
    values = " ".join(value for value, _ in BUSI_EXECUTION)
    assert workflow.planned(*finished_run, "busi", "--config", f"set={values}") == {}


@pytest.mark.parametrize("value, jobs", BUSI)
def test_a_setting_reruns_its_readers(finished_run, value, jobs):
    planned = workflow.planned(*finished_run, "busi", "--config", f"set={value}")
    assert planned == jobs


def test_messages_and_comments_of_training_rerun_nothing(copied):
    checkout, run = copied
    workflow.edit(checkout / "scripts/common/trainer_log.py", "loss %.4f%s, lr", "the loss is %.4f%s, lr")
    workflow.edit(checkout / "scripts/busi/train_lora.py", "%d of %d parameters are trained", "%d of %d are trained")
    workflow.edit(checkout / "scripts/busi/lora.py", "    pattern = ", "    # a remark\n    pattern = ")
    assert workflow.planned(checkout, run, "busi") == {}


def test_what_decides_weights_retrains(copied):
    checkout, run = copied
    workflow.edit(checkout / "scripts/busi/fine_tuning.py", "weight_decay=settings.weight_decay", "weight_decay=0.0")
    planned = workflow.planned(checkout, run, "busi")
    assert planned["busi_train_lora"] == 1
    assert "busi_split" not in planned


def test_a_published_split_is_trained_on_as_it_is(finished_run, tmp_path):
    checkout, run = finished_run
    there = shutil.copytree(run, tmp_path / "run two", symlinks=True)
    split = {"split": {"train": "data/published/train.json", "test": "data/published/test.json"}}
    settings = {**SETTINGS, "busi": {**SETTINGS["busi"], "conversations": split, "audits": {}}}
    (there / "config/config.yaml").write_text(yaml.safe_dump(settings))
    workflow.run(checkout, there, "busi")
    busi = there / "results/busi"
    metrics = json.loads((busi / "evaluate/main/metrics.json").read_text())
    report = json.loads((busi / "audit_split/published/leakage_report.json").read_text())
    leaked = report["thresholds"]["0.98"]["test_with_twin_in_train"]
    leak = metrics["leak"]
    assert 0 < leak["test_with_twin_in_train"] <= leaked
    parts = leak["models"]["lora"]
    assert parts["with_twin"]["n"] + parts["without_twin"]["n"] == len(
        json.loads((there / "data/published/test.json").read_text())
    )
    assert "near-twin" in (busi / "describe_model/main/lora/README.md").read_text()


def test_a_new_picture_is_listed_and_dealt(copied):
    checkout, run = copied
    picture = next((run / "data/images/normal").glob("normal (?).png"))
    shutil.copy(picture, picture.with_name("normal (999).png"))
    planned = workflow.planned(checkout, run, "busi")
    assert {"busi_list_images", "busi_find_duplicates", "busi_split", "busi_train_lora"} <= planned.keys()
    assert "demo_train_vlm" not in planned


def test_a_folder_that_is_no_class_stops_before_any_training(copied):
    checkout, run = copied
    (run / "data/images/benine").mkdir()
    shutil.copy(next((run / "data/images/benign").glob("*.png")), run / "data/images/benine")
    done = workflow.run(checkout, run, "busi", check=False)
    said = done.stdout + done.stderr
    assert done.returncode != 0
    assert "benine" in said and "Hint:" in said
    assert "busi_train_lora" not in workflow.finished(said)
    assert (run / "results/busi/merge/main/lora/model/model.safetensors").is_file()


def test_a_variant_stands_beside_what_is_there(copied):
    checkout, run = copied
    low = ("--config", "set=busi.variants.low.train.lr=1e-3 busi.variants.low.seeds=[42,7]")
    more = dict.fromkeys((*BUSI_TRAINING, *BUSI_AFTER_TRAINING), 2)
    assert workflow.planned(checkout, run, "busi", *low) == more
    before = {path: path.read_bytes() for path in (run / "results/busi").glob("*/main/**/*.safetensors")}
    workflow.run(checkout, run, "busi", *low)
    made = {path.name for path in (run / "results/busi/train_lora").iterdir()}
    assert made == {"main", "low", "low-7"}
    assert before and all(path.read_bytes() == content for path, content in before.items())
    weights = [run / f"results/busi/train_lora/{name}/lora/final_model/adapter_model.safetensors" for name in made]
    assert len({path.read_bytes() for path in weights}) == 3
    meta = json.loads((run / "results/busi/train_lora/low-7/lora/meta.json").read_text())
    assert (meta["settings"]["train"]["lr"], meta["settings"]["train"]["seed"]) == (1e-3, 7)
    assert workflow.planned(checkout, run, "busi") == {}
    assert (run / "results/busi/train_lora/low").is_dir()
