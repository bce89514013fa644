"""`snakemake vase_images` on many small files: a first run, and what it costs after additions, removals and edits.

ResNet50 on small pictures and a tiny CLIP, both in the real classes with random weights. Which files a run opened is
taken from their access times, which are set back before it; how many images a step computed from its meta.json.
"""

import argparse
import csv
import hashlib
import io
import json
import os
import statistics
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import open_clip
import torch
from PIL import Image
from safetensors.torch import save_file

from benchmarks import workflow_dvc as dvc
from benchmarks import workflow_runs as runs
from benchmarks.workflow_plan import VIEWS, view_of
from scripts.common.artefacts import write_json
from scripts.vase.clip import CONFIG, WEIGHTS

ADDED, REMOVED, REWRITTEN, RENAMED = 1000, 100, 10, 10  # of 100,000; of fewer, as large a share
MOST_SECONDS, MOST_MB, MOST_SHARE = 15, 1000, 0.05
PER_IMAGE = ("inspect_images", "classify_images", "embed_images")
LABELLED, SIDE = 200, 64
REHASH = ("--config", "rehash=true", "--")
CLIP = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
}


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """Small models, one thread a job."""
    return {
        "device": "cpu",
        "resources": {name: {"threads": 1, "mem_mb": 1000} for name in ("light", "cpu", "gpu_single")},
        "vase": {
            "images_per_shard": args.images_per_shard,
            "classifier": {"weights": None, "image_size": args.image_size, "epochs": 1, "batch_size": 32, "workers": 0},
            "classify": {"workers": 0},
            "clip": {"model": "data/clip", "workers": 0},
        },
    }


def draw(path: Path, seed: Iterable[int]) -> None:
    """A picture of coloured squares, about 2 KB."""
    squares = np.random.default_rng([*seed]).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(np.kron(squares, np.ones((SIDE // 8, SIDE // 8, 1), np.uint8))).save(buffer, "JPEG", quality=90)
    path.write_bytes(buffer.getvalue())


def draw_all(folder: Path, numbers: range) -> None:
    """Pictures of these numbers, eight views of a vase after another."""
    paths = [folder / view_of(*divmod(number, VIEWS)) for number in numbers]
    for parent in {path.parent for path in paths}:
        parent.mkdir(parents=True, exist_ok=True)
    parts = np.array_split(np.arange(len(paths)), 4 * joblib.cpu_count())
    joblib.Parallel(n_jobs=-1)(
        joblib.delayed(lambda rows: [draw(paths[row], (0, numbers[row])) for row in rows])(part.tolist())
        for part in parts
    )


def make_clip(folder: Path) -> None:
    """A tiny CLIP, in a folder that open_clip loads."""
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    state = open_clip.CLIP(**CLIP).state_dict()
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / WEIGHTS)
    write_json(folder / CONFIG, {"model_cfg": CLIP, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.25] * 3}})


def images_of(run: Path) -> list[Path]:
    """All raw images, sorted."""
    return sorted((run / "data/vase/images").rglob("*.jpg"))


def set_back(paths: Iterable[Path]) -> None:
    """Access times of long ago: the next opening sets them anew."""
    for path in paths:
        os.utime(path, ns=(0, path.stat().st_mtime_ns))


def computed(run: Path, since_ns: int) -> dict[str, int]:
    """How many images each step with a job for each shard computed since then, by its records."""
    found = {}
    for step in PER_IMAGE:
        metas = (run / "results/vase" / step).rglob("*meta.json")
        made = [json.loads(path.read_text()) for path in metas if path.stat().st_mtime_ns >= since_ns]
        found[step] = sum(one["items_computed"] for one in made)
    return found


def step_seconds(run: Path, since_ns: int) -> dict[str, float]:
    """CPU seconds of each step in the jobs that ended since then, start and imports included."""
    found: dict[str, float] = {}
    for path in (run / "results/benchmarks/vase").rglob("*.tsv"):
        if path.stat().st_mtime_ns >= since_ns:
            step = path.relative_to(run / "results/benchmarks/vase").parts[0].removesuffix(".tsv")
            with path.open() as rows:
                found[step] = found.get(step, 0) + sum(
                    float(row["cpu_time"]) for row in csv.DictReader(rows, delimiter="\t")
                )
    return {step: round(seconds, 1) for step, seconds in sorted(found.items())}


def update(run: Path, *arguments: str) -> dict[str, Any]:
    """Run the workflow: its cost, its jobs, how many images its steps computed, and how many files were opened."""
    paths = images_of(run)
    set_back(paths)
    since = time.time_ns()
    done = runs.snakemake(run, *arguments, "vase_images")
    return {
        **done.facts(), "jobs": sum(runs.jobs(done.text).values()), "computed": computed(run, since),
        "files_opened": sum(path.stat().st_atime_ns > 0 for path in images_of(run)),
        "cpu_seconds_of_steps": step_seconds(run, since),
    }  # fmt: skip


def tables(run: Path) -> dict[str, str]:
    """{path: sha256} of all tables that do not depend on how images lie in shards."""
    folder = run / "results/vase"
    found = [p for ending in ("parquet", "tsv", "csv") for p in folder.rglob(f"*.{ending}")]
    wanted = sorted(p for p in found if p.relative_to(folder).parts[0] not in PER_IMAGE)
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in wanted}


def copy_of_raw(run: Path, place: Path, args: argparse.Namespace) -> Path:
    """A run folder without results, on hard links of the same files."""
    runs.configure(place, settings(args))
    for path in (p for p in (run / "data").rglob("*") if p.is_file()):
        link = place / path.relative_to(run)
        link.parent.mkdir(parents=True, exist_ok=True)
        os.link(path, link)
    return place


def idle(args: argparse.Namespace, run: Path, tracked: Path) -> dict[str, Any]:
    """Runs with nothing to do, ours and DVC's in turns."""
    ways = {
        "ours": lambda: runs.snakemake(run, "vase_images"),
        "dvc status": lambda: dvc.run(tracked, "status"),
        "dvc repro": lambda: dvc.run(tracked, "repro"),
    }
    done = [{name: way() for name, way in ways.items()} for _ in range(args.runs)]
    if any("Nothing to be done" not in one["ours"].text for one in done):
        raise SystemExit("jobs ran although nothing had changed")
    return {
        name: {
            "seconds": statistics.median(one[name].seconds for one in done),
            "seconds_all": [round(one[name].seconds, 2) for one in done],
            "cpu_seconds": statistics.median(one[name].cpu_seconds for one in done),
            "peak_mb": max(one[name].peak_mb for one in done),
        }
        for name in ways
    }


def edit(run: Path, share: float) -> dict[str, int]:
    """Remove, rewrite in place and rename files, each kind spread over the folder; how many of each."""
    counts = {"removed": REMOVED, "rewritten": REWRITTEN, "renamed": RENAMED}
    counts = {name: max(1, round(count * share)) for name, count in counts.items()}
    paths = images_of(run)
    chosen = [paths[i] for i in np.linspace(0, len(paths) - 1, sum(counts.values())).astype(int)]
    removed, rewritten = chosen[: counts["removed"]], chosen[counts["removed"] :][: counts["rewritten"]]
    for path in removed:
        path.unlink()
    for number, path in enumerate(rewritten):
        draw(path, (1, number))
    for number, path in enumerate(chosen[-counts["renamed"] :]):
        path.rename(path.with_name(f"E{number:05X}_0_ac001001.jpg"))
    return counts


def only_changed(edited: dict[str, Any]) -> bool:
    """Whether each step computed the changed images and no others; results of a renamed one are found by content."""
    inspected, *others = (edited["computed"][step] for step in PER_IMAGE)
    return inspected == edited["rewritten"] + edited["renamed"] and set(others) == {edited["rewritten"]}


def hide_an_edit(run: Path) -> None:
    """Give one file another content of the same size and time of change, which no scan can see."""
    path = images_of(run)[0]
    content, facts = path.read_bytes(), path.stat()
    path.write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))


def reshard(run: Path) -> dict[str, Any]:
    """Compact the shards, and what the next run then computes."""
    before = len(list((run / "results/vase/embed_images").glob("*.arrow")))
    compacted = runs.program([sys.executable, "-m", "scripts.common.reshard", "--directory", str(run)], runs.ROOT)
    found = {"reshard": compacted.facts(), "run after it": update(run)}
    return found | {"shards": [before, len(list((run / "results/vase/embed_images").glob("*.arrow")))]}


def measure_items(args: argparse.Namespace, root: Path) -> dict[str, Any]:
    """All stages, one after another; what must be equal or counted and is not ends with exit status 1."""
    run, tracked, share = root / "run", root / "dvc", args.images / 100_000
    runs.configure(run, settings(args))
    draw_all(run / "data", range(args.images))
    for number in range(LABELLED):
        path = run / f"data/vase/labelled/{number % 2}/F{number:05X}_0_ac001001.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        draw(path, (2, number))
    make_clip(run / "data/clip")
    found: dict[str, Any] = {"first run": update(run)}
    first = found["first run"]
    dvc.prepare(run / "data", tracked)
    found["dvc: first add"] = dvc.run(tracked, "add", "data").facts()
    dvc.run(tracked, "repro")
    found["nothing to do"] = waiting = idle(args, run, tracked)
    waiting["target_met"] = waiting["ours"]["seconds"] <= MOST_SECONDS and waiting["ours"]["peak_mb"] <= MOST_MB

    added = max(1, round(ADDED * share))
    draw_all(run / "data", range(args.images, args.images + added))
    found["images added"] = more = {"images": added} | update(run)
    more["share_of_first"] = more["seconds"] / first["seconds"]
    more["cpu_share_of_first"] = more["cpu_seconds"] / first["cpu_seconds"]
    more["target_met"] = set(more["computed"].values()) == {added} and more["share_of_first"] <= MOST_SHARE
    dvc.follow(run / "data", tracked)
    found["dvc: add again"] = dvc.run(tracked, "add", "data").facts()

    counts = edit(run, share)
    found["images removed, rewritten, renamed"] = edited = counts | update(run)
    fresh = copy_of_raw(run, root / "fresh", args)
    runs.snakemake(fresh, "vase_images")
    ours, theirs = tables(run), tables(fresh)
    edited["tables"], edited["tables_that_differ"] = len(theirs), [n for n in theirs if ours.get(n) != theirs[n]]
    edited["target_met"] = only_changed(edited) and not edited["tables_that_differ"]

    hide_an_edit(run)
    unseen = update(run)
    found["one file edited, size and time kept"] = hidden = {"run": unseen, "rehash": update(run, *REHASH)}
    hidden["target_met"] = unseen["jobs"] == 0 and set(hidden["rehash"]["computed"].values()) == {1}
    found["reshard"] = again = reshard(run)
    again["target_met"] = set(again["run after it"]["computed"].values()) == {0} and tables(run).keys() == ours.keys()
    return found
