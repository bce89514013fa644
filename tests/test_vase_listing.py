"""From folders of files to the manifest: every file is listed or accounted for."""

import json
import shutil
import uuid

import pandas as pd
import pytest
from PIL import Image
from vase_fixtures import VIEW, command_line, error_of, files_below, picture, run, shard_table, write

from scripts.common import images as image_files
from scripts.common.errors import KilnError
from scripts.common.images import EXTENSIONS
from scripts.common.job_lines import outcome
from scripts.vase import inspect_images, list_images, list_labelled

A, B = "AAAA-01", "BBBB-02"


def name(vase, view):
    return VIEW.format(vase=vase, view=view)


def inspect(images, work, per_shard=100, **settings):
    """Inspect every shard of a folder; the tables, in order."""
    table = shard_table(images, work / "shards.parquet", per_shard)
    made = []
    for shard in table.names():
        made.append(work / f"{shard}.parquet")
        run(
            inspect_images.main,
            *("--images", images, "--shard-table", work / "shards.parquet", "--shard", shard),
            *("--output", made[-1], "--meta", work / f"{shard}.meta.json"),
            settings=settings,
        )
    return made


def list_all(images, work, per_shard=100, inspect_settings=None, ignored=0, **settings):
    made = inspect(images, work, per_shard, **(inspect_settings or {}))
    out = work / "list"
    run(
        list_images.main,
        *("--shards", *made, "--ignored", ignored, "--output-folder", out, "--meta", out / "meta.json"),
        settings=settings,
    )
    return read_all(out)


def read_all(out):
    manifest = pd.read_parquet(out / "manifest.parquet").set_index("path")
    quarantine, duplicates = (pd.read_csv(out / f"{n}.tsv", sep="\t") for n in ("quarantine", "duplicates"))
    return manifest, quarantine, duplicates, json.loads((out / "summary.json").read_text())


def label(images, out, settings=None):
    arguments = ("--images", images, "--output-folder", out, "--meta", out / "meta.json")
    run(list_labelled.main, *arguments, settings=settings)
    return pd.read_parquet(out / "labelled.parquet").set_index("path")


@pytest.fixture
def images(tmp_path):
    return tmp_path / "images"


@pytest.fixture
def work(tmp_path):
    (tmp_path / "work").mkdir()
    return tmp_path / "work"


def test_every_extension_at_any_depth_is_listed(images, work):
    expected = {}
    for i, ending in enumerate((*EXTENSIONS, *(e.upper() for e in EXTENSIONS))):
        path = picture(images / "/".join("abc"[: i % 4]) / f"p{i}{ending}", seed=i)
        expected[str(path.relative_to(images))] = path.stat().st_size
    manifest, quarantine, _, summary = list_all(images, work, per_shard=4, view_pattern=None)
    assert manifest["bytes"].to_dict() == expected
    assert (manifest["status"] == "ok").all() and quarantine.empty
    assert set(manifest["width"]) == set(manifest["height"]) == {32}
    assert set(manifest["format"]) == {"PNG", "JPEG", "BMP", "TIFF", "WEBP"}
    assert [len(pd.read_parquet(one)) for one in sorted(work.glob("s0*.parquet"))] == [4, 4, 4, 2]
    assert "shard" not in manifest.columns  # which follows from the history of the folder, not from what it holds
    assert summary["in"] == summary["ok"] == summary["vases"] == len(expected)


def test_files_of_one_name_in_two_folders_both_survive(images, work):
    for folder in ("first", "second/deep"):
        picture(images / folder / name(A, 1), seed=len(folder))
    manifest, _, _, summary = list_all(images, work)
    assert list(manifest.index) == [f"first/{name(A, 1)}", f"second/deep/{name(A, 1)}"]
    assert manifest["sha256"].nunique() == 2
    assert summary["vases"] == 1 and summary["views_per_vase"] == {"2": 1}


def test_vase_and_view_come_from_the_name_whatever_its_case(images, work):
    for text in (name(A, 3), name(A, 12).upper(), name("abcd-ef", 1)):
        picture(images / text, seed=len(text))
    manifest, _, _, summary = list_all(images, work)
    assert manifest.loc[name(A, 3), ["vase", "view"]].tolist() == [A, "3"]
    assert manifest.loc[name(A, 12).upper(), ["vase", "view"]].tolist() == [A, "12"]
    assert manifest.loc[name("abcd-ef", 1), "vase"] == "abcd-ef"
    assert summary["vases"] == 2 and summary["unmatched_names"] == 0


def test_names_that_do_not_match_become_vases_of_one_view_and_are_counted(images, work):
    odd = ["hello.jpg", "sub/hello.jpg", name(A, 1).replace("ac001001", "ac002002"), f"x{name(A, 1)}"]
    for i, text in enumerate([*odd, name(A, 1), name(A, 2)]):
        picture(images / text, seed=i)
    manifest, _, _, summary = list_all(images, work)
    assert manifest.loc[odd, "vase"].tolist() == odd
    assert set(manifest.loc[odd, "view"]) == {"1"}
    assert not manifest.loc[odd, "matched"].any() and manifest["matched"].sum() == 2
    assert summary["unmatched_names"] == 4 and summary["vases"] == 5
    assert summary["views_per_vase"] == {"1": 4, "2": 1}


def test_a_group_that_takes_no_part_in_a_match_loses_no_file(images, work):
    for i, text in enumerate(["cup-3.jpg", "cup.jpg", "7.jpg"]):
        picture(images / text, seed=i)
    manifest, *_, summary = list_all(images, work, view_pattern=r"^(?P<vase>[a-z]+)?(-?(?P<view>\d+))?\.jpg$")
    assert manifest[["vase", "view"]].T.to_dict("list") == {
        "7.jpg": ["7.jpg", "1"],
        "cup-3.jpg": ["cup", "3"],
        "cup.jpg": ["cup", "1"],
    }
    assert summary["vases"] == 2 and summary["unmatched_names"] == 1


def test_without_a_pattern_each_file_is_a_vase(images, work):
    for view in (1, 2):
        picture(images / name(A, view), seed=view)
    manifest, *_ = list_all(images, work, view_pattern=None)
    assert list(manifest["vase"]) == list(manifest.index)


def test_quarantine_says_why(images, work):
    good = picture(images / name(A, 1), seed=1, size=64)
    whole = good.read_bytes()
    (images / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (images / "deep").mkdir()
    (images / "deep/empty.png").write_bytes(b"")
    (images / "text.jpg").write_text("this is no picture")
    picture(images / "huge.png", seed=2, size=128)
    (images / "cut.png").write_bytes(picture(images / "cut.png", seed=3, size=64).read_bytes()[:-60])
    manifest, quarantine, _, summary = list_all(images, work, inspect_settings={"max_pixels": 100 * 100})
    reasons = quarantine.set_index("path")["reason"].to_dict()
    assert list(reasons) == ["cut.jpg", "cut.png", "deep/empty.png", "huge.png", "text.jpg"]
    assert "truncated" in reasons["cut.jpg"].lower() and "truncated" in reasons["cut.png"].lower()
    assert reasons["deep/empty.png"] == "empty file"
    assert "128x128" in reasons["huge.png"] and "10000" in reasons["huge.png"]
    assert reasons["text.jpg"] == "not an image"
    assert (summary["in"], summary["ok"], summary["quarantined"]) == (6, 1, 5)
    assert sum(summary["reasons"].values()) == 5
    assert summary["vases"] == 1
    assert manifest.loc[list(reasons), "sha256"].str.len().eq(64).all()


def test_an_image_of_exactly_max_pixels_is_read(images, work):
    picture(images / name(A, 1), seed=1, size=64)
    manifest, *_ = list_all(images, work, inspect_settings={"max_pixels": 64 * 64})
    assert list(manifest["status"]) == ["ok"]


def test_byte_identical_files_are_reported_across_shards(images, work):
    first = picture(images / name(A, 1), seed=1)
    picture(images / name(A, 2), seed=2)
    for copy in (name(B, 7), f"zz/{name(B, 9)}"):
        (images / copy).parent.mkdir(exist_ok=True)
        shutil.copy(first, images / copy)
    for empty in ("e1.png", "e2.png"):  # unreadable twins are quarantined, not duplicates
        (images / empty).write_bytes(b"")
    manifest, _, duplicates, summary = list_all(images, work, per_shard=1)
    assert list(duplicates["path"]) == [name(A, 1), name(B, 7), f"zz/{name(B, 9)}"]
    assert set(duplicates["sha256"]) == {manifest.loc[name(A, 1), "sha256"]}
    assert summary["identical_files"] == 3 and summary["in"] == 6


def test_files_that_are_no_images_are_counted(images, work):
    picture(images / name(A, 1), seed=1)
    *_, summary = list_all(images, work, ignored=5)
    assert summary["not_images_by_name"] == 5


def test_the_manifest_does_not_depend_on_the_order_of_shards(images, work, tmp_path):
    for i in range(5):
        picture(images / name(A, i), seed=i)
    made = inspect(images, work, per_shard=2)
    for out, order in (("one", made), ("two", made[::-1])):
        arguments = ("--shards", *order, "--output-folder", work / out, "--meta", work / out / "meta.json")
        run(list_images.main, *arguments)
    assert (work / "one/manifest.parquet").read_bytes() == (work / "two/manifest.parquet").read_bytes()


def test_a_file_in_two_shards_is_refused(images, work):
    picture(images / name(A, 1), seed=1)
    (made,) = inspect(images, work)
    with pytest.raises(KilnError, match=f"two rows for.*{A}"):
        arguments = ("--shards", made, made, "--output-folder", work / "list", "--meta", work / "list/meta.json")
        run(list_images.main, *arguments)
    assert not (work / "list").exists() or files_below(work / "list") == []


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        (r"(?P<vase>.+)\.jpg", "no group view"),
        (r"(.+)_(\d+)\.jpg", "no group vase or view"),
        (r"(?P<vase>.+", "is not a regular expression"),
        (r"^nothing(?P<vase>a)(?P<view>b)$", f"matches none of 1 file names, such as '{name(A, 1)}'"),
    ],
)
def test_a_pattern_that_cannot_work_is_refused(images, work, pattern, said):
    picture(images / name(A, 1), seed=1)
    with pytest.raises(KilnError) as caught:
        list_all(images, work, view_pattern=pattern)
    assert said in caught.value.message and repr(pattern) in caught.value.message
    assert "null" in caught.value.hint
    assert not (work / "list").exists()


def test_a_bad_pattern_ends_the_command_with_a_hint(images, work):
    picture(images / name(A, 1), seed=1)
    (made,) = inspect(images, work)
    out = work / "list"
    arguments = ("--shards", made, "--output-folder", out, "--meta", out / "meta.json")
    said = error_of(command_line("list_images", *arguments, settings={"view_pattern": "(?P<vase>"}))
    assert "Error: vase.list.view_pattern '(?P<vase>' is not a regular expression" in said
    assert not out.exists()


def test_a_folder_without_one_readable_image_is_refused(images, work):
    images.mkdir()
    (images / name(A, 1)).write_bytes(b"")
    with pytest.raises(KilnError, match="none of 1 images can be read.*empty file"):
        list_all(images, work)
    assert not (work / "list").exists()


def test_an_image_that_goes_between_scan_and_inspection_ends_the_command(images, work):
    gone = picture(images / name(A, 1), seed=1)
    picture(images / name(A, 2), seed=2)
    shard_table(images, work / "shards.parquet")
    gone.unlink()
    arguments = ("--images", images, "--shard-table", work / "shards.parquet", "--shard", "s00000")
    out = ("--output", work / "s00000.parquet", "--meta", work / "s00000.meta.json")
    said = error_of(command_line("inspect_images", *arguments, *out))
    assert f"{gone}: the file is gone since the folder was scanned" in said
    assert files_below(work) == ["shards.parquet"]


def test_a_file_that_may_not_be_read_is_named(images, work, monkeypatch):
    picture(images / name(A, 1), seed=1)

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(image_files, "inspect", refuse)
    with pytest.raises(KilnError, match=rf"{A}.*: cannot be read \(Permission denied\)"):
        inspect(images, work)


def test_threads_do_not_change_the_table(images, work):
    for i in range(7):
        picture(images / name(A, i), seed=i)
    (one,) = inspect(images, work)
    before = one.read_bytes()
    arguments = ("--images", images, "--shard-table", work / "shards.parquet", "--shard", "s00000")
    run(inspect_images.main, *arguments, "--output", one, "--meta", work / "m.json", threads=4)
    assert one.read_bytes() == before


def test_labelled_images_of_both_classes_at_any_depth(images, tmp_path, caplog):
    picture(images / "0/deep/er" / name(A, 1), seed=1)
    picture(images / "1" / name(A, 2), seed=2)
    picture(images / "1/0" / name(B, 1), seed=3)  # only the first folder is the class
    picture(images / "1/photo.png", seed=4)
    (images / "0/broken.jpg").write_bytes(b"")
    (images / "notes.txt").write_text("no image, no matter")
    table = label(images, tmp_path / "out")
    assert table["label"].to_dict() == {
        f"0/deep/er/{name(A, 1)}": 0,
        "0/broken.jpg": 0,
        f"1/{name(A, 2)}": 1,
        f"1/0/{name(B, 1)}": 1,
        "1/photo.png": 1,
    }
    assert table.loc[f"1/0/{name(B, 1)}", ["vase", "view"]].tolist() == [B, "1"]
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert (summary["in"], summary["ok"], summary["quarantined"]) == (5, 4, 1)
    assert summary["by_class"] == {"0": 1, "1": 3} and summary["vases"] == 3
    assert summary["unmatched_names"] == 2  # each is a vase of its own to the split: to be seen
    assert outcome([str(tmp_path / "out/summary.json")]) == "1 quarantined, 2 of no vase by their names"
    assert "2 of 5 names do not match vase.list.view_pattern" in caplog.text
    quarantine = pd.read_csv(tmp_path / "out/quarantine.tsv", sep="\t")
    assert quarantine.to_dict("records") == [{"path": "0/broken.jpg", "reason": "empty file"}]


@pytest.mark.parametrize("lone", ["0", "1"])
def test_one_class_alone_is_refused(images, tmp_path, lone):
    picture(images / lone / name(A, 1), seed=1)
    other = images / ("1" if lone == "0" else "0")
    other.mkdir()
    with pytest.raises(KilnError, match=f"{other}: no readable image of class {other.name}"):
        label(images, tmp_path / "out")
    (other / "broken.jpg").write_bytes(b"")  # an unreadable one does not count
    with pytest.raises(KilnError, match="no readable image"):
        label(images, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("stray", [name(A, 9), f"2/{name(A, 9)}", f"good/{name(A, 9)}", f"01/{name(A, 9)}", "1.jpg"])
def test_files_outside_the_two_classes_are_refused(images, tmp_path, stray):
    for i in (0, 1):
        picture(images / str(i) / name(A, i), seed=i)
    picture(images / stray, seed=9)
    with pytest.raises(KilnError, match=f"{stray}: not below 0/ or 1/"):
        label(images, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_labelled_folder_problems_end_the_command_with_a_hint(images, tmp_path):
    picture(images / "0" / name(A, 1), seed=1)
    arguments = ("--images", images, "--output-folder", tmp_path / "out", "--meta", tmp_path / "out/meta.json")
    assert "no readable image of class 1" in error_of(command_line("list_labelled", *arguments))


def test_max_pixels_holds_for_labelled_images_too(images, tmp_path):
    picture(images / "0" / name(A, 1), seed=1, size=64)
    picture(images / "1" / name(A, 2), seed=2)
    picture(images / "0" / name(B, 1), seed=3)
    table = label(images, tmp_path / "out", {"inspect": {"max_pixels": 2000}})
    assert table["status"].to_dict()[f"0/{name(A, 1)}"] == "quarantined"
    assert (table["status"] == "ok").sum() == 2


def test_hard_pictures_are_read_not_dropped(images, work):
    """Palette, 16-bit grey and CMYK files are pictures like others."""
    images.mkdir()
    picture(images / name(A, 1), seed=1)
    grey = Image.linear_gradient("L")
    grey.convert("P").save(images / "palette.png")
    grey.convert("CMYK").save(images / "cmyk.jpg")
    Image.new("I;16", (8, 8), 40000).save(images / "deep.png")
    manifest, quarantine, *_ = list_all(images, work)
    assert quarantine.empty and len(manifest) == 4


def test_odd_names_come_through(images, work):
    odd = ["a b.jpg", "tab\there.jpg", 'quote".jpg', "sub dir/ünï.jpg", "new\nline.jpg"]
    picture(images / name(A, 1), seed=0)
    for i, text in enumerate(odd):
        picture(images / text, seed=i + 1)
    (images / "tab\tbad.jpg").write_bytes(b"")
    manifest, quarantine, *_ = list_all(images, work)
    assert set(odd) < set(manifest.index)
    assert list(quarantine["path"]) == ["tab\tbad.jpg"]


def test_meta_names_the_settings_and_outputs(images, work):
    picture(images / name(A, 1), seed=1)
    list_all(images, work)
    meta = json.loads((work / "list/meta.json").read_text())
    assert set(meta["outputs"]) == {"manifest.parquet", "quarantine.tsv", "duplicates.tsv", "summary.json"}
    assert "view_pattern" in meta["settings"]
    inner = json.loads((work / "s00000.meta.json").read_text())
    assert meta["inputs"]["s00000"]["sha256"] == inner["outputs"]["s00000.parquet"]["sha256"]


def test_a_missing_shard_is_named(work):
    missing = work / f"{uuid.UUID(int=1)}.parquet"
    with pytest.raises(KilnError, match=str(missing)):
        run(list_images.main, "--shards", missing, "--output-folder", work, "--meta", work / "meta.json")


def test_a_table_of_another_rule_is_refused(work):
    other = write(work / "other.parquet", [{"path": "a.jpg", "score": 1.0}])
    with pytest.raises(KilnError, match="no column sha256"):
        run(list_images.main, "--shards", other, "--output-folder", work / "o", "--meta", work / "o/meta.json")
