"""The pipeline on real breast-ultrasound images."""

import hashlib
import json

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from vase_fixtures import run

from scripts.busi import duplicates, find_duplicates, list_images

pytestmark = [pytest.mark.slow, pytest.mark.realdata]

CLASSES = ("Normal", "Benign", "Malignant")


# Listing and duplicates


@pytest.fixture(scope="module")
def listed(realdata, tmp_path_factory):
    """The folder that step list_images wrote."""
    out = tmp_path_factory.mktemp("list_images")
    run(list_images.main, "--images", realdata / "busi", "--output-folder", out, "--meta", out / "meta.json")
    return out


@pytest.fixture(scope="module")
def searched(realdata, listed, tmp_path_factory):
    """The folder that step find_duplicates wrote."""
    out = tmp_path_factory.mktemp("find_duplicates")
    run(
        find_duplicates.main, "--images", realdata / "busi", "--manifest", listed / "manifest.parquet",
        "--classes", *CLASSES, "--output-folder", out, "--meta", out / "meta.json",
    )  # fmt: skip
    return out


@pytest.fixture(scope="module")
def plainly(realdata, listed):
    """Correlations [n, n] of the images in the manifest's order, and whether their pixels are equal, by other means."""
    thumbs, pixels = [], []
    for path in pd.read_parquet(listed / "manifest.parquet")["path"]:
        with Image.open(realdata / "busi" / path) as image:
            rgb = image.convert("RGB")
        thumbs.append(np.asarray(rgb.convert("L").resize((64, 64), Image.Resampling.BOX), float).ravel())
        pixels.append(np.asarray(rgb))
    equal = [[np.array_equal(a, b) for b in pixels] for a in pixels]
    return np.corrcoef(thumbs), np.array(equal)


def test_every_real_file_is_listed_or_accounted_for(realdata, listed):
    files = {str(p.relative_to(realdata / "busi")) for p in (realdata / "busi").rglob("*") if p.is_file()}
    manifest, masks = (pd.read_parquet(listed / f"{name}.parquet") for name in ("manifest", "masks"))
    quarantine = pd.read_csv(listed / "quarantine.tsv", sep="\t")
    summary = json.loads((listed / "summary.json").read_text())
    ok = manifest[manifest["status"] == "ok"]
    assert set(ok["path"]) | set(masks["path"]) | set(quarantine["path"]) == files
    assert summary["in"] == summary["ok"] + summary["masks"] + summary["quarantined"] == len(files)
    assert (summary["ok"], summary["masks"], summary["quarantined"]) == (len(ok), len(masks), len(quarantine))
    assert not ok["path"].str.contains("_mask").any()
    by_folder = ok["path"].str.split("/").str[0].str.casefold()
    assert (by_folder == [CLASSES[label].casefold() for label in ok["label"]]).all()
    assert list(summary["by_class"].values()) == [int((ok["label"] == label).sum()) for label in range(3)]
    for row in ok.iloc[::25].itertuples():
        data = (realdata / "busi" / row.path).read_bytes()
        assert (row.sha256, row.bytes) == (hashlib.sha256(data).hexdigest(), len(data))


@pytest.mark.parametrize("threshold", [0.98, 0.9])
def test_real_pairs_are_those_of_all_plain_correlations(realdata, listed, plainly, threshold):
    correlation, equal = plainly
    paths = pd.read_parquet(listed / "manifest.parquet")["path"].tolist()
    found = duplicates.find(duplicates.read(realdata / "busi", paths, 1), threshold, block=100)
    expected = np.triu((correlation >= threshold) | equal, 1)
    assert np.abs(correlation[np.triu_indices_from(correlation, 1)] - threshold).min() > 1e-9  # none on the border
    first, second = found.pairs["first"].to_numpy(), found.pairs["second"].to_numpy()
    assert set(zip(first, second, strict=True)) == set(zip(*np.nonzero(expected), strict=True)) and len(first) > 10
    near = ~found.pairs["identical"].to_numpy()
    np.testing.assert_allclose(found.pairs["similarity"][near], correlation[first, second][near], atol=1e-12)
    assert (found.pairs["identical"] == equal[first, second]).all()
    assert (found.total, found.identical) == (expected.sum(), np.triu(equal, 1).sum())


def test_real_groups_part_the_images_and_hold_every_pair(listed, searched):
    manifest = pd.read_parquet(listed / "manifest.parquet").query("status == 'ok'")
    groups, pairs = (pd.read_parquet(searched / f"{name}.parquet") for name in ("groups", "pairs"))
    summary = json.loads((searched / "summary.json").read_text())
    assert (
        groups["path"].tolist() == manifest["path"].tolist() and groups["label"].tolist() == manifest["label"].tolist()
    )
    assert (groups["group"] == groups.groupby("group")["path"].transform("min")).all()
    group = groups.set_index("path")["group"]
    assert (group[pairs["first"]].to_numpy() == group[pairs["second"]].to_numpy()).all()
    sizes = groups.groupby("group").size()
    in_pairs = set(pairs["first"]) | set(pairs["second"])
    assert in_pairs == set(groups.loc[groups["group"].map(sizes) > 1, "path"])
    torn = groups.groupby("group")["label"].nunique() > 1
    assert (groups["conflict"] == groups["group"].map(torn)).all()
    cross = pairs["first_label"] != pairs["second_label"]
    assert set(group[pairs["first"][cross]]) == set(torn.index[torn]) and torn.any()
    assert (summary["groups"], summary["pairs"], summary["images"]) == (len(sizes), len(pairs), len(manifest))
    assert summary["conflict_groups"] == torn.sum()
    with Image.open(searched / "conflicts.png") as sheet:
        assert sheet.height > 200 * min(len(pairs), find_duplicates.SHOWN) // find_duplicates.SIDE_BY_SIDE


def test_a_real_image_saved_anew_is_found_as_equal(realdata, listed, tmp_path):
    path = pd.read_parquet(listed / "manifest.parquet")["path"].iloc[7]
    with Image.open(realdata / "busi" / path) as image:
        image.convert("RGB").save(tmp_path / "anew.bmp")
    (tmp_path / "itself.png").write_bytes((realdata / "busi" / path).read_bytes())
    found = duplicates.find(duplicates.read(tmp_path, ["anew.bmp", "itself.png"], 1), 0.98)
    assert found.identical == 1 and found.groups.tolist() == [0, 0]
