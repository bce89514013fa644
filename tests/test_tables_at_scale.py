"""Steps that read whole tables: how much memory a further row takes, and that a search does not compare all with all.

Resource class `light` has 2,000 MB: with 200 MB for Python and its libraries, 1,800 bytes a row leave room for a
million.
"""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from vase_fixtures import ROOT, clip_folder, picture, run

from benchmarks import tables_data
from scripts.busi import duplicates
from scripts.busi.thumbnails import Stored, Subset
from scripts.common import images, tables
from scripts.vase import link_classes, list_images, score_images
from scripts.vase.embed_images import write_embeddings
from scripts.vase.inspect_images import SCHEMA

FEW, MANY = 15_000, 90_000
BYTES_PER_ROW = 1800
VIEWS = 8
PEAK = """
import importlib, sys
importlib.import_module(sys.argv[1]).main(sys.argv[2:])
lines = open("/proc/self/status").read().splitlines()
print(next(line.split()[1] for line in lines if line.startswith("VmHWM:")))
"""


class Tables:
    """Tables of `rows` images, four shards of them; 50 vases' images are there. Each step's peak memory in bytes."""

    def __init__(self, folder: Path, rows: int):
        self.folder, self.rows, self.peaks = folder, rows, {}
        real = {f"{row // VIEWS:08X}_{row % VIEWS}_ac001001.jpg": row for row in range(50 * VIEWS)}
        listed = []
        for row in range(rows):
            name = f"{row // VIEWS:08X}_{row % VIEWS}_ac001001.jpg"
            found = {
                "sha256": hashlib.sha256(name.encode()).hexdigest(),
                "bytes": 240_000 + row,
                "width": 8,
                "height": 8,
            }
            found |= {"mode": "RGB", "format": "JPEG", "status": "ok", "reason": ""}
            if name in real:
                found = images.inspect(picture(folder / "images/renders" / name, real[name], size=8), 100)
            listed.append({"path": f"renders/{name}", "shard": f"s{row % 4:05d}", "generation": 0, **found})
        frame = pd.DataFrame(listed)
        for shard, own in frame.groupby("shard"):
            tables.write_table(folder / f"{shard}.parquet", own[SCHEMA.names], ["path"], SCHEMA)
            label = own.assign(probability=0.9, label=1)[["path", "probability", "label"]]
            tables.write_table(folder / f"classes/{shard}.parquet", label, ["path"])
        accepted = pd.DataFrame({"path": frame["path"], "accepted": True})
        tables.write_table(folder / "accepted.parquet", accepted, ["path"])
        best = [(f"{vase:08X}", f"renders/{vase:08X}_0_ac001001.jpg") for vase in range(rows // VIEWS)]
        tables.write_table(folder / "best.parquet", pd.DataFrame(best, columns=["vase", "path"]), ["vase"])
        labelled = pd.DataFrame({"sha256": ["x"], "vase": ["L"], "side": ["train"]})
        tables.write_table(folder / "labelled.parquet", labelled, ["vase"])
        tables_data.questions(folder / "questions.jsonl", rows, 50)

    def step(self, name: str, *arguments: object) -> None:
        """Run a step in a process of its own and keep its peak."""
        spread = [str(one) for one in (*arguments, "--meta", self.folder / f"{name}.meta.json", "--threads", 1)]
        command = [sys.executable, "-c", PEAK, f"scripts.vase.{name}", *spread]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        self.peaks[name] = int(done.stdout.split()[-1]) * 1024


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Both sizes, every step run."""
    made = []
    for rows in (FEW, MANY):
        folder = tmp_path_factory.mktemp(f"rows{rows}")
        own = Tables(folder, rows)
        own.step("list_images", "--shards", *sorted(folder.glob("s*.parquet")), "--output-folder", folder / "listed")
        listed = ("--manifest", folder / "listed/manifest.parquet")
        own.step("split", *listed, "--labelled", folder / "labelled.parquet", "--output-folder", folder / "split")
        classes = ("--predictions", *sorted((folder / "classes").glob("*.parquet")))
        own.step("link_classes", "--images", folder / "images", *listed, *classes, "--output-folder", folder / "linked")
        given = ("--accepted", folder / "accepted.parquet", "--best-views", folder / "best.parquet")
        asked = ("--splits", folder / "split/splits.parquet", "--questions", folder / "questions.jsonl")
        dataset = ("--images", folder / "images", *listed, *given, *asked, "--output-folder", folder / "dataset")
        own.step("build_dataset", *dataset)
        made.append(own)
    return made


@pytest.mark.parametrize("step", ["list_images", "split", "link_classes", "build_dataset"])
def test_a_million_rows_fit_into_what_the_rule_asks_for(measured, step):
    few, many = (own.peaks[step] for own in measured)
    assert (many - few) / (MANY - FEW) < BYTES_PER_ROW


def test_no_row_is_lost_on_the_way(measured):
    for own in measured:
        assert json.loads((own.folder / "listed/summary.json").read_text())["ok"] == own.rows
        links = json.loads((own.folder / "linked/classes/files.json").read_text())
        assert len(links) == own.rows
        assert list(links) == sorted(links)
        counts = json.loads((own.folder / "dataset/summary.json").read_text())["rows"]
        assert counts["in"] == own.rows == sum(counts[side] for side in ("train", "validation", "test"))


@pytest.mark.slow
def test_large_tables_do_not_tell_how_images_lie_in_shards(tmp_path):
    """As after additions and edits, against a run from scratch: at 100,000 rows, whose files have many pages."""
    rng, count, model = np.random.default_rng(0), 100_000, clip_folder(tmp_path / "clip")
    names = [f"{row // VIEWS:08X}_{row % VIEWS}_ac001001.jpg" for row in range(count)]
    facts = {"width": 8, "height": 8, "mode": "RGB", "format": "JPEG", "status": "ok", "reason": "", "generation": 0}
    frame = pd.DataFrame({
        "path": [f"renders/{name}" for name in names], "bytes": rng.integers(1, 10**6, count),
        "sha256": [hashlib.sha256(name.encode()).hexdigest() for name in names], **facts,
    })  # fmt: skip
    vectors = rng.normal(size=(count, 32)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    probability = rng.random(count).astype(np.float32)
    (tmp_path / "images").mkdir()
    made = []
    for name, shard_of in (("scratch", np.arange(count) // 4096), ("history", rng.integers(0, 27, count))):
        folder = tmp_path / name
        for shard in range(27):
            own = np.flatnonzero(shard_of == shard)
            if len(own):
                place = frame.iloc[own].assign(shard=f"s{shard:05d}")[SCHEMA.names]
                tables.write_table(folder / f"shards/s{shard:05d}.parquet", place, ["path"], SCHEMA)
                label = {"probability": probability[own], "label": (probability[own] >= 0.5).astype(np.int8)}
                tables.write_table(folder / f"classes/s{shard:05d}.parquet", place[["path"]].assign(**label), ["path"])
                (folder / "embedded").mkdir(exist_ok=True)
                write_embeddings(folder / f"embedded/s{shard:05d}.arrow", place["path"], vectors[own])
        shards, classes, embedded = (sorted((folder / part).iterdir()) for part in ("shards", "classes", "embedded"))
        run(list_images.main, "--shards", *shards, "--output-folder", folder / "listed", "--meta", folder / "l.json")
        given = (
            "--images",
            tmp_path / "images",
            "--manifest",
            folder / "listed/manifest.parquet",
            "--predictions",
            *classes,
        )
        run(link_classes.main, *given, "--output-folder", folder / "linked", "--meta", folder / "c.json")
        scored = ("--embeddings", *embedded, "--model", model, "--output", folder / "scores.parquet")
        run(score_images.main, *scored, "--meta", folder / "s.json")
        files = ("listed/manifest.parquet", "listed/summary.json", "linked/predictions.parquet", "scores.parquet")
        made.append({file: (folder / file).read_bytes() for file in files})
    assert made[0].keys() == made[1].keys() and [f for f in made[0] if made[0][f] != made[1][f]] == []


def test_few_pictures_are_compared_in_full_and_none_is_missed(tmp_path, monkeypatch):
    count, compared = 1500, 0
    thumbs = np.concatenate(list(tables_data.thumbnails(count)))
    plain = duplicates._correlation

    def counted(ours, rows, theirs, columns):
        nonlocal compared
        compared += len(rows) * len(columns)
        return plain(ours, rows, theirs, columns)

    monkeypatch.setattr(duplicates, "_correlation", counted)
    stored = Stored(tmp_path / "not yet there", thumbs, count, duplicates.VALUES)
    i, j, _ = duplicates.similar_pairs(stored, None, 0.98, block=32)
    assert compared < 0.02 * count**2 / 2
    wanted = np.nonzero(np.triu(np.corrcoef(thumbs) >= 0.98, 1))
    assert (i.tolist(), j.tolist()) == (wanted[0].tolist(), wanted[1].tolist())
    assert len(i) >= count // 10
    assert not list(tmp_path.iterdir())


def test_stored_thumbnails_are_those_that_were_made(tmp_path):
    thumbs = np.random.default_rng(0).integers(0, 256, (50, duplicates.VALUES), dtype=np.uint8)
    stored = Stored(tmp_path, iter(thumbs), 50, duplicates.VALUES)
    rows = np.array([49, 0, 7, 7])
    np.testing.assert_array_equal(stored[rows], thumbs[rows])
    np.testing.assert_array_equal(Subset(stored, rows)[np.array([2, 0])], thumbs[[7, 49]])
    assert (len(stored), len(Subset(stored, rows))) == (50, 4)
