"""What Snakemake's main process costs at the published sizes: a million images, ImageNet, tar shards, slides.

The files are hard links of nearly empty ones, so that folders are scanned as real ones are. Outputs are empty files
that Snakemake is told to have made (`--touch`), so that a finished state costs no training.
"""

import argparse
import os
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import workflow_runs as runs

VASES, VIEWS = 125_000, 8
CLASSES, OF_CLASS, VALIDATION = 1000, 1281, 50
SLIDES, SHARDS = 100_000, 2400
LINKS = 60_000  # of one file; ext4 allows 65,000
MOST_SECONDS, MOST_MB, MOST_JOBS = 30, 2000, 3000
OF_SHARDS = ("vase_inspect_images", "vase_classify_images", "vase_embed_images")
RECORD = '{"wall_seconds": 1}'  # of a training that may be redone without asking
SETTING_CHANGED = ("--config", "rescan=false", "set=vase.prompts.positive=[one]")
TARGETS = ("report", "vase")


def settings(images_per_shard: int) -> dict[str, Any]:
    """The published ones, with all that is optional."""
    dataset = {"captions": "data/vase/captions.json", "questions": "data/vase/questions.json"}
    vase = {"truth": "data/vase/truth.parquet", "images_per_shard": images_per_shard, "dataset": dataset}
    return {"device": "cpu", "vase": vase, "biomedica": {"compare_seeds": [0, 1]}}


def names(scale: float) -> Iterator[str]:
    """The files of all five pipelines below data/, at `scale` of the published numbers."""

    def scaled(count: int) -> range:
        return range(max(1, round(count * scale)))

    yield from ("vase/truth.parquet", "vase/captions.json", "vase/questions.json", "slides/labels.json")
    yield from (view_of(vase, view) for vase in scaled(VASES) for view in range(VIEWS))
    yield from (f"vase/labelled/{side}/F{vase:05X}_0_ac001001.jpg" for side in (0, 1) for vase in range(200))
    for folder, count in (("train", OF_CLASS), ("val", VALIDATION)):
        of_class = scaled(count)
        yield from (f"imagenet/{folder}/n{c:08d}/n{c:08d}_{k}.JPEG" for c in range(CLASSES) for k in of_class)
    yield from (f"slides/{slide:06d}.h5" for slide in scaled(SLIDES))
    yield from (f"biomedica/{shard:06d}.tar" for shard in scaled(SHARDS))
    yield from (f"busi/{name}/{k:04d}.png" for name in ("Normal", "Benign", "Malignant") for k in range(260))


def view_of(vase: int, view: int) -> str:
    """Path of a view, a thousand of them in a folder."""
    return f"vase/images/{vase // 125:04d}/{vase:06X}_{view}_ac001001.jpg"


def make_files(folder: Path, scale: float) -> int:
    """Make the files; returns how many."""
    made: set[Path] = set()
    source = folder
    for number, name in enumerate(names(scale)):
        path = folder / name
        if path.parent not in made:
            path.parent.mkdir(parents=True, exist_ok=True)
            made.add(path.parent)
        if number % LINKS:
            os.link(source, path)
        else:
            path.write_text("{}")
            source = path
    return number + 1


def finish(run: Path) -> None:
    """Have all outputs there, as files of next to no content, and recorded by Snakemake as made."""
    listed = runs.snakemake(run, "--summary", *TARGETS).text
    _, _, table = listed.partition("output_file\t")
    for line in table.splitlines()[1:]:
        path = run / line.split("\t")[0]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(RECORD if path.suffix == ".json" else "")
    runs.snakemake(run, "--touch", "--forceall", "--", *TARGETS)


def repeat(count: int, run: Path, *arguments: str) -> dict[str, Any]:
    """Medians of `count` runs, and the jobs that they planned."""
    done = [runs.snakemake(run, *arguments, "--", *TARGETS) for _ in range(count)]
    seconds, cpu, peak = zip(*(one[:3] for one in done), strict=True)
    planned = runs.jobs(done[-1].text)
    found: dict[str, Any] = {
        "seconds": statistics.median(seconds), "seconds_min": min(seconds), "seconds_max": max(seconds),
        "cpu_seconds": statistics.median(cpu), "peak_mb": max(peak), "jobs": sum(planned.values()),
        "of_shards": {rule: planned[rule] for rule in OF_SHARDS if rule in planned},
    }  # fmt: skip
    return found | {"target_met": found["seconds"] <= MOST_SECONDS and found["peak_mb"] <= MOST_MB}


def measure_plan(args: argparse.Namespace, root: Path) -> dict[str, Any]:
    """A full build's plan, a run with nothing to do, and the plan after one added image."""
    run = root / "run"
    runs.configure(run, settings(args.images_per_shard))
    found: dict[str, Any] = {"files": make_files(run / "data", args.scale)}
    found["full build, planned"] = full = repeat(args.runs, run, "--dry-run")
    full["target_met"] &= full["jobs"] < MOST_JOBS
    finish(run)
    found["nothing to do"] = idle = repeat(args.runs, run)
    (run / "data" / view_of(0, VIEWS)).write_text("new")
    found["one image added, planned"] = repeat(args.runs, run, "--dry-run")
    found["one setting changed, planned, rescan: false"] = repeat(args.runs, run, "--dry-run", *SETTING_CHANGED)
    if idle["jobs"]:
        raise SystemExit(f"{idle['jobs']} jobs ran although nothing had changed")
    return found
