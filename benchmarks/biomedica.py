"""Pipeline `biomedica`: reading pairs from a hub over a slow link.

reading  see `benchmarks.biomedica_reading`: the hybrid reader against webdataset over curl and `datasets` streaming
stall    see `benchmarks.biomedica_training`: the share of the training time in which the demo's model waits for data
memory   see `benchmarks.biomedica_memory`: what the reader's processes hold over minutes of streaming

A hub on this machine serves drawn figures with a latency and a bandwidth of all connections together. All ways must
give the same pairs, else the exit status is 1.

    python -m benchmarks.biomedica --output benchmarks/output/biomedica.json
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import biomedica_memory, biomedica_reading, biomedica_training, measure

PARTS = {
    "reading": biomedica_reading.compare,
    "stall": biomedica_training.measure_stall,
    "memory": biomedica_memory.measure_growth,
}
SMALLEST = {
    "shards": 4, "pairs": 8, "width": 160, "height": 120, "figures": 64, "batch_size": 8, "workers": 2,
    "image_size": 32, "shuffle_buffer": 8, "prefetch": 4, "runs": 1, "minutes": 0.1,
}  # fmt: skip
PACKAGES = ("torch", "webdataset", "datasets", "huggingface-hub", "requests", "open-clip-torch", "pillow")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--only", choices=PARTS, help="one of the three")
    made.add_argument("--shards", type=int, default=16, help="a multiple of --workers")
    made.add_argument("--pairs", type=int, default=64, help="of a shard of reading and memory")
    made.add_argument("--width", type=int, default=1680, help="of pictures of reading and memory, in pixels")
    made.add_argument("--height", type=int, default=1260)
    made.add_argument("--figures", type=int, default=128, help="pairs of a shard of stall")
    made.add_argument("--latency", type=float, default=20.0, help="before each reply of the hub, in ms")
    made.add_argument("--bandwidth", type=float, default=50.0, help="of the hub, in MB/s")
    made.add_argument("--workers", type=int, default=4, help="processes that read, each one shard at a time")
    made.add_argument("--batch-size", type=int, default=64)
    made.add_argument("--image-size", type=int, default=224)
    made.add_argument("--shuffle-buffer", type=int, default=64, help="pairs of a lane that ours shuffles at a time")
    made.add_argument("--prefetch", type=int, default=64, help="pairs of a lane that ours reads ahead of them")
    made.add_argument("--minutes", type=float, default=10.0, help="of memory")
    made.add_argument("--most-seconds", type=float, default=600.0, help="for one run, which is ended then")
    made.add_argument("--runs", type=int, default=5, help="of reading and stall")
    made.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of the demo's model")
    made.add_argument("--smallest", action="store_true", help="a trial of all parts that tells nothing about speed")
    made.add_argument("--output", type=Path, help="all figures as JSON")
    args = made.parse_args(argv)
    args.device = "cpu"
    if args.smallest:
        vars(args).update(SMALLEST)
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    torch.set_num_threads(args.threads)
    measure.run_parts(args, PARTS, PACKAGES)


if __name__ == "__main__":
    main()
