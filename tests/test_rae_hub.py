"""A data set of the Hugging Face hub: retrieved and locked by its own rule, then the Arrow dataset, byte for byte."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import workflow
from hub_server import HubServer
from PIL import Image
from vase_fixtures import files_below

from scripts.common.errors import KilnError
from scripts.rae import arrow, build_arrow

ROOT = Path(__file__).resolve().parents[1]
CLASSES = ["tench, Tinca tinca", "goldfish", "great white shark"]
REPO = "me/pictures"
SECRET = "hf_DoNotShowThisAnywhere0123456789"


def jpeg(seed: int, size: int = 24) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def rows_of(split: str, start: int, count: int) -> list[dict]:
    return [
        {"image": {"bytes": jpeg(i), "path": f"{split}_{i}.JPEG"}, "label": i % 3} for i in range(start, start + count)
    ]


def parquet(rows: list[dict], classes=CLASSES, image="image", **options) -> bytes:
    """A parquet file as the library itself writes it."""
    features = datasets.Features({image: datasets.Image(), "label": datasets.ClassLabel(names=classes)})
    columns = {image: [row["image"] for row in rows], "label": [row["label"] for row in rows]}
    buffer = io.BytesIO()
    datasets.Dataset.from_dict(columns, features=features).to_parquet(buffer, **options)
    return buffer.getvalue()


def odd(rows: list[dict]) -> bytes:
    """A parquet file of rows that the library does not write: without bytes, or none at all."""
    table = pa.Table.from_pylist(rows, schema=arrow.make_features(CLASSES).arrow_schema)
    pq.write_table(table, buffer := io.BytesIO())
    return buffer.getvalue()


TRAIN = [rows_of("train", 0, 7), rows_of("train", 7, 5)]
HELD = rows_of("val", 100, 4)


def shards() -> dict[str, bytes]:
    """A repo in the form of the published ImageNet."""
    return {
        "README.md": b"# pictures\n",
        "data/train-00000-of-00002.parquet": parquet(TRAIN[0], batch_size=3),
        "data/train-00001-of-00002.parquet": parquet(TRAIN[1]),
        "data/validation-00000-of-00001.parquet": parquet(HELD),
        "data/test-00000-of-00001.parquet": parquet([{**row, "label": -1} for row in HELD]),
    }


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub with the data set, and an environment that leads to it."""
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", *(n for n in os.environ if n.lower().endswith("_proxy"))):
        monkeypatch.delenv(name, raising=False)
    with HubServer() as server:
        server.repos[f"datasets/{REPO}"] = shards()
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
        yield server


def retrieve(folder: Path, **settings) -> subprocess.CompletedProcess:
    """Run the retrieving step into folder/data."""
    values = build_arrow.DatasetSettings(source="hub", repo=REPO, **settings).wanted()
    line = ["--settings", json.dumps(values), "--lock", folder / "lock.json", "--output-folder", folder / "data"]
    line += ["--meta", folder / "data/meta.json", "--retry-wait", "0.02"]
    command = [sys.executable, "-m", "scripts.retrieve.dataset", *map(str, line)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


def refused(folder: Path, **settings) -> str:
    """What a retrieval says that must fail, and leaves nothing behind."""
    before = files_below(folder / "data") if (folder / "data").exists() else None
    done = retrieve(folder, **settings)
    assert done.returncode == 1 and "\nError: " in f"\n{done.stderr}" and "\nHint: " in done.stderr, done.stderr
    assert (files_below(folder / "data") if (folder / "data").exists() else None) == before
    return done.stderr


def laid(folder: Path, files: dict[str, bytes]) -> Path:
    """A folder as the retrieving step leaves it."""
    listing = {}
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
        listing[name] = {"bytes": len(data), "sha256": arrow.artefacts.sha256_file(folder / name)}
    (folder / "files.json").write_text(json.dumps(listing))
    return folder


def build(source: Path, out: Path, *options, threads=1, **settings):
    """Run the building step; the dataset as plain `datasets` reads it, the quarantine {path: reason}, the summary."""
    values = json.dumps({"source": "hub", **settings})
    arguments = ["--images", source, "--output-folder", out, "--settings", values, "--threads", threads, *options]
    build_arrow.main(list(map(str, arguments)))
    quarantine = pd.read_csv(out / "quarantine.tsv", sep="\t").set_index("path")["reason"].to_dict()
    return datasets.load_from_disk(str(out / "dataset")), quarantine, json.loads((out / "summary.json").read_text())


def stored(dataset) -> list[dict]:
    """The rows of a split, the images as bytes and path."""
    return list(dataset.cast_column("image", datasets.Image(decode=False)))


# --- the whole way ---


@pytest.mark.slow
def test_from_the_hub_to_the_arrow_dataset_by_the_rules(hub, tmp_path):
    checkout, run = workflow.copy_checkout(tmp_path / "checkout"), tmp_path / "run"
    run.mkdir()
    config = tmp_path / "config.json"
    rae = {"dataset": {"source": "hub", "repo": REPO}}
    config.write_text(json.dumps({"resources": {"cpu": {"threads": 1, "mem_mb": 1000}}, "rae": rae}))
    wanted = ["results/rae/build_arrow/dataset/files.json", "--configfile", str(config)]
    workflow.run(checkout, run, *wanted)
    made = datasets.load_from_disk(str(run / "results/rae/build_arrow/dataset"))
    assert stored(made["train"]) == TRAIN[0] + TRAIN[1] and stored(made["validation"]) == HELD
    folder = run / "resources/datasets" / REPO
    assert files_below(folder) == [
        "data/train-00000-of-00002.parquet",
        "data/train-00001-of-00002.parquet",
        "data/validation-00000-of-00001.parquet",
        "files.json",
        "meta.json",
    ]
    locked = json.loads((checkout / "config/datasets.lock.json").read_text())[REPO]
    assert (
        locked["revision"]
        == hub.commit(f"datasets/{REPO}")
        == json.loads((folder / "meta.json").read_text())["revision"]
    )
    assert locked["files"] == json.loads((folder / "files.json").read_text())
    assert not hub.asked("test-00000|README")
    assert workflow.planned(checkout, run, *wanted) == {}
    for path in folder.rglob("*.parquet"):
        path.unlink()  # the Arrow files are all that later rules read
    assert workflow.planned(checkout, run, *wanted) == {}
    changed = workflow.planned(checkout, run, *wanted, "--config", "set=rae.dataset.validation_split=test")
    assert changed == {"retrieve_dataset": 1, "rae_build_arrow": 1}


# --- retrieval ---


def test_a_gated_data_set_says_where_to_accept_its_terms(hub, tmp_path):
    hub.gated[f"datasets/{REPO}"] = SECRET
    said = refused(tmp_path)
    assert f"open {hub.url}/datasets/{REPO}, log in, accept the terms" in said and "this data set is gated" in said
    assert not (tmp_path / "lock.json").exists()


def test_a_token_opens_it_and_is_shown_nowhere(hub, tmp_path, monkeypatch):
    hub.gated[f"datasets/{REPO}"] = SECRET
    monkeypatch.setenv("HF_TOKEN", SECRET)
    done = retrieve(tmp_path)
    assert done.returncode == 0 and SECRET not in done.stderr
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or SECRET.encode() not in path.read_bytes(), path


def test_a_cut_connection_is_taken_up_again(hub, tmp_path):
    name = "data/validation-00000-of-00001.parquet"
    hub.cuts[name] = [100, 50]
    assert retrieve(tmp_path).returncode == 0
    assert len(hub.asked("GET .*/validation-00000")) == 3 and len(hub.asked("GET .*/train-00000")) == 1
    assert (tmp_path / "data" / name).read_bytes() == shards()[name]


def test_another_revision_needs_a_new_lock_and_a_moved_branch_is_not_followed(hub, tmp_path):
    assert retrieve(tmp_path).returncode == 0
    first = hub.commit(f"datasets/{REPO}")
    assert "says revision 'main', but" in refused(tmp_path, revision="main")
    hub.repos[f"datasets/{REPO}"]["README.md"] = b"changed"
    assert retrieve(tmp_path).returncode == 0  # all is there with the locked bytes
    (tmp_path / "data/data/train-00000-of-00002.parquet").unlink()
    # This hub knows only its newest commit, so that asking for the locked one shows.
    assert "no such revision" in refused(tmp_path)
    assert hub.asked(f"/tree/{first}") and not hub.asked(f"/tree/{hub.commit(f'datasets/{REPO}')}")


def test_what_the_repo_lacks_is_named(hub, tmp_path):
    assert "no file 'data/training-*.parquet'" in refused(tmp_path, train_split="training")
    assert "no file 'data/held-*.parquet'" in refused(tmp_path, validation_split="held")
    del hub.repos[f"datasets/{REPO}"]
    assert "no such data set" in refused(tmp_path)


def test_without_a_validation_split_train_alone_is_retrieved(hub, tmp_path):
    del hub.repos[f"datasets/{REPO}"]["data/validation-00000-of-00001.parquet"]
    assert retrieve(tmp_path).returncode == 0
    dataset, _, summary = build(tmp_path / "data", tmp_path / "out", train_share=0.7)
    assert summary["validation"] == "cut from train" and len(dataset["validation"]) == 3
    both = stored(dataset["train"]) + stored(dataset["validation"])
    assert sorted(both, key=str) == sorted(TRAIN[0] + TRAIN[1], key=str)


# --- building ---


def test_rows_are_accounted_for_and_the_listing_is_plain(tmp_path):
    source = laid(tmp_path / "data", shards())
    dataset, quarantine, summary = build(source, tmp_path / "out", verify="full")
    assert list(dataset) == ["train", "validation"] and dataset["train"].features["label"].names == CLASSES
    assert quarantine == {} and summary["source"] == "hub" and summary["validation"] == "validation"
    train = summary["splits"]["train"]
    assert (train["in"], train["ok"], train["quarantined"]) == (12, 12, 0)
    assert train["bytes"] == sum(len(row["image"]["bytes"]) for row in TRAIN[0] + TRAIN[1])
    assert train["by_class"] == dict.fromkeys(CLASSES, 4)
    assert len(list((tmp_path / "out/dataset/train").glob("*.arrow"))) == 2
    inputs = json.loads((tmp_path / "out/meta.json").read_text())["inputs"]
    assert inputs["retrieved"]["sha256"] == arrow.artefacts.sha256_file(source / "files.json")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data", "out"]


def test_the_number_of_processes_changes_no_byte(tmp_path):
    source = laid(tmp_path / "data", shards())
    build(source, tmp_path / "one", processes=1)
    build(source, tmp_path / "two", processes=2, threads=2)
    names = files_below(tmp_path / "one/dataset")
    assert names == files_below(tmp_path / "two/dataset")
    for name in names:
        assert (tmp_path / "one/dataset" / name).read_bytes() == (tmp_path / "two/dataset" / name).read_bytes(), name


def test_a_stopped_run_carries_on_from_its_whole_shards(tmp_path, monkeypatch):
    source, state = laid(tmp_path / "data", shards()), tmp_path / "state"
    written, write = [], arrow.write_shard

    def stopped(path, *rest):
        if written:
            raise KilnError("stopped", "go on")
        written.append(path)
        write(path, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(arrow, "write_shard", stopped)
        with pytest.raises(KilnError, match="stopped"):
            build(source, tmp_path / "out", "--state-folder", state)
    assert not (tmp_path / "out").exists() and len(list(state.rglob("*.arrow"))) == 1
    monkeypatch.setattr(arrow, "write_shard", lambda path, *rest: (written.append(path), write(path, *rest)))
    dataset, _, _ = build(source, tmp_path / "out", "--state-folder", state)
    assert len(set(written)) == len(written) == 3
    assert stored(dataset["train"]) == TRAIN[0] + TRAIN[1]


def test_bad_rows_are_quarantined_with_their_place(tmp_path):
    files = shards()
    rows = [dict(row) for row in TRAIN[0]]
    rows[1] = {"image": {"bytes": None, "path": "only_a_path.JPEG"}, "label": 1}
    rows[4] = {"image": {"bytes": jpeg(4)[:-90], "path": None}, "label": 1}
    rows[5] = {"image": None, "label": 2}
    rows[6] = {"image": {"bytes": jpeg(6), "path": None}, "label": 0}
    name = "data/train-00000-of-00002.parquet"
    files[name] = odd(rows)
    dataset, quarantine, summary = build(laid(tmp_path / "data", files), tmp_path / "out")
    assert quarantine == {
        f"{name}#1": "no bytes in its row",
        f"{name}#4": "truncated or corrupt: no end marker after the last scan",
        f"{name}#5": "no bytes in its row",
    }
    kept = stored(dataset["train"])
    assert [row["image"]["bytes"] for row in kept[:4]] == [rows[i]["image"]["bytes"] for i in (0, 2, 3, 6)]
    assert kept[3]["image"]["path"] == "train-00000-of-00002.parquet#6"  # every image has a name
    assert summary["reasons"] == {"no bytes in its row": 2, "truncated or corrupt": 1}
    assert summary["splits"]["train"]["quarantined"] == 3


def no_image_column(files):
    table = pa.table({"text": ["a"], "label": [0]})
    pq.write_table(table, buffer := io.BytesIO())
    files["data/train-00001-of-00002.parquet"] = buffer.getvalue()


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        (no_image_column, {}, "train-00001-of-00002.parquet: columns text: Value, label: Value; expected image: Image"),
        (
            lambda files: files.update({"data/train-00000-of-00002.parquet": parquet(TRAIN[0], image="picture")}),
            {},
            "columns picture: Image, label: ClassLabel; expected image: Image",
        ),
        (
            lambda files: files.update({"data/train-00001-of-00002.parquet": parquet(TRAIN[1], CLASSES[::-1])}),
            {},
            "train-00001-of-00002.parquet: its classes are not those",
        ),
        (
            lambda files: None,
            {"validation_split": "test"},
            "row 0 (counted from 0) has label -1, expected 0 to 2; 4 of 4 rows are so",
        ),
        (lambda files: None, {"train_split": "training"}, "no data/training-*.parquet; it has README.md, data/test-0"),
        (lambda files: None, {"validation_split": "held"}, "no data/held-*.parquet; it has"),
        (
            lambda files: files.update({"data/train-00001-of-00002.parquet": parquet(TRAIN[1])[:-40]}),
            {},
            "train-00001-of-00002.parquet: damaged parquet file",
        ),
        (
            lambda files: files.update({"data/validation-00000-of-00001.parquet": odd([{"image": None, "label": 0}])}),
            {},
            "validation: none of 1 images can be used; the first, data/validation-00000-of-00001.parquet#0: no bytes",
        ),
        (
            lambda files: files.update({"data/validation-00000-of-00001.parquet": odd([])}),
            {},
            "validation is empty",
        ),
    ],
)
def test_data_sets_that_cannot_be_used_are_refused(tmp_path, change, settings, message):
    files = shards()
    change(files)
    with pytest.raises(KilnError) as caught:
        build(laid(tmp_path / "data", files), tmp_path / "out", **settings)
    assert message in caught.value.message and caught.value.hint
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_not_as_it_was_retrieved_is_refused(tmp_path):
    source = laid(tmp_path / "data", shards())
    cut = source / "data/train-00001-of-00002.parquet"
    cut.write_bytes(cut.read_bytes()[:-1])
    with pytest.raises(KilnError, match="but files.json says"):
        build(source, tmp_path / "out")
    cut.unlink()
    with pytest.raises(KilnError, match="no such file, but files.json says"):
        build(source, tmp_path / "out")
    with pytest.raises(KilnError, match="files.json: no such file"):
        build(tmp_path, tmp_path / "out")


def test_a_shard_that_differs_from_its_rows_is_refused(tmp_path, monkeypatch):
    write = arrow.write_shard

    def wrong(path, pictures, *rest):
        write(path, [pictures[0]._replace(label=2), *pictures[1:]], *rest)

    monkeypatch.setattr(arrow, "write_shard", wrong)
    with pytest.raises(KilnError, match="stored, expected 4 of"):
        build(laid(tmp_path / "data", shards()), tmp_path / "out")


def test_memory_does_not_grow_with_the_row_group(tmp_path):
    """One row group of 160 MB, read in a process of its own."""
    rows = [{"image": {"bytes": os.urandom(400_000), "path": f"{i}"}, "label": 0} for i in range(400)]
    file = tmp_path / "large.parquet"
    file.write_bytes(parquet(rows, batch_size=400))
    assert pq.ParquetFile(file).num_row_groups == 1
    program = (
        "import pathlib, sys, psutil; from scripts.rae import parquet\n"
        "own = psutil.Process(); start = own.memory_full_info().uss\n"
        "most = max(own.memory_full_info().uss for _ in parquet.read_images(pathlib.Path(sys.argv[1]), range(400)))\n"
        "print((most - start) / 2**20)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(file)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and float(done.stdout) < 80, done.stdout + done.stderr
