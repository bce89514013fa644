"""The search of rule `busi_find_duplicates` alone, among any number of thumbnails in a file.

Thumbnails are drawn (`tables_data.thumbnails`), not read from pictures. What is found for some of them must be what
numpy.corrcoef of them with all the others says; else the exit status is 1.

    python -m benchmarks.tables_search --pictures 100000
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits

from benchmarks import tables_data
from scripts.busi import duplicates
from scripts.busi.thumbnails import Stored

THRESHOLD = 0.98
BLOCK = 500


def by_brute_force(thumbs: Stored, sample: np.ndarray) -> set[tuple[int, int]]:
    """Pairs (first, second) of one of `sample` with any other."""
    pairs = set()
    for start in range(0, len(thumbs), BLOCK):
        rows = np.arange(start, min(start + BLOCK, len(thumbs)))
        every = np.corrcoef(thumbs[sample], thumbs[rows])[: len(sample), len(sample) :]
        near = [(sample[i], rows[j]) for i, j in zip(*np.nonzero(every >= THRESHOLD), strict=True)]
        pairs |= {(min(one), max(one)) for one in near if one[0] != one[1]}
    return pairs


def main(argv: Sequence[str] | None = None) -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--pictures", type=int, default=100_000)
    made.add_argument("--sample", type=int, default=200, help="thumbnails that are compared with all by brute force")
    made.add_argument("--threads", type=int, default=1, help="of BLAS")
    made.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where the file goes")
    args = made.parse_args(argv)
    drawn = (one for block in tables_data.thumbnails(args.pictures) for one in block)
    with threadpool_limits(args.threads, "blas"):
        thumbs = Stored(args.folder, drawn, args.pictures, duplicates.VALUES)
        pictures = duplicates.Pictures(thumbs, [str(number) for number in range(args.pictures)])
        wall, cpu = time.perf_counter(), time.process_time()
        found = duplicates.find(pictures, THRESHOLD)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        sample = np.random.default_rng(1).choice(args.pictures, min(args.sample, args.pictures), replace=False)
        wanted = by_brute_force(thumbs, sample)
    own = found.pairs[found.pairs["first"].isin(sample) | found.pairs["second"].isin(sample)]
    agrees = set(zip(own["first"], own["second"], strict=True)) == wanted
    facts = {"pairs": found.total, "search_seconds": wall, "search_cpu_seconds": cpu}
    print(json.dumps({**facts, "pairs_of_the_sample": len(wanted), "agrees": agrees}))
    sys.exit(0 if agrees else 1)


if __name__ == "__main__":
    main()
