"""The guard of finished trainings, what it says, and the results that a user keeps all the same."""

import hashlib
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pandas as pd
import pytest
import workflow
import yaml
from vase_fixtures import draw

from scripts.common import artefacts, heartbeat, retrain
from scripts.common.heartbeat import Heartbeat

pytestmark = pytest.mark.slow
TARGET = "results/vase/link_classes/main/meta.json"
FOLDER = "results/vase/train_classifier/main"
SETTINGS = {
    "device": "cpu",
    "resources": {name: {"threads": 1, "mem_mb": 1000} for name in ("light", "cpu", "gpu_single")},
    "vase": {
        "images_per_shard": 1000,
        "split": {"train": 0.4, "validation": 0.2, "test": 0.4},
        "classifier": {
            "arch": "resnet18", "weights": None, "image_size": 32, "epochs": 1, "batch_size": 16, "workers": 0,
        },
        "classify": {"workers": 0, "batch_size": 8},
    },
}  # fmt: skip
LR = "set=vase.classifier.lr=0.5"


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory) -> tuple[Path, Path]:
    """A checkout, and a run folder in which a classifier is trained and used."""
    base = tmp_path_factory.mktemp("retrain")
    checkout, run = workflow.copy_checkout(base / "checkout"), base / "run one"
    drawn = draw(base / "drawn", vases=4)
    (run / "data/vase").mkdir(parents=True)
    for name in ("images", "labelled"):
        shutil.move(drawn / name, run / "data/vase" / name)
    (run / "config").mkdir()
    (run / "config/config.yaml").write_text(yaml.safe_dump(SETTINGS))
    workflow.run(checkout, run, TARGET)
    return checkout, run


@pytest.fixture
def copied(finished_run, tmp_path) -> tuple[Path, Path]:
    """A copy of both, to be changed."""
    return workflow.copies(finished_run, tmp_path)


def dry_run(place: tuple[Path, Path], *arguments: str) -> tuple[str, set[str]]:
    """What a dry run prints last, from the table on, and the rules that it plans."""
    done = workflow.run(*place, "--dry-run", TARGET, *arguments)
    rules = set(workflow.count_jobs(done.stdout))
    return done.stdout.partition("Finished trainings that would run again:")[2], rules


def accept(place: tuple[Path, Path], *arguments: str, rule: str = "vase_train_classifier"):
    """What `make accept` runs, in that folder."""
    command = [*workflow.command(*place, TARGET, *arguments), "--dry-run", "--quiet"]
    environment = {**os.environ, "KILN_ACCEPT": rule}
    return subprocess.run(command, capture_output=True, text=True, cwd=place[1], env=environment, timeout=300)


def bytes_of(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*")) if path.is_file() and not path.is_symlink()
    }  # fmt: skip


def rewrite(path: Path, change) -> None:
    """Other content for a table of the results, as if another version of its rule had made it."""
    change(pd.read_parquet(path)).to_parquet(path)
    meta = path.with_name("meta.json")
    record = artefacts.read_json(meta)
    record["outputs"] |= artefacts.describe_files([path])
    artefacts.write_json(meta, record)


def test_nothing_changed_says_nothing(finished_run):
    assert dry_run(finished_run) == ("", set())


def test_the_table_is_last_and_names_setting_and_cost(finished_run):
    table, rules = dry_run(finished_run, "--config", LR)
    assert {"vase_train_classifier", "vase_classify_images", "vase_link_classes"} == rules
    meta = json.loads((finished_run[1] / FOLDER / "meta.json").read_text())
    row = next(line for line in table.splitlines() if line.startswith("vase_train_classifier"))
    assert row.endswith(f"setting lr: {meta['settings']['lr']} -> 0.5")
    assert re.split(r"\s{2,}", row)[1] == f"{meta['wall_seconds'] / 3600:.3f}"
    assert "This was a dry-run" not in table and "Job stats" not in table
    assert "make accept RULE=vase_train_classifier" in table


def test_the_module_that_changed_is_named(copied):
    workflow.edit(
        copied[0] / "scripts/vase/classifier_training.py", "zero_grad(set_to_none=True)", "zero_grad(set_to_none=False)"
    )
    assert "code: scripts.vase.classifier_training changed\n" in dry_run(copied)[0]
    shutil.rmtree(copied[1] / "results/code")
    assert "code changed (what it was is not noted in results/code)" in dry_run(copied)[0]


def test_an_input_that_will_be_remade_names_its_rule_and_why(finished_run):
    table, _ = dry_run(finished_run, "--config", "set=vase.split.seed=5")
    assert (
        "input results/vase/split_labelled/labelled.parquet will be remade by vase_split_labelled (setting seed: "
        in table
    )


def test_inputs_that_changed_or_are_newer_and_outputs_that_are_gone(copied):
    table = copied[1] / "results/vase/split_labelled/labelled.parquet"
    rewrite(table, lambda frame: frame.iloc[::-1])
    assert f"input {table.relative_to(copied[1])} changed\n" in dry_run(copied)[0]
    (copied[1] / FOLDER / "metrics.json").unlink()
    assert "missing: results/vase/train_classifier/main/metrics.json" in dry_run(copied, f"{FOLDER}/metrics.json")[0]


def test_a_dear_training_stops_the_run_until_it_is_allowed(copied):
    before = bytes_of(copied[1] / "results")
    dear = ("--config", LR, "confirm_gpu_hours=0")
    done = workflow.run(*copied, TARGET, *dear, check=False)
    text = done.stdout + done.stderr
    assert done.returncode and not workflow.finished(text), text
    assert "more than 0 GPU hours" in text and "setting lr: " in text and "Hint: " in text
    assert "allow_retrain=vase_train_classifier" in text and "make accept RULE=vase_train_classifier ARGS=" in text
    assert "Traceback (most" not in text and 'File "' not in text
    assert bytes_of(copied[1] / "results") == before
    assert "confirm_gpu_hours" in dry_run(copied, *dear)[0]
    unknown = workflow.run(*copied, TARGET, *dear, "allow_retrain=vase_split", check=False)
    assert unknown.returncode and "vase_split is no training" in unknown.stdout + unknown.stderr
    allowed = workflow.run(*copied, f"{FOLDER}/meta.json", *dear, "allow_retrain=vase_train_classifier")
    assert workflow.finished(allowed.stdout + allowed.stderr) == {"vase_train_classifier": 1}


def test_a_training_without_record_is_none_that_is_finished(copied):
    (copied[1] / FOLDER / "meta.json").unlink()
    table, rules = dry_run(copied, "--config", LR)
    assert table == "" and "vase_train_classifier" in rules


def test_an_accepted_result_stays_and_a_later_change_shows(copied):
    weights = bytes_of(copied[1] / FOLDER) | {"meta.json": ""}
    done = accept(copied, "--config", LR)
    assert done.returncode == 0 and "setting lr: " in done.stdout, done.stdout + done.stderr
    assert not workflow.finished(done.stdout + done.stderr)
    assert bytes_of(copied[1] / FOLDER) | {"meta.json": ""} == weights
    meta = json.loads((copied[1] / FOLDER / "meta.json").read_text())
    (decision,) = meta["accepted"]
    assert meta["settings"]["lr"] != decision["settings"]["lr"] == 0.5
    assert decision["reasons"][0].startswith("setting lr: ") and decision["when"] and decision["code"] == meta["code"]
    assert decision["inputs"] == {one["path"]: one["sha256"] for one in meta["inputs"].values()}
    assert dry_run(copied, "--config", LR) == ("", set())
    assert "setting lr: 0.5 -> 0.25" in dry_run(copied, "--config", "set=vase.classifier.lr=0.25")[0]
    again = accept(copied, "--config", LR)
    assert again.returncode == 0 and "nothing to accept" in again.stdout


def test_inputs_that_differ_are_accepted_and_nothing_after_runs(copied):
    workflow.edit(
        copied[0] / "scripts/vase/classifier_training.py", "zero_grad(set_to_none=True)", "zero_grad(set_to_none=False)"
    )
    rewrite(copied[1] / "results/vase/split_labelled/labelled.parquet", lambda frame: frame.iloc[::-1])
    assert dry_run(copied)[1] == {"vase_train_classifier", "vase_classify_images", "vase_link_classes"}
    done = accept(copied)
    assert done.returncode == 0, done.stdout + done.stderr
    assert dry_run(copied) == ("", set())
    known = artefacts.recorded_hash(copied[1] / FOLDER / "classifier.safetensors")
    assert known == artefacts.sha256_file(copied[1] / FOLDER / "classifier.safetensors")
    rewrite(copied[1] / "results/vase/split_labelled/labelled.parquet", lambda frame: frame.iloc[::-1])
    assert "labelled.parquet changed" in dry_run(copied)[0]


def test_what_is_after_an_accepted_result_keeps_its_own_reasons(copied):
    rewrite(copied[1] / "results/vase/split_labelled/labelled.parquet", lambda frame: frame.iloc[::-1])
    rewrite(copied[1] / "results/vase/list_images/manifest.parquet", lambda frame: frame.iloc[::-1])
    assert accept(copied).returncode == 0
    assert dry_run(copied) == ("", {"vase_link_classes"})


def test_nothing_is_accepted_before_its_inputs_are_made(copied):
    other = ("--config", "set=vase.split.seed=5")
    done = accept(copied, *other)
    text = done.stdout + done.stderr
    assert done.returncode and "still to run before it: vase_split_labelled;" in text
    hint = re.search(r"run them first, then accept: (.*)", text)[1]
    assert hint.startswith("snakemake results/vase/split_labelled/labelled.parquet ") and other[1] in hint
    workflow.run(*copied, "results/vase/split_labelled/labelled.parquet", *other)
    assert accept(copied, *other).returncode == 0
    assert dry_run(copied, *other) == ("", set())


@pytest.mark.parametrize(
    "rule, word",
    [("vase_train_classifer", "did you mean vase_train_classifier"), ("rae_train_autoencoder", "add a target")],
)
def test_only_what_is_planned_can_be_accepted(finished_run, rule, word):
    done = accept(finished_run, "--config", LR, rule=rule)
    assert done.returncode and word in done.stdout + done.stderr


def test_a_result_that_was_edited_or_is_gone_is_not_accepted(copied):
    metrics = copied[1] / FOLDER / "metrics.json"
    times = metrics.stat()
    metrics.write_text(metrics.read_text() + "\n")
    os.utime(metrics, ns=(times.st_atime_ns, times.st_mtime_ns))
    done = accept(copied, "--config", LR)
    assert done.returncode and "not what its record" in done.stdout + done.stderr
    metrics.unlink()
    done = accept(copied, "--config", LR)
    assert done.returncode and "no finished result to keep; missing: " in done.stdout + done.stderr


def test_accepting_runs_no_job_even_if_asked_to(copied):
    command = workflow.command(*copied, TARGET, "--config", LR)
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "KILN_ACCEPT": "vase_train_classifier"}
    )
    assert done.returncode and "accepted in a dry run alone" in done.stdout + done.stderr
    assert not workflow.finished(done.stdout + done.stderr)


@pytest.mark.parametrize("gone", ["deleted", "moved"])
def test_raw_data_that_is_gone_takes_no_result_along(copied, gone):
    before = bytes_of(copied[1] / "results")
    if gone == "deleted":
        shutil.rmtree(copied[1] / "data/vase")
    else:
        (copied[1] / "data/vase").rename(copied[1] / "data/elsewhere")
    for mode in (["--dry-run"], []):
        done = workflow.run(*copied, TARGET, *mode, check=False)
        text = done.stdout + done.stderr
        assert done.returncode and "data/vase/" in text and "Hint: " in text and not workflow.finished(text)
    assert bytes_of(copied[1] / "results") == before


def test_all_trainings_are_guarded(root):
    """Those that keep a resumable state, but for evaluations and the drawing of tables."""
    text = "".join(path.read_text() for path in (root / "rules").glob("*.smk"))
    rules = re.split(r"^rule ", text, flags=re.M)[1:]
    launched = {rule.partition(":")[0] for rule in rules if "--tracker-folder" in rule}
    guarded = re.search(r"TRAININGS = \(([^)]*)\)", text)[1]
    assert launched == set(re.findall(r'"(\w+)"', guarded))


def test_the_cost_is_that_of_all_attempts_and_processes(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(heartbeat.time, "monotonic", lambda: now[0])
    for _ in range(2):  # two attempts that were killed
        attempt = Heartbeat(tmp_path, 0, None)
        now[0] += 1800
        attempt.beat(7)
    record = artefacts.Record("step", {}, {}, "code")
    record.carries_on(tmp_path)
    now[0] += 3600
    monkeypatch.setenv("WORLD_SIZE", "4")
    record.write(tmp_path / "meta.json", [])
    meta = json.loads((tmp_path / "meta.json").read_text())
    assert meta["wall_seconds"] == 7200 and meta["processes"] == 4
    assert retrain.cost({**meta, "hardware": {"gpus": ["H200"] * 2}}) == (8.0, 2.0)  # two nodes
    assert retrain.cost({**meta, "hardware": {}}) == (2.0, 2.0)
    assert retrain.cost({"wall_seconds": 3600, "hardware": {"gpus": ["H200"] * 2}}) == (2.0, 1.0)  # of an older Kiln
    assert retrain.cost({}) == (None, None)


def test_a_cut_off_heartbeat_counts_as_none(tmp_path):
    (tmp_path / heartbeat.NAME).write_text('{"seconds": 1')
    assert heartbeat.seconds_so_far(tmp_path) == 0
