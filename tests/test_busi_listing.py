"""From class folders to the manifest: images and masks are told apart, and every file is accounted for."""

import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from vase_fixtures import ROOT, error_of, files_below, picture, run

from scripts.busi import list_images
from scripts.common.errors import KilnError


def listing(images, out, **settings):
    """Run the step: manifest and masks by path, quarantine {path: reason}, summary."""
    arguments = ("--images", images, "--output-folder", out, "--meta", out / "meta.json")
    run(list_images.main, *arguments, settings=settings)
    manifest, masks = (pd.read_parquet(out / f"{n}.parquet").set_index("path") for n in ("manifest", "masks"))
    quarantine = pd.read_csv(out / "quarantine.tsv", sep="\t").set_index("path")["reason"].to_dict()
    return manifest, masks, quarantine, json.loads((out / "summary.json").read_text())


def mask(path, size=32, seed=0):
    """A mask: a white disc on black."""
    y, x = np.mgrid[:size, :size]
    inside = (x - size / 2) ** 2 + (y - size / 2) ** 2 < (size / 4 + seed) ** 2
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.where(inside, np.uint8(255), np.uint8(0))).save(path)
    return path


@pytest.fixture
def images(tmp_path):
    """One image per class, named as in BUSI."""
    for i, name in enumerate(("normal", "Benign", "MALIGNANT")):
        picture(tmp_path / "images" / name / f"{name} (1).png", seed=i)
    return tmp_path / "images"


def refused(images, tmp_path, **settings):
    """The error of a listing that leaves nothing behind."""
    with pytest.raises(KilnError) as caught:
        listing(images, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists() or files_below(tmp_path / "out") == []
    return caught.value


def test_images_and_masks_of_all_classes(images, tmp_path):
    picture(images / "Benign/deep/er/benign (12).JPG", seed=4)
    masks = {
        "Benign/Benign (1)_mask.png": "Benign/Benign (1).png",
        "Benign/Benign (1)_mask_1.png": "Benign/Benign (1).png",
        "Benign/Benign (1)_mask_12.png": "Benign/Benign (1).png",
        "normal/NORMAL (1)_MASK.PNG": "normal/normal (1).png",
        "Benign/deep/er/benign (12)_mask.png": "Benign/deep/er/benign (12).JPG",
    }
    for path in masks:
        mask(images / path)
    (images / "Benign/notes.txt").write_text("no image, no matter")
    manifest, found, quarantine, summary = listing(images, tmp_path / "out")
    assert manifest["label"].to_dict() == {
        "Benign/Benign (1).png": 1,
        "Benign/deep/er/benign (12).JPG": 1,
        "MALIGNANT/MALIGNANT (1).png": 2,
        "normal/normal (1).png": 0,
    }
    assert list(manifest.index) == sorted(manifest.index) and (manifest["status"] == "ok").all()
    assert manifest["label"].dtype == "int64" and list(manifest["format"]) == ["PNG", "JPEG", "PNG", "PNG"]
    assert found["image"].to_dict() == masks and quarantine == {}
    for path, row in found.iterrows():
        assert row["bytes"] == (images / path).stat().st_size and len(row["sha256"]) == 64
    assert summary == {
        "in": 9, "ok": 4, "masks": 5, "quarantined": 0, "not_images_by_name": 1, "reasons": {},
        "by_class": {"Normal": 1, "Benign": 2, "Malignant": 1}, "images_with_masks": 3, "images_with_several_masks": 1,
    }  # fmt: skip
    meta = json.loads((tmp_path / "out/meta.json").read_text())
    assert set(meta["outputs"]) == {"manifest.parquet", "masks.parquet", "quarantine.tsv", "summary.json"}


@pytest.mark.parametrize(
    ("name", "image"),
    [
        ("a/benign (12)_mask.png", "a/benign (12)"),
        ("a/benign (12)_mask_1.png", "a/benign (12)"),
        ("a/b/x_Mask_20.PNG", "a/b/x"),
        ("a/x_mask_mask.png", "a/x_mask"),
        ("a/v1.5_mask.png", "a/v1.5"),
        ("a/benign (12).png", None),
        ("a/masked_1.png", None),
        ("a/mask_1.png", None),
        ("a/x_mask (2).png", "a/x"),
        ("a/x_mask - Copy.png", "a/x"),
        ("a/x_mask_b.png", "a/x"),
        ("a/x_mask2.png", "a/x"),
        ("a/x_masked.png", None),
        ("a_mask/x.png", None),
    ],
)
def test_masks_are_known_by_name(name, image):
    assert list_images.image_of_mask(name) == image


def test_a_mask_belongs_to_the_image_of_its_own_folder_and_ending(images, tmp_path):
    for path in ("Benign/x.png", "Benign/x.jpg", "Benign/sub/x.png"):
        picture(images / path, seed=len(path))
    for path in ("Benign/x_mask.png", "Benign/sub/x_mask.bmp", "normal/x_mask.png"):
        mask(images / path)
    _, masks, quarantine, _ = listing(images, tmp_path / "out")
    assert masks["image"].to_dict() == {
        "Benign/x_mask.png": "Benign/x.png",
        "Benign/sub/x_mask.bmp": "Benign/sub/x.png",
    }
    assert quarantine == {"normal/x_mask.png": "mask without an image: no normal/x"}


def test_what_cannot_be_used_is_quarantined_with_its_reason(images, tmp_path):
    (images / "Benign/text (1).png").write_text("this is no picture")
    (images / "Benign/empty.png").write_bytes(b"")
    whole = picture(images / "normal/cut.png", seed=5, size=64).read_bytes()
    (images / "normal/cut.png").write_bytes(whole[: len(whole) // 2])
    picture(images / "MALIGNANT/huge.png", seed=6, size=128)
    mask(images / "normal/normal (2)_mask.png")  # there is no normal (2)
    (images / "Benign/Benign (1)_mask.png").write_bytes(b"no mask")
    manifest, masks, quarantine, summary = listing(images, tmp_path / "out", max_pixels=10_000)
    truncated = quarantine.pop("normal/cut.png")
    assert truncated.startswith("truncated")
    assert quarantine.pop("MALIGNANT/huge.png").startswith("over-large: 128x128")
    assert quarantine == {
        "Benign/Benign (1)_mask.png": "not an image",
        "Benign/empty.png": "empty file",
        "Benign/text (1).png": "not an image",
        "normal/normal (2)_mask.png": "mask without an image: no normal/normal (2)",
    }
    bad = manifest[manifest["status"] == "quarantined"]
    assert sorted(bad.index) == ["Benign/empty.png", "Benign/text (1).png", "MALIGNANT/huge.png", "normal/cut.png"]
    assert bad.loc["normal/cut.png", "reason"] == truncated and masks.empty
    assert (summary["in"], summary["ok"], summary["masks"], summary["quarantined"]) == (9, 3, 0, 6)
    assert summary["by_class"] == {"Normal": 1, "Benign": 1, "Malignant": 1}
    assert sum(summary["reasons"].values()) == 6 and summary["reasons"]["not an image"] == 2
    assert summary["reasons"]["mask without an image"] == 1


def test_tables_have_the_same_columns_and_types_whatever_they_hold(images, tmp_path):
    import pyarrow.parquet as pq

    listing(images, tmp_path / "one")
    mask(images / "normal/normal (1)_mask.png")
    (images / "normal/broken.png").write_bytes(b"")
    listing(images, tmp_path / "two")
    for table in ("manifest", "masks"):
        one, two = (pq.read_schema(tmp_path / n / f"{table}.parquet") for n in ("one", "two"))
        assert one.equals(two)


def test_threads_do_not_change_a_byte(images, tmp_path):
    for i in range(6):
        picture(images / f"Benign/p{i}.png", seed=10 + i)
    listing(images, tmp_path / "one")
    arguments = ("--images", images, "--output-folder", tmp_path / "four", "--meta", tmp_path / "four/meta.json")
    run(list_images.main, *arguments, threads=4)
    for name in ("manifest.parquet", "masks.parquet", "quarantine.tsv", "summary.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "four" / name).read_bytes()


def test_two_folders_may_be_one_class(images, tmp_path):
    picture(images / "NORMAL/normal (2).png", seed=7)
    manifest, *_ = listing(images, tmp_path / "out")
    assert manifest.loc[["NORMAL/normal (2).png", "normal/normal (1).png"], "label"].tolist() == [0, 0]


@pytest.mark.parametrize("twin", ["NORMAL/normal (1).png", "NORMAL/normal (1)_mask.png"])
def test_two_files_that_differ_in_a_folders_letter_case_alone_are_refused(images, tmp_path, twin):
    picture(images / twin, seed=7)
    mask(images / "normal/normal (1)_mask.png")
    error = refused(images, tmp_path)
    assert twin in error.message and twin.replace("NORMAL", "normal") in error.message
    assert "merge the two folders" in error.hint


def test_files_that_differ_in_their_own_letter_case_are_two_images(images, tmp_path):
    picture(images / "normal/Normal (1).png", seed=7)
    manifest, *_ = listing(images, tmp_path / "out")
    assert len(manifest) == 4


@pytest.mark.parametrize(
    ("stray", "said", "hint"),
    [
        ("bening/x.png", "folder 'bening' is no class", "did you mean Benign?"),
        ("masks/x.png", "folder 'masks' is no class", "busi.list.classes"),
        ("BUSI/benign/x.png", "folder 'BUSI' is no class", "set busi.images to {images}/BUSI"),
        ("x.png", "not in a class folder", "move it into one"),
        ("bening/x_mask.png", "folder 'bening' is no class", "did you mean Benign?"),
    ],
)
def test_a_file_outside_the_class_folders_is_refused(images, tmp_path, stray, said, hint):
    picture(images / stray, seed=9)
    error = refused(images, tmp_path)
    assert f"{images / stray}: {said}" in error.message and "Normal, Benign, Malignant" in error.message
    assert hint.format(images=images) in error.hint


def test_classes_are_a_setting(images, tmp_path):
    manifest, *_, summary = listing(images, tmp_path / "out", classes=["malignant", "benign", "normal"])
    assert manifest["label"].to_dict() == {
        "normal/normal (1).png": 2, "Benign/Benign (1).png": 1, "MALIGNANT/MALIGNANT (1).png": 0,
    }  # fmt: skip
    assert summary["by_class"] == {"malignant": 1, "benign": 1, "normal": 1}


def test_a_class_without_a_readable_image_is_refused(images, tmp_path):
    (images / "normal/normal (1).png").write_bytes(b"")
    error = refused(images, tmp_path)
    assert "no readable image of class Normal (1 unreadable images, 0 masks)" in error.message
    assert "normal/normal (1).png: empty file" in error.message
    (images / "normal/normal (1).png").unlink()
    assert "no readable image of class Normal (0 unreadable images, 0 masks)" in refused(images, tmp_path).message


def test_a_folder_of_masks_given_as_images_is_refused(images, tmp_path):
    (images / "Benign/Benign (1).png").unlink()
    mask(images / "Benign/Benign (1)_mask.png")
    error = refused(images, tmp_path)
    assert "no readable image of class Benign (0 unreadable images, 1 masks)" in error.message
    assert "these are masks alone" in error.hint


@pytest.mark.parametrize("ending", ["png", "jpg"])
def test_masks_under_the_names_of_images_are_refused(images, tmp_path, ending):
    (images / "Benign/Benign (1).png").unlink()
    for i in range(3):
        mask(images / f"Benign/benign ({i}).{ending}", size=200, seed=i)
    error = refused(images, tmp_path)
    assert f"all 3 images of class Benign are black and white only, such as Benign/benign (0).{ending}" in error.message
    picture(images / "Benign/benign (4).png", seed=4)
    listing(images, tmp_path / "out")  # one that is not is enough


def test_no_folder_and_an_empty_one(tmp_path):
    assert "no such folder" in refused(tmp_path / "none", tmp_path).message
    (tmp_path / "empty/Normal").mkdir(parents=True)
    assert "no file ends with one of" in refused(tmp_path / "empty", tmp_path).message


def test_the_command_ends_with_a_hint(images, tmp_path):
    picture(images / "Bening/x.png", seed=9)
    command = [sys.executable, "-m", "scripts.busi.list_images", "--images", str(images)]
    command += ["--output-folder", str(tmp_path / "out"), "--meta", str(tmp_path / "out/meta.json"), "--threads", "1"]
    said = error_of(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120))
    assert "folder 'Bening' is no class" in said and not (tmp_path / "out").exists()
