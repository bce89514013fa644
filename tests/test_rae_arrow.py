"""From image folders to the Arrow dataset: byte for byte, accounted for, resumable, readable by plain `datasets`."""

import hashlib
import io
import json
import os
import subprocess
import sys

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from vase_fixtures import ROOT, error_of, files_below, picture

from scripts.common.errors import KilnError
from scripts.common.images import ImageError
from scripts.rae import arrow, build_arrow, sources

CLASSES = ["n01440764", "n01443537", "n02085620"]


def build(images, out, *options, threads=1, **settings):
    """Run the step; the dataset as plain `datasets` reads it, the quarantine {path: reason}, the summary."""
    arguments = ["--images", images, "--output-folder", out, *options, "--settings", json.dumps(settings)]
    build_arrow.main([*map(str, arguments), "--threads", str(threads)])
    quarantine = pd.read_csv(out / "quarantine.tsv", sep="\t").set_index("path")["reason"].to_dict()
    return datasets.load_from_disk(str(out / "dataset")), quarantine, json.loads((out / "summary.json").read_text())


def refused(images, out, *options, **settings):
    """The error of a step that leaves no dataset behind."""
    with pytest.raises(KilnError) as caught:
        build(images, out, *options, **settings)
    assert not (out / "dataset").exists()
    return caught.value


def stored(dataset):
    """{path: (bytes, class name)} of a split."""
    raw = dataset.cast_column("image", datasets.Image(decode=False))
    names = dataset.features["label"].names
    return {row["image"]["path"]: (row["image"]["bytes"], names[row["label"]]) for row in raw}


def on_disk(folder):
    """{path: (bytes, class folder)} of a folder of class folders."""
    files = [p for p in folder.rglob("*") if p.is_file()]
    return {p.relative_to(folder).as_posix(): (p.read_bytes(), p.relative_to(folder).parts[0]) for p in files}


def contents(folder):
    """{name: bytes} of every file below `folder`."""
    return {name: (folder / name).read_bytes() for name in files_below(folder)}


def folder_of(root, per_class, split="train", start=0):
    """Small JPEGs in class folders."""
    for label, name in enumerate(CLASSES):
        for i in range(start, start + per_class):
            picture(root / split / name / f"{name}_{i}.JPEG", seed=100 * label + i, size=16)
    return root


@pytest.fixture
def images(tmp_path):
    """Seven images of each of three classes to train on, two of each to validate on."""
    return folder_of(folder_of(tmp_path / "images", 7), 2, "val", start=50)


def test_files_are_kept_byte_for_byte_and_read_by_plain_datasets(images, tmp_path):
    picture(images / "train" / CLASSES[1] / "deep" / "a.png", seed=7)
    (images / "train" / CLASSES[1] / "notes.txt").write_text("not an image")
    dataset, quarantine, summary = build(images, tmp_path / "out", images_per_shard=5)
    assert stored(dataset["train"]) == {
        path: value for path, value in on_disk(images / "train").items() if not path.endswith(".txt")
    }
    assert stored(dataset["validation"]) == on_disk(images / "val")
    assert dataset["train"].features["label"].names == CLASSES and quarantine == {}
    row = dataset["train"][0]
    want = Image.open(images / "train" / CLASSES[0] / f"{CLASSES[0]}_0.JPEG")
    assert np.array_equal(np.asarray(row["image"]), np.asarray(want)) and row["label"] == 0
    assert summary["validation"] == "class folders" and summary["not_images_by_name"] == 1
    train = summary["splits"]["train"]
    assert (train["in"], train["ok"], train["quarantined"]) == (22, 22, 0)
    assert train["bytes"] == sum(len(data) for data, _ in stored(dataset["train"]).values())
    assert train["by_class"] == dict(zip(CLASSES, (7, 8, 7), strict=True))


def test_the_listing_names_every_file_with_its_hash_and_no_state_is_left(images, tmp_path):
    build(images, tmp_path / "out", images_per_shard=10)
    folder = tmp_path / "out/dataset"
    listing = json.loads((folder / "files.json").read_text())
    assert sorted([*listing, "files.json"]) == files_below(folder)
    for name, facts in listing.items():
        data = (folder / name).read_bytes()
        assert facts == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert [n for n in listing if n.startswith("train/data-")] == [
        f"train/data-{i:05d}-of-00003.arrow" for i in range(3)
    ]
    meta = json.loads((tmp_path / "out/meta.json").read_text())
    assert set(meta["outputs"]) == {"files.json", "quarantine.tsv", "summary.json"} and meta["items"] == 27
    assert sorted(p.name for p in tmp_path.iterdir()) == ["images", "out"]


def test_the_number_of_processes_changes_no_byte(images, tmp_path):
    build(images, tmp_path / "one", images_per_shard=4, processes=1)
    build(images, tmp_path / "two", images_per_shard=4, processes=2, threads=2)
    assert contents(tmp_path / "one/dataset") == contents(tmp_path / "two/dataset")


def test_images_lie_in_small_batches(tmp_path, monkeypatch):
    file = picture(tmp_path / "a.jpg", seed=1, size=16)
    some = [arrow.Picture(str(file), f"c/{i}.jpg", 0, file.stat().st_size) for i in range(250)]

    def rows(path):
        arrow.write_shard(path, some, ["c"], 10**6, "headers")
        with pa.OSFile(str(path)) as source:
            return [batch.num_rows for batch in pa.ipc.open_stream(source)]

    assert rows(tmp_path / "a.arrow") == [100, 100, 50]
    monkeypatch.setattr(arrow, "BATCH_BYTES", 3 * file.stat().st_size)
    assert rows(tmp_path / "b.arrow") == [3] * 83 + [1]


# --- validation from a label file, or cut from train ---


def flat(images, tmp_path, line):
    """The validation images of `images` in one folder, and their label file by `line(name, label)`."""
    rows = []
    for path in sorted((images / "val").rglob("*.JPEG")):
        rows.append(line(path.name, CLASSES.index(path.parent.name)))
        path.rename(images / "val" / path.name)
    for name in CLASSES:
        (images / "val" / name).rmdir()
    labels = tmp_path / "labels.txt"
    labels.write_text("\n".join([*rows, "", ""]))
    return labels


@pytest.mark.parametrize(
    "line", [lambda n, i: f"{n} {CLASSES[i]}", lambda n, i: f"{n}\t{i}", lambda n, i: f"  {n}   {i} "]
)
def test_a_flat_validation_folder_takes_its_labels_from_a_file(images, tmp_path, line):
    want = {path.split("/")[1]: value for path, value in on_disk(images / "val").items()}
    labels = flat(images, tmp_path, line)
    dataset, _, summary = build(images, tmp_path / "out", labels=str(labels))
    assert stored(dataset["validation"]) == want
    assert summary["validation"] == "labels of labels.txt"
    by_option, _, _ = build(images, tmp_path / "out2", "--labels", labels)
    assert stored(by_option["validation"]) == want
    assert "labels" in json.loads((tmp_path / "out2/meta.json").read_text())["inputs"]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda text: text.replace(CLASSES[2], "n02085621"), "row 5: 'n02085621' is no class; the nearest is 'n02085"),
        (lambda text: text.replace(CLASSES[0], "3"), "row 1: '3' is no class"),
        (lambda text: text.replace(CLASSES[0], "-1"), "row 1: '-1' is no class"),
        (lambda text: text + "gone.JPEG 0\n", "'gone.JPEG' is not in"),
        (lambda text: text.partition("\n")[2], "no label of 'n01440764_50.JPEG'"),
        (lambda text: text + text, "a second label of 'n01440764_50.JPEG'"),
        (lambda text: text + "alone\n", "expected `name label`"),
    ],
)  # fmt: skip
def test_labels_that_do_not_fit_are_refused(images, tmp_path, change, message):
    labels = flat(images, tmp_path, lambda name, label: f"{name} {CLASSES[label]}")
    labels.write_text(change(labels.read_text()))
    error = refused(images, tmp_path / "out", labels=str(labels))
    assert message in error.message and str(labels) in error.message


def test_without_a_validation_folder_a_share_of_each_class_is_cut_from_train(tmp_path):
    root = folder_of(tmp_path / "images", 20)
    dataset, _, summary = build(root, tmp_path / "out", train_share=0.8)
    train, validation = stored(dataset["train"]), stored(dataset["validation"])
    assert {**train, **validation} == on_disk(root / "train") and not train.keys() & validation.keys()
    assert summary["validation"] == "cut from train"
    assert summary["splits"]["validation"]["by_class"] == dict.fromkeys(CLASSES, 4)
    again, _, _ = build(root / "train", tmp_path / "again", train_share=0.8)  # a folder of nothing but class folders
    assert stored(again["validation"]) == validation
    other, _, _ = build(root, tmp_path / "other", train_share=0.8, seed=1)
    assert stored(other["validation"]).keys() != validation.keys()


@settings(deadline=None)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    share=st.floats(0.05, 0.95),
    seed=st.integers(0, 99),
    new=st.integers(1000, 2000),
)
def test_one_more_image_moves_at_most_one_other_of_its_class(sizes, share, seed, new):
    pictures = [arrow.Picture("", f"{label}/{i}", label, 1) for label, n in enumerate(sizes) for i in range(n)]
    train, validation = sources.cut_validation(pictures, share, seed)
    assert sorted(train + validation) == sorted(pictures)
    for label, n in enumerate(sizes):
        held = sum(picture.label == label for picture in validation)
        assert held == 0 if n == 1 else 1 <= held <= n - 1 and abs(held - (1 - share) * n) <= 1
    added = arrow.Picture("", f"0/{new}", 0, 1)
    _, after = sources.cut_validation([added, *pictures], share, seed)
    moved = set(after).symmetric_difference(validation) - {added}
    assert len(moved) <= 1 and all(picture.label == 0 for picture in moved)


# --- what is no whole image ---


def jpeg(mode="RGB", size=(48, 48), **save):
    """A noisy JPEG's bytes."""
    pixels = np.random.default_rng(0).integers(0, 256, (*size[::-1], len(mode)), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels, mode).save(buffer, "JPEG", **save)
    return buffer.getvalue()


def png():
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def with_preview(data):
    """The JPEG `data` with a whole JPEG embedded in an APP1 segment, as cameras do."""
    preview = b"Exif\0\0" + jpeg(size=(8, 8))
    return data[:2] + b"\xff\xe1" + (len(preview) + 2).to_bytes(2, "big") + preview + data[2:]


def damaged(data):
    """A PNG with flipped bits in its pixel data."""
    middle = data.index(b"IDAT") + 200
    return data[:middle] + bytes(byte ^ 255 for byte in data[middle : middle + 8]) + data[middle + 8 :]


@pytest.mark.parametrize("verify", ["headers", "full"])
@pytest.mark.parametrize(
    "data, reason",
    [
        (jpeg(), None),
        (jpeg("CMYK"), None),
        (jpeg("RGB", progressive=True), None),
        (png(), None),
        (jpeg() + b"\0\0 written after the end", None),
        (with_preview(jpeg()), None),
        (jpeg()[:-2], "truncated or corrupt"),
        (jpeg()[: len(jpeg()) // 2], "truncated or corrupt"),
        (with_preview(jpeg())[:-300], "truncated or corrupt"),
        (jpeg("RGB", progressive=True)[:-300], "truncated or corrupt"),
        (png()[:-300], "truncated or corrupt"),
        (jpeg()[:100], "unreadable|not an image|truncated"),
        (b"", "empty file"),
        (b"<html>404</html>", "not an image"),
        (jpeg(size=(200, 200)), "over-large: 200x200 is over max_pixels 10000"),
    ],
    ids=lambda value: f"{len(value)} bytes" if isinstance(value, bytes) else value,
)
def test_whole_images_pass_and_others_are_refused_with_the_reason(data, reason, verify):
    if reason is None:
        assert arrow.verify_image(data, 10_000, verify) is None
    else:
        with pytest.raises(ImageError, match=reason):
            arrow.verify_image(data, 10_000, verify)


def test_damage_among_the_pixels_is_found_by_decoding_alone():
    arrow.verify_image(damaged(png()), 10_000, "headers")
    with pytest.raises(ImageError, match="truncated or corrupt"):
        arrow.verify_image(damaged(png()), 10_000, "full")


def test_bad_files_are_quarantined_and_the_sum_is_right(images, tmp_path):
    place = images / "train" / CLASSES[0]
    (place / "cmyk.JPEG").write_bytes(jpeg("CMYK"))
    (place / "png.JPEG").write_bytes(png())
    (place / "cut  off.JPEG").write_bytes(jpeg()[:-100])
    (images / "val" / CLASSES[1] / "empty.JPEG").write_bytes(b"")
    dataset, quarantine, summary = build(images, tmp_path / "out", images_per_shard=3)
    assert quarantine == {
        f"train/{CLASSES[0]}/cut  off.JPEG": "truncated or corrupt: no end marker after the last scan",
        f"val/{CLASSES[1]}/empty.JPEG": "empty file",
    }
    kept = stored(dataset["train"])
    assert kept[f"{CLASSES[0]}/cmyk.JPEG"][0] == jpeg("CMYK") and kept[f"{CLASSES[0]}/png.JPEG"][0] == png()
    assert len(kept) == 21 + 2 and len(dataset["validation"]) == 6
    assert summary["splits"]["train"]["quarantined"] == summary["splits"]["validation"]["quarantined"] == 1
    assert summary["reasons"] == {"empty file": 1, "truncated or corrupt": 1}


def test_a_shard_of_bad_files_alone_is_an_empty_shard(images, tmp_path):
    for path in (images / "train" / CLASSES[0]).iterdir():
        path.write_bytes(b"no image")
    dataset, quarantine, _ = build(images, tmp_path / "out", images_per_shard=7)
    assert len(dataset["train"]) == 14 and len(quarantine) == 7


# --- what may happen on the way ---

KILLED = """
import os, signal, sys
from scripts.rae import arrow, build_arrow
write, done = arrow.write_shard, []
def killed(path, *rest):
    if len(done) == 3:
        path.with_name(".half.tmp").write_bytes(b"half a shard")
        os.kill(os.getpid(), signal.SIGKILL)
    done.append(path)
    write(path, *rest)
arrow.write_shard = killed
build_arrow.main(sys.argv[1:])
"""


def test_a_killed_run_carries_on_from_its_whole_shards(images, tmp_path, monkeypatch):
    settings = {"images_per_shard": 4, "processes": 1}
    build(images, tmp_path / "whole", **settings)
    out, state = tmp_path / "out", tmp_path / "state"
    command = ["--images", images, "--output-folder", out, "--state-folder", state, "--settings", json.dumps(settings)]
    killed = subprocess.run([sys.executable, "-c", KILLED, *map(str, command)], cwd=ROOT, env=dict(os.environ))
    assert killed.returncode == -9 and not out.exists()
    assert len(list(state.rglob("*.arrow"))) == 3
    torn = sorted(state.rglob("data-*.arrow"))[0]
    torn.write_bytes(torn.read_bytes()[:-1])  # as a disk may leave it
    written, write = [], arrow.write_shard
    monkeypatch.setattr(arrow, "write_shard", lambda path, *rest: (written.append(path.name), write(path, *rest)))
    build(images, out, "--state-folder", state, **settings)
    assert written == ["data-00000-of-00006.arrow", *(f"data-{i:05d}-of-00006.arrow" for i in (3, 4, 5)),
                       "data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]  # fmt: skip
    assert contents(out / "dataset") == contents(tmp_path / "whole/dataset")
    assert not state.exists()


def test_a_changed_setting_or_image_never_meets_an_old_state(images, tmp_path, monkeypatch):
    def stop(*_):
        raise KilnError("stopped", "go on")

    with monkeypatch.context() as patched:
        patched.setattr(build_arrow, "check_shards", stop)
        with pytest.raises(KilnError, match="stopped"):
            build(images, tmp_path / "out", "--state-folder", tmp_path / "state")
    assert list((tmp_path / "state").rglob("*.arrow"))
    changed = images / "train" / CLASSES[0] / f"{CLASSES[0]}_0.JPEG"
    data = bytearray(changed.read_bytes())
    data[-3] ^= 1  # of the same size
    changed.write_bytes(data)
    dataset, _, _ = build(images, tmp_path / "out", "--state-folder", tmp_path / "state")
    assert stored(dataset["train"]) == on_disk(images / "train")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda path: path.unlink(), "the file is gone since the folder was scanned"),
        (lambda path: path.write_bytes(jpeg()), "when the folder was scanned, now"),
    ],
)
def test_a_file_that_changes_during_the_run_stops_it_and_leaves_no_shard(tmp_path, change, message):
    path = picture(tmp_path / "in/a.jpg", seed=1)
    listed = [arrow.Picture(str(path), "c/a.jpg", 0, path.stat().st_size)]
    change(path)
    with pytest.raises(KilnError, match=message):
        arrow.write_shard(tmp_path / "out/a.arrow", listed, ["c"], 10**6, "headers")
    assert files_below(tmp_path / "out") == []


@pytest.mark.parametrize("fault", ["lost", "relabelled", "cut"])
def test_shards_that_differ_from_their_source_are_refused(images, tmp_path, monkeypatch, fault):
    write = arrow.write_shard

    def wrong(path, pictures, *rest):
        first = pictures[0]
        if fault == "lost":
            pictures = pictures[1:]
        elif fault == "relabelled":
            pictures = [first._replace(label=2), *pictures[1:]]
        else:
            half = tmp_path / "half.jpg"
            half.write_bytes(jpeg(size=(8, 8)))
            pictures = [first._replace(file=str(half), size=half.stat().st_size), *pictures[1:]]
        write(path, pictures, *rest)

    monkeypatch.setattr(arrow, "write_shard", wrong)
    error = refused(images, tmp_path / "out")
    assert f"class {CLASSES[0]}: " in error.message and "stored, expected 7 of" in error.message


# --- folders that cannot be used ---


@pytest.mark.parametrize(
    "change, settings, message",
    [
        (lambda root: (root / "train" / "n09").mkdir(), {}, "n09: no image in this class folder"),
        (lambda root: picture(root / "train" / "a.jpg", seed=1), {}, "a.jpg: not in a class folder"),
        (lambda root: picture(root / "val" / "n02085621" / "a.jpg", seed=1), {}, "the nearest is 'n02085620'"),
        (lambda root: (root / "train").rename(root / "training"), {}, "val/ is there, but no train/"),
        (lambda root: [p.unlink() for p in (root / "val").rglob("*.JPEG")], {}, "val: no file ends with"),
        (lambda root: [p.write_bytes(b"?") for p in (root / "val").rglob("*.JPEG")], {}, "validation: none of 6"),
        (lambda root: None, {"validation_split": "test"}, "test: no such folder"),
    ],
)  # fmt: skip
def test_folders_that_cannot_be_used_are_refused(images, tmp_path, change, settings, message):
    change(images)
    assert message in refused(images, tmp_path / "out", **settings).message


def test_missing_folders_and_missing_labels_are_refused(images, tmp_path):
    (tmp_path / "bare").mkdir()
    assert "bare: no class folders" in refused(tmp_path / "bare", tmp_path / "out").message
    assert "gone: no such folder" in refused(tmp_path / "gone", tmp_path / "out").message
    single = folder_of(tmp_path / "single", 1)
    assert "validation is empty" in refused(single, tmp_path / "out").message
    labels = flat(images, tmp_path, lambda name, label: f"{name} {label}")
    error = refused(images, tmp_path / "out")
    assert "images without class folders" in error.message and "labels" in error.hint
    assert "but no validation folder" in refused(single, tmp_path / "out", labels=str(labels)).message


def test_by_hand_it_works_and_fails_as_a_command_line(images, tmp_path):
    def command(folder):
        line = [
            sys.executable,
            "-m",
            "scripts.rae.build_arrow",
            "--images",
            folder,
            "--output-folder",
            tmp_path / "out",
        ]
        return subprocess.run([*map(str, line), "--threads", "1"], cwd=ROOT, capture_output=True, text=True)

    assert "no such folder" in error_of(command(tmp_path / "gone"))
    done = command(images)
    assert done.returncode == 0, done.stderr
    assert len(arrow.open_split(tmp_path / "out/dataset", "train")) == 21


# --- existing Arrow folders, and readers ---


def saved(folder, splits, columns=("image", "label"), classes=CLASSES):
    """A dataset of JPEG bytes saved by the library itself."""
    data = [{"bytes": jpeg(size=(16 + i, 16)), "path": None} for i in range(6)]
    features = datasets.Features({columns[0]: datasets.Image(), columns[1]: datasets.ClassLabel(names=list(classes))})
    made = datasets.Dataset.from_dict({columns[0]: data, columns[1]: [i % 3 for i in range(6)]}, features=features)
    datasets.DatasetDict(dict.fromkeys(splits, made)).save_to_disk(str(folder), num_shards=dict.fromkeys(splits, 2))
    return folder


def test_an_arrow_folder_is_checked_and_linked_to(tmp_path):
    source = saved(tmp_path / "source", ["train", "val"])
    dataset, _, summary = build(source, tmp_path / "out", source="arrow")
    assert list(dataset) == ["train", "validation"]
    for split, name in (("train", "train"), ("validation", "val")):
        want = datasets.load_from_disk(str(source))[name].cast_column("image", datasets.Image(decode=False))
        assert dataset[split].cast_column("image", datasets.Image(decode=False))[:] == want[:]
    assert summary["splits"]["validation"]["by_class"] == dict.fromkeys(CLASSES, 2)
    assert summary["splits"]["train"]["bytes"] == sum(len(jpeg(size=(16 + i, 16))) for i in range(6))
    links = [p for p in (tmp_path / "out/dataset").rglob("*") if p.is_symlink()]
    assert len(links) == 4 and all(p.suffix == ".arrow" for p in links)
    ours = tmp_path / "again"
    twice, _, _ = build(tmp_path / "out/dataset", ours, source="arrow")  # what the step made can be its source
    assert len(twice["train"]) == 6


def test_other_arrow_folders_are_refused(images, tmp_path):
    other = saved(tmp_path / "other", ["train", "validation"], columns=("picture", "label"))
    assert (
        "columns picture: Image, label: ClassLabel; expected" in refused(other, tmp_path / "o", source="arrow").message
    )
    only = saved(tmp_path / "only", ["train", "test"])
    assert "no such split" in (error := refused(only, tmp_path / "o", source="arrow")).message
    assert "has test, train" in error.message
    build(only, tmp_path / "named", source="arrow", validation_split="test")
    assert "no such split" in refused(tmp_path / "images", tmp_path / "o", source="arrow", train_split="t").message
    assert "not a readable Arrow" in refused(images, tmp_path / "o", source="arrow").message
    mixed = saved(tmp_path / "mixed", ["train"])
    saved(tmp_path / "reversed", ["validation"], classes=CLASSES[::-1])
    (tmp_path / "reversed/validation").rename(mixed / "validation")
    assert "differ in their classes" in refused(mixed, tmp_path / "o", source="arrow").message


def test_labels_that_are_no_class_are_refused(tmp_path):
    features = arrow.make_features(CLASSES)
    made = datasets.Dataset.from_dict({"image": [{"bytes": png(), "path": "a"}], "label": [-1]}, features=features)
    datasets.DatasetDict({"train": made, "validation": made}).save_to_disk(str(tmp_path / "unlabelled"))
    assert "labels -1 to -1" in refused(tmp_path / "unlabelled", tmp_path / "out", source="arrow").message


def test_a_damaged_empty_or_pathed_split_is_refused(images, tmp_path):
    build(images, tmp_path / "out")
    folder = tmp_path / "out/dataset"
    assert len(arrow.open_split(folder, "train")) == 21
    with pytest.raises(KilnError, match="no such split.*has train, validation"):
        arrow.open_split(folder, "test")
    shard = folder / "train/data-00000-of-00001.arrow"
    shard.write_bytes(shard.read_bytes()[:1500])
    with pytest.raises(KilnError, match="not a readable Arrow dataset"):
        arrow.open_split(folder, "train")
    (folder / "validation/data-00000-of-00001.arrow").unlink()
    with pytest.raises(KilnError, match="not a readable Arrow dataset"):
        arrow.open_split(folder, "validation")
    features = arrow.make_features(CLASSES)
    row = {"image": [{"bytes": None, "path": "/a.jpg"}], "label": [0]}
    name = arrow.shard_names(1)[0]
    for split, columns in (("empty", {"image": [], "label": []}), ("outside", row)):
        table = pa.table(columns, schema=features.arrow_schema)
        (tmp_path / "d" / split).mkdir(parents=True)
        with pa.ipc.new_stream(str(tmp_path / "d" / split / name), table.schema) as writer:
            writer.write_table(table)
        arrow.describe_splits(tmp_path / "d", {split: {name: "0"}}, features)
    with pytest.raises(KilnError, match="the split is empty"):
        arrow.open_split(tmp_path / "d", "empty")
    with pytest.raises(KilnError, match="1 of 1 images are paths"):
        arrow.open_split(tmp_path / "d", "outside")


def test_pictures_are_rgb_through_the_callers_transform(images, tmp_path):
    import torch

    (images / "train" / CLASSES[0] / "0.JPEG").write_bytes(jpeg("CMYK", size=(40, 20)))
    (images / "train" / CLASSES[0] / "1.JPEG").write_bytes(damaged(png()))
    build(images, tmp_path / "out")
    opened = arrow.open_split(tmp_path / "out/dataset", "train")
    pictures = arrow.Pictures(opened, lambda image: (image.mode, image.size))
    assert len(pictures) == 23 and pictures[0] == (("RGB", (40, 20)), 0)
    assert isinstance(pictures[1], KilnError) and "row 1 (n01440764/1.JPEG)" in pictures[1].message
    pixels = arrow.Pictures(opened.select(range(2, 23)), lambda image: torch.from_numpy(np.array(image)))
    loader = torch.utils.data.DataLoader(pixels, batch_size=8, num_workers=1)
    batches = list(loader)
    assert [len(labels) for _, labels in batches] == [8, 8, 5]
    assert torch.cat([labels for _, labels in batches]).tolist() == [0] * 7 + [1] * 7 + [2] * 7
    path = sorted((images / "train" / CLASSES[0]).glob("n*"))[0]
    assert torch.equal(batches[0][0][0], torch.from_numpy(np.array(Image.open(path).convert("RGB"))))


@pytest.mark.realdata
def test_real_imagenet_pictures_pass_and_are_kept(realdata, tmp_path):
    source = realdata / "imagenet-sample"
    labels = tmp_path / "labels.txt"
    with labels.open("w") as lines:
        for number, path in enumerate(sorted(source.rglob("*.JPEG"))):
            for place in (tmp_path / "in/train" / path.parent.name, tmp_path / "in/val"):
                if place.name != "val" or number % 4 == 0:
                    place.mkdir(parents=True, exist_ok=True)
                    (place / path.name).symlink_to(path)
            if number % 4 == 0:
                lines.write(f"{path.name} {path.parent.name}\n")
    out = tmp_path / "out"
    dataset, quarantine, summary = build(
        tmp_path / "in", out, labels=str(labels), verify="full", images_per_shard=50, processes=2, threads=2
    )
    assert quarantine == {} and stored(dataset["train"]) == on_disk(source)
    assert summary["splits"]["train"]["ok"] == 184 and summary["splits"]["validation"]["ok"] == 46
    pictures = arrow.Pictures(arrow.open_split(out / "dataset", "validation"), lambda image: image.mode)
    assert {mode for mode, _ in (pictures[i] for i in range(len(pictures)))} == {"RGB"}
    for path in list(source.rglob("*.JPEG"))[:20]:
        with pytest.raises(ImageError):
            arrow.verify_image(path.read_bytes()[:-500], 10**9, "headers")
