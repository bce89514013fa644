"""Search for near-twins among thumbnails: `scripts.busi.duplicates.find` against plain loops over all pairs.

corrcoef  for each pair of 64x64 thumbnails np.corrcoef of the two flattened arrays, as one would write it first
dot       the same loop over float32 vectors that were centred and scaled to length 1 beforehand
ours      blocks of float32 matrix products, candidates checked in whole numbers, groups of equal pixels and chains

All get the same thumbnails and must find the same pairs. Not counted: decoding, which is the same for all.

    python -m benchmarks.busi_duplicates
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy import ndimage
from threadpoolctl import threadpool_limits

from benchmarks.measure import processor
from scripts.busi import duplicates
from scripts.common.artefacts import write_json

THRESHOLD = 0.98
TARGET = 10.0  # times the loop by np.corrcoef


def draw(count: int) -> duplicates.Pictures:
    """Smooth random thumbnails; every tenth is a near-twin of the one before it."""
    rng = np.random.default_rng(0)
    made = ndimage.gaussian_filter(rng.normal(size=(count, duplicates.SIDE, duplicates.SIDE)), (0, 3, 3))
    made = 128 + 40 * made / made.std(axis=(1, 2), keepdims=True)
    twins = np.arange(9, count, 10)
    made[twins] = made[twins - 1] + rng.normal(0, 4, made[twins].shape)
    grey = np.clip(np.rint(made), 0, 255).astype(np.uint8).reshape(count, -1)
    return duplicates.Pictures(grey, [str(number) for number in range(count)])


def corrcoef(pictures: duplicates.Pictures) -> list[tuple[int, int]]:
    """The plain loop."""
    grey, found = pictures.thumbnails, []
    for i in range(len(grey)):
        for j in range(i + 1, len(grey)):
            if np.corrcoef(grey[i], grey[j])[0, 1] >= THRESHOLD:
                found.append((i, j))
    return found


def dot(pictures: duplicates.Pictures) -> list[tuple[int, int]]:
    """The plain loop of one who normalises first."""
    units = pictures.thumbnails.astype(np.float32)
    units -= units.mean(axis=1, keepdims=True)
    units /= np.linalg.norm(units, axis=1, keepdims=True)
    found = []
    for i in range(len(units)):
        for j in range(i + 1, len(units)):
            if np.dot(units[i], units[j]) >= THRESHOLD:
                found.append((i, j))
    return found


def ours(pictures: duplicates.Pictures) -> list[tuple[int, int]]:
    """The house's search."""
    pairs = duplicates.find(pictures, THRESHOLD).pairs
    return list(zip(pairs["first"].tolist(), pairs["second"].tolist(), strict=True))


def compare(images: int = 780, runs: int = 5, threads: int = 1) -> dict:
    """Seconds of interleaved runs after a warm-up of ours, and the ratios of the medians to ours."""
    pictures, paths = draw(images), {"corrcoef": corrcoef, "dot": dot, "ours": ours}
    seconds: dict[str, list[float]] = {name: [] for name in paths}
    found = {}
    with threadpool_limits(threads, "blas"):
        ours(pictures)
        for _ in range(runs):
            for name, path in paths.items():
                start = time.perf_counter()
                found[name] = path(pictures)
                seconds[name].append(time.perf_counter() - start)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    paired = {n: [a / b for a, b in zip(seconds[n], seconds["ours"], strict=True)] for n in ("corrcoef", "dot")}
    return {
        "header": {
            "alternative": "a loop over all pairs of 64x64 thumbnails, by np.corrcoef or by np.dot of unit vectors",
            "images": images,
            "pairs_compared": images * (images - 1) // 2,
            "dtype": "uint8 thumbnails; float64 (corrcoef), float32 (dot), float32 then whole numbers (ours)",
            "threads": threads,
            "device": f"{processor()}, {threads} of {os.cpu_count()} cores",
            "numpy": np.__version__,
        },
        "seconds": seconds,
        "ratio": {n: {"median": median[n] / median["ours"], "min": min(p), "max": max(p)} for n, p in paired.items()},
        "near_twins": len(found["ours"]),
        "agrees": found["corrcoef"] == found["dot"] == found["ours"],
        "target": TARGET,
        "target_met": median["corrcoef"] / median["ours"] >= TARGET,
    }


def table_line(facts: dict) -> str:
    """A line for the table in benchmarks/README.md."""
    header, cells = facts["header"], []
    for name in ("corrcoef", "dot"):
        ratio = facts["ratio"][name]
        cells.append(f"{ratio['median']:.3g} ({ratio['min']:.3g} to {ratio['max']:.3g})")
    times = [f"{statistics.median(facts['seconds'][name]):.2f} s" for name in ("corrcoef", "dot", "ours")]
    return f"| {header['device']}, {header['images']} images | {' | '.join(times)} | {' | '.join(cells)} |"


def main(argv: Sequence[str] | None = None) -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--images", type=int, default=780, help="thumbnails")
    made.add_argument("--runs", type=int, default=5, help="timed runs of each, interleaved")
    made.add_argument("--threads", type=int, default=1, help="BLAS threads; the loops use one in any case")
    made.add_argument("--output", type=Path, help="write the figures here too (.json)")
    args = made.parse_args(argv)
    facts = compare(args.images, args.runs, args.threads)
    print(json.dumps(facts, indent=2))
    print("\n| device | corrcoef | dot | ours | ratio to corrcoef (min to max) | ratio to dot (min to max) |")
    print(table_line(facts))
    if args.output:
        write_json(args.output, facts)
    sys.exit(0 if facts["agrees"] else 1)


if __name__ == "__main__":
    main()
