"""The pipeline on real photographs: real JPEG and PNG files, two folders of other images as labelled classes."""

import json
import os

import pandas as pd
import pytest
import workflow
import yaml
from vase_fixtures import clip_folder

pytestmark = [pytest.mark.slow, pytest.mark.realdata]

SETTINGS = {
    "device": "cpu",
    "resources": {name: {"threads": 1, "mem_mb": 1000} for name in ("light", "cpu", "gpu_single")},
    "vase": {
        "images_per_shard": 120,
        "list": {"view_pattern": None},
        "split": {"train": 0.6, "validation": 0.2, "test": 0.2},
        "classifier": {
            "arch": "resnet18", "weights": None, "image_size": 32, "epochs": 2, "batch_size": 32, "workers": 0,
        },
        "classify": {"workers": 0},
        "clip": {"model": "data/clip", "workers": 0},
    },
}  # fmt: skip


def test_real_images_become_best_views(tmp_path, realdata):
    checkout, run = workflow.copy_checkout(tmp_path / "checkout"), tmp_path / "run"
    (run / "data/vase/images").mkdir(parents=True)
    (run / "data/vase/labelled").mkdir()
    for name in ("imagenet-sample", "vase-photos"):
        os.symlink(realdata / name, run / "data/vase/images" / name)
    for label, name in enumerate(("benign", "malignant")):
        os.symlink(realdata / "busi" / name, run / "data/vase/labelled" / str(label))
    clip_folder(run / "data/clip")
    (run / "config").mkdir()
    (run / "config/config.yaml").write_text(yaml.safe_dump(SETTINGS))
    workflow.run(checkout, run, "vase_images")
    assert workflow.planned(checkout, run, "vase_images") == {}

    results = run / "results/vase"
    sources = [p for n in ("imagenet-sample", "vase-photos") for p in (realdata / n).rglob("*") if p.is_file()]
    images = [p for p in sources if p.suffix.lower() in (".jpg", ".jpeg", ".png")]
    listed = json.loads((results / "list_images/summary.json").read_text())
    assert listed["in"] == len(images) and listed["not_images_by_name"] == len(sources) - len(images)
    manifest = pd.read_parquet(results / "list_images/manifest.parquet")
    assert set(manifest["path"]) == {str(p.relative_to(realdata)) for p in images}
    counts = json.loads((results / "accept_images/main/summary.json").read_text())
    assert counts["in"] == counts["accepted"] + counts["rejected"] + counts["low_quality"] + counts["quarantined"]
    labelled = pd.read_parquet(results / "split_labelled/labelled.parquet")
    assert len(labelled) == sum(1 for c in ("benign", "malignant") for _ in (realdata / "busi" / c).glob("*.png"))
    sides = labelled.groupby("sha256")["side"].nunique()
    assert (sides == 1).all()
