"""The pipeline through Snakemake: from slides to scores, card and predictions, and what a change reruns."""

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
import workflow
import yaml
from rerun_cases import COCA, COCA_AFTER_TRAINING, COCA_TRAINING, named

from scripts.demo import draw_slides
from scripts.demo.slides import DIAGNOSES

pytestmark = pytest.mark.slow(minutes=4)
DIM, NEW = 24, 3
DRAWN = {"slides": 40, "patients": 24, "dim": DIM, "min_tiles": 8, "max_tiles": 30}
SETTINGS = {
    "device": "cpu",
    "resources": {name: {"threads": 1, "mem_mb": 1000} for name in ("light", "cpu", "gpu_single")},
    "coca": {
        "slides": "data/slides",
        "labels": "data/labels.json",
        "list": {"tile_dim": DIM, "patients": "data/patients.csv", "processes": 1},
        "split": {"validation": 0.15, "test": 0.3},
        "tokenizer": {"vocabulary": 300},
        "encoder": {"latents": 3, "dim": 8, "depth": 2, "transformer_depth": 1, "heads": 2},
        "model": {"dim": 16, "unimodal_depth": 1, "multimodal_depth": 1, "dim_latents": 8, "image_queries": 2,
                  "dim_head": 8, "heads": 2, "ff_mult": 1},
        "train": {"epochs": 2, "batch_size": 6, "lr": 1e-3, "precision": "fp32", "save_every": 1, "workers": 0},
        "encode": {"workers": 0},
        "caption": {"max_length": 8},
        "evaluate": {"classes": DIAGNOSES},
        "predict": {"slides": "new", "texts": ["it's a lymphoma", "腺癌"]},
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory) -> tuple[Path, Path]:
    """A checkout and a run folder in which coca is built."""
    base = tmp_path_factory.mktemp("coca")
    checkout, run = workflow.copy_checkout(base / "checkout"), base / "run one"
    run.mkdir()
    options = ["--output-folder", str(run / "data"), "--meta", str(base / "drawn.json"), "--threads", "1"]
    draw_slides.main([*options, "--settings", json.dumps(DRAWN)])
    for path in sorted((run / "data/slides").glob("*.h5"))[:NEW]:
        (run / "new/deep").mkdir(parents=True, exist_ok=True)
        shutil.copy(path, run / "new/deep")
    (run / "config").mkdir()
    (run / "config/config.yaml").write_text(yaml.safe_dump(SETTINGS))
    workflow.run(checkout, run, "coca")
    return checkout, run


@pytest.fixture
def copied(finished_run, tmp_path) -> tuple[Path, Path]:
    """A copy of both, to be changed."""
    return workflow.copies(finished_run, tmp_path)


def predictions(run: Path) -> list[dict]:
    made = run / "results/coca/predict/main/predictions.jsonl"
    return [json.loads(line) for line in made.read_text().splitlines()]


def of_run(run: Path, name: str) -> dict[Path, bytes]:
    """{file: bytes} of all that a run of a variant has left."""
    folders = (run / "results/coca").glob(f"*/{name}")
    return {path: path.read_bytes() for folder in folders for path in folder.rglob("*") if path.is_file()}


def test_what_is_made(finished_run):
    _, run = finished_run
    coca = run / "results/coca"
    sides = pd.read_csv(coca / "split/splits.csv")["side"].value_counts()
    assert sides.sum() == DRAWN["slides"]
    assert sorted(p.name for p in (coca / "train/main/epochs").glob("*.safetensors")) == [
        "epoch-0001.safetensors", "epoch-0002.safetensors",
    ]  # fmt: skip
    assert not list((run / "results/state/coca").rglob("*.safetensors"))
    captions = pd.read_parquet(coca / "caption/main/captions.parquet")
    assert captions["side"].value_counts().to_dict() == sides.drop("train").to_dict()
    metrics = json.loads((coca / "evaluate/main/metrics.json").read_text())
    kinds = {"retrieval_r5": "chance", "caption_diagnosis_accuracy": "most_frequent"}
    assert {name: one["baseline_kind"] for name, one in metrics["summary"].items()} == kinds
    for one in metrics["summary"].values():
        assert one["n"] == sides["test"] and one["higher_is_better"]
        assert 0 <= one["ci95"][0] <= one["value"] <= one["ci95"][1] <= 1
        assert 0 < one["baseline"] < 1 and 0 <= one["trivial"] <= 1
    card = (coca / "describe_model/main/model/README.md").read_text(encoding="utf-8")
    assert "## " in card and f"{sides['test']} slides of" in card
    assert len(list(coca.rglob("*.png"))) == 5


def test_new_slides_are_captioned_and_compared(finished_run):
    _, run = finished_run
    made = predictions(run)
    assert len(made) == NEW and all(one["path"] == f"deep/{one['slide']}.h5" for one in made)
    for one in made:
        assert list(one["scores"]) == SETTINGS["coca"]["predict"]["texts"]
        assert sum(score["softmax"] for score in one["scores"].values()) == pytest.approx(1)
    assert (run / "results/coca/predict/main/predictions.quarantine.tsv").read_text() == "path\treason\n"


def test_nothing_is_left_to_do_and_execution_settings_rerun_nothing(finished_run):
    values = ("coca.train.workers=2", "coca.train.save_minutes=1", "coca.train.tracker=none", "coca.encode.workers=2",
              "coca.encoder.chunk_tiles=64", "coca.list.processes=2", "resources.gpu_single.threads=2")  # fmt: skip
    assert workflow.planned(*finished_run, "coca", "--config", f"set={' '.join(values)}") == {}


@pytest.mark.parametrize("value, jobs", COCA)
def test_a_setting_reruns_its_readers(finished_run, value, jobs):
    assert workflow.planned(*finished_run, "coca", "--config", f"set={value}") == named("coca", jobs)


def test_a_variant_is_made_beside_main_which_stays(copied):
    checkout, run = copied
    low = ("coca", "--config", "set=coca.variants.low.train.lr=1e-4")
    before = of_run(run, "main")
    assert workflow.planned(checkout, run, *low) == named("coca", {**COCA_TRAINING, **COCA_AFTER_TRAINING})
    workflow.run(checkout, run, *low)
    assert of_run(run, "main") == before
    made = {str(path).replace("/low/", "/main/", 1): data for path, data in of_run(run, "low").items()}
    assert set(made) == set(map(str, before))
    model = str(run / "results/coca/train/main/model.safetensors")
    assert made[model] != before[Path(model)]
    for name in ("main", "low"):
        metrics = json.loads((run / f"results/coca/evaluate/{name}/metrics.json").read_text())
        assert set(metrics["summary"]) == {"retrieval_r5", "caption_diagnosis_accuracy"}
    assert workflow.planned(checkout, run, *low) == {} == workflow.planned(checkout, run, "coca")


def test_comments_and_messages_rerun_nothing_and_numbers_retrain(copied):
    checkout, run = copied
    workflow.edit(checkout / "scripts/coca/losses.py", "    terms = {}", "    # a remark\n    terms = {}")
    workflow.edit(checkout / "scripts/coca/train.py", "epoch %d/%d, step %d: %s", "epoch %d of %d, step %d: %s")
    assert workflow.planned(checkout, run, "coca") == {}
    workflow.edit(checkout / "scripts/coca/losses.py", 'reduction="sum")', 'reduction="sum") * 2')
    assert workflow.planned(checkout, run, "coca") == named("coca", {**COCA_TRAINING, **COCA_AFTER_TRAINING})


def test_a_new_slide_reruns_what_reads_its_folder(copied):
    checkout, run = copied
    slide = next((run / "data/slides").glob("*.h5"))
    shutil.copy(slide, run / "new/another.h5")
    assert workflow.planned(checkout, run, "coca") == named("coca", {"predict": 1})
    slide.unlink()
    planned = workflow.planned(checkout, run, "coca")
    assert planned == named(
        "coca", {"list_slides": 1, "split": 1, "train_tokenizer": 1, **COCA_TRAINING, **COCA_AFTER_TRAINING}
    )


def test_a_frozen_slide_encoder_comes_before_training_and_a_trained_one_after(finished_run, tmp_path):
    checkout, run = finished_run
    fresh = tmp_path / "fresh"
    shutil.copytree(run, fresh, ignore=shutil.ignore_patterns("results", ".snakemake"))
    (fresh / "prism.safetensors").write_bytes(b"not read by a dry run")
    frozen = ("--config", "set=coca.encoder.weights=prism.safetensors")
    latents = "results/coca/encode_slides/main/latents/index.parquet"
    model = "results/coca/train/main/model.safetensors"
    assert workflow.planned(checkout, fresh, latents, *frozen) == named("coca", {"list_slides": 1, "encode_slides": 1})
    before = named("coca", dict.fromkeys(("list_slides", "split", "train_tokenizer", "train"), 1))
    assert workflow.planned(checkout, fresh, model, *frozen) == before | {"coca_encode_slides": 1}
    assert workflow.planned(checkout, fresh, latents) == before | {"coca_encode_slides": 1}
    both = f"{frozen[1]} coca.variants.low.train.lr=1e-4"
    twice = named("coca", dict.fromkeys((*COCA_TRAINING, "caption", "evaluate", "describe_model", "predict"), 2))
    planned = workflow.planned(checkout, fresh, "coca", "--config", both)
    assert planned == before | twice | {"coca_encode_slides": 1}
    planned = workflow.planned(checkout, fresh, "coca", "--config", f"{both} coca.variants.low.encoder.depth=1")
    assert planned == before | twice | {"coca_encode_slides": 2}
    trained = f"{both} coca.variants.low.encoder.frozen=false"
    done = workflow.run(checkout, fresh, "coca", "--dry-run", "--config", trained, check=False)
    assert done.returncode and "coca.encoder.is_frozen differs between variants" in done.stdout + done.stderr


def test_predictions_by_the_model_of_another_run(finished_run, tmp_path):
    """The folder of a model card is all that it takes."""
    checkout, run = finished_run
    there = tmp_path / "elsewhere"
    shutil.copytree(run / "new", there / "new")
    shutil.copytree(run / "results/coca/describe_model/main/model", there / "model")
    predict = {**SETTINGS["coca"]["predict"], "model": "model"}
    settings = {**SETTINGS, "coca": {"predict": predict, "caption": SETTINGS["coca"]["caption"]}}
    (there / "config").mkdir()
    (there / "config/config.yaml").write_text(yaml.safe_dump(settings))
    done = workflow.run(checkout, there, "coca_predictions")
    assert workflow.finished(done.stdout + done.stderr) == {"coca_predict": 1, "coca_predictions": 1}
    assert predictions(there) == predictions(run)


def test_without_new_slides_there_is_nothing_to_predict(finished_run):
    none = ("--config", "set=coca.predict.slides=null")
    assert workflow.planned(*finished_run, "coca", *none) == {}
    done = workflow.run(*finished_run, "coca_predictions", "--dry-run", *none, check=False)
    said = done.stdout + done.stderr
    assert done.returncode and "coca.predict.slides is not set" in said and "Hint: set it to the folder" in said
