"""Rule `rae_build_arrow` against the library's own way to an Arrow folder, and against a plain copy of the files.

alternative  datasets.load_dataset("imagefolder", data_dir=..., num_proc=P).save_to_disk(..., num_proc=P), with a fresh
             cache folder each run
ours         rule `rae_build_arrow`, with verify=headers and verify=full, P processes
copy         cp -r

Clocks start after the imports of the main process, on both sides; our worker processes start, and import, within them.
The files lie in the page cache. We flush what we write to the disk, the alternative and `cp` do not.
"""

import argparse
import hashlib
import shutil
import statistics
import subprocess
import sys
from collections import Counter
from pathlib import Path

import datasets

from benchmarks import measure

TARGET = 2.0

THEIRS = """
import json, time
import datasets
start = time.perf_counter()
made = datasets.load_dataset("imagefolder", data_dir={images!r}, num_proc={processes})
made.save_to_disk({out!r}, num_proc={processes})
print("\\n" + json.dumps(time.perf_counter() - start))
"""
OURS = """
import json, time
from scripts.rae import build_arrow
start = time.perf_counter()
build_arrow.main(["--images", {images!r}, "--output-folder", {out!r}, "--threads", "{processes}",
                  "--settings", "images_per_shard={per_shard}", "--settings", "processes={processes}",
                  "--settings", "verify={verify}"])
print("\\n" + json.dumps(time.perf_counter() - start))
"""


def contents(folder: Path) -> dict[str, Counter]:
    """{split: how often each (class name, hash of the file's bytes) is in it} of an Arrow folder."""
    found = {}
    for split, rows in datasets.load_from_disk(str(folder)).items():
        names = rows.features["label"].names
        raw = rows.cast_column("image", datasets.Image(decode=False))
        found[split] = Counter((names[one["label"]], hashlib.sha256(one["image"]["bytes"]).hexdigest()) for one in raw)
    return found


def on_disk(images: Path) -> dict[str, Counter]:
    """The same of the folder of images."""
    found: dict[str, Counter] = {}
    for path in images.rglob("*.JPEG"):
        key = (path.parent.name, hashlib.sha256(path.read_bytes()).hexdigest())
        found.setdefault(path.parents[1].name, Counter())[key] += 1
    return found


def compare(args: argparse.Namespace, root: Path, images: Path, size: int) -> dict:
    """Interleaved runs of all ways; ends the program if images or labels differ."""
    out, count = root / "made", sum(1 for _ in images.rglob("*.JPEG"))
    per_shard = max(1, min(2000, -(-count // (8 * args.processes))))
    whole: dict[str, list[measure.Done]] = {"alternative": [], "headers": [], "full": []}

    def convert(name: str, checked: bool = False) -> float:
        values = {"images": str(images), "out": str(out), "processes": args.processes, "per_shard": per_shard}
        fresh = {"HF_HOME": str(root / "cache"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(root / "cache/data")}
        code = THEIRS.format(**values) if name == "alternative" else OURS.format(**values, verify=name)
        done = measure.program(code, fresh)
        place = out if name == "alternative" else out / "dataset"
        if checked and contents(place) != on_disk(images):
            sys.exit(f"{name}: other images or labels than those of the folders")
        whole[name].append(done)
        shutil.rmtree(out)
        shutil.rmtree(root / "cache", ignore_errors=True)
        return done.found

    def copy() -> float:
        seconds = measure.seconds_of(lambda: subprocess.run(["cp", "-r", images, out], check=True), measure.CPU)
        shutil.rmtree(out)
        return seconds

    for name in whole:
        convert(name, checked=True)
        whole[name].clear()
    copy()
    seconds = measure.interleave({**{name: lambda name=name: convert(name) for name in whole}, "copy": copy}, args.runs)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    found = measure.ratio(seconds["alternative"], seconds["headers"])
    return {
        "alternative": 'datasets.load_dataset("imagefolder", data_dir=..., num_proc=P).save_to_disk(..., num_proc=P)',
        "images": count,
        "bytes": size,
        "processes": args.processes,
        "images_per_shard": per_shard,
        "seconds": seconds,
        "images_per_second": {name: count / value for name, value in median.items()},
        **found,
        "target": TARGET,
        "target_met": found["ratio"] >= TARGET,
        "over_plain_copy": median["headers"] / median["copy"],
        "full_over_headers": median["full"] / median["headers"],
        "with_start_and_imports": {n: statistics.median(one.seconds for one in runs) for n, runs in whole.items()},
        "peak_mb": {n: max(one.peak_mb for one in runs) for n, runs in whole.items()},
    }
