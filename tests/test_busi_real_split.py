"""Split, audit and chat rows of real breast-ultrasound images."""

import json

import numpy as np
import pandas as pd
import pytest
from busi_fixtures import CLASSES, published
from PIL import Image
from vase_fixtures import run

from scripts.busi import audit_split, build_conversations, find_duplicates, list_images, split

pytestmark = [pytest.mark.slow, pytest.mark.realdata]

SIDES = ("train", "validation", "test")
SHARES = {"train": 0.7, "validation": 0.1, "test": 0.2}


@pytest.fixture(scope="module")
def images(realdata):
    return realdata / "busi"


@pytest.fixture(scope="module")
def work(images, tmp_path_factory):
    """Folders list, find and split of the three steps that come first."""
    work = tmp_path_factory.mktemp("busi")

    def out(name):
        return "--output-folder", work / name, "--meta", work / name / "meta.json"

    run(list_images.main, "--images", images, *out("list"))
    given = ("--images", images, "--manifest", work / "list/manifest.parquet", "--classes", *CLASSES)
    run(find_duplicates.main, *given, *out("find"))
    run(split.main, "--groups", work / "find/groups.parquet", "--classes", *CLASSES, *out("split"))
    return work


def audit(tmp_path, images, *given):
    run(audit_split.main, "--images", images, *given, "--output", tmp_path / "leakage_report.json")
    return json.loads((tmp_path / "leakage_report.json").read_text())


def random_split(folder, work, seed):
    """Images dealt one by one, four in five to train, in the letter case of the published files."""
    frame = pd.read_parquet(work / "list/manifest.parquet")
    rows = [
        (path.partition("/")[0].title() + path[path.index("/") :], k)
        for path, k in zip(frame["path"], frame["label"], strict=True)
    ]
    rows = [rows[i] for i in np.random.default_rng(seed).permutation(len(rows))]
    n = len(rows) // 5
    return "--train", published(folder / "train.json", rows[n:]), "--test", published(folder / "test.json", rows[:n])


def test_sides_are_whole_groups_in_proportion(images, work):
    frame = pd.read_csv(work / "split/splits.csv")
    left = pd.read_csv(work / "split/left_out.tsv", sep="\t")
    summary = json.loads((work / "split/summary.json").read_text())
    files = {str(p.relative_to(images)) for p in images.rglob("*.png")}
    assert set(frame["path"]) | set(left["path"]) == files and len(frame) + len(left) == len(files)
    assert summary["in"] == len(files) == sum(summary[part] for part in (*SIDES, "dropped", "quarantined"))
    assert frame.groupby("group")["side"].nunique().eq(1).all()
    assert not frame["conflict"].any()
    whole = frame["label"].value_counts(normalize=True)
    for side, share in SHARES.items():
        own = frame[frame["side"] == side]
        assert abs(len(own) / len(frame) - share) <= 0.02
        assert (own["label"].value_counts(normalize=True).reindex(whole.index) - whole).abs().max() <= 0.02


def test_our_split_audits_to_zero(images, work, tmp_path):
    given = ("--manifest", work / "list/manifest.parquet", "--splits", work / "split/splits.csv")
    report = audit(tmp_path, images, *given, "--require-clean", 0.98)
    for text in ("0.98", "0.99"):
        found = report["thresholds"][text]
        assert found["test_with_twin_in_train"] == found["pairs"] == found["validation_with_twin_in_train"] == 0
    assert report["missing"] == report["label_not_folder"] == []
    assert report["unlisted"] == sorted(pd.read_csv(work / "split/left_out.tsv", sep="\t")["path"])


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_split_image_by_image_leaks(images, work, tmp_path, seed):
    """Counts against correlations by numpy of thumbnails by Pillow."""
    given = random_split(tmp_path, work, seed)
    report = audit(tmp_path, images, *given)
    thumbs, paths = [], sorted(str(p.relative_to(images)) for p in images.rglob("*.png"))
    for path in paths:
        grey = Image.open(images / path).convert("RGB").convert("L").resize((64, 64), Image.Resampling.BOX)
        thumbs.append(np.asarray(grey, float).ravel())
    similar = np.corrcoef(thumbs)
    test = {row["image"].casefold() for row in json.loads(given[3].read_text())}
    is_test = np.array([path.casefold() in test for path in paths])
    for text, found in report["thresholds"].items():
        near = similar[np.ix_(is_test, ~is_test)] >= float(text)
        assert found["pairs"] == near.sum() and found["test_with_twin_in_train"] == near.any(axis=1).sum()
    assert report["thresholds"]["0.98"]["test_with_twin_in_train"] > 0
    assert report["missing"] == report["unlisted"] == report["on_both_sides"] == []


def test_chat_rows_of_both_kinds_of_split(images, work, tmp_path):
    for name, given in (("ours", ("--splits", work / "split/splits.csv")), ("theirs", random_split(tmp_path, work, 0))):
        out = tmp_path / name
        common = ("--manifest", work / "list/manifest.parquet", "--groups", work / "find/groups.parquet")
        common += ("--classes", *CLASSES, "--output-folder", out, "--meta", out / "meta.json")
        run(build_conversations.main, *common, *given)
        summary = json.loads((out / "summary.json").read_text())
        assert summary["in"] == len([*images.rglob("*.png")]) == sum(summary[part] for part in (*SIDES, "not_in_split"))
        assert (summary["groups_on_both_sides_of_test"] > 0) == (name == "theirs")
        seen = [row["image"] for side in SIDES for row in json.loads((out / f"{side}.json").read_text())]
        assert len(seen) == len(set(seen)) and all((images / path).is_file() for path in seen)
