"""Pipeline `coca` against the package CoCa-pytorch, at the published size.

training  see `benchmarks.coca_training`: a training step, the same padding on both sides
padding   see there: the original's padding to 512 tokens against batches of like lengths
memory    see there: what is kept for the backward pass
encoding  see `benchmarks.coca_encoding`: a slide of 40,000 tiles in chunks, against whole attention matrices
captions  see `benchmarks.coca_captions`: with cached keys and values, and without
reading   see `benchmarks.coca_reading`: memory-mapped latents against compressed HDF5

Weights, image tokens and texts are random: speed does not depend on them. The two sides must find the same, else the
exit status is 1.

    python -m benchmarks.coca --output benchmarks/output/coca.json
    python -m benchmarks.coca --device cuda --precision bf16 --compile --batch-size 32 --caption-batch 32 \
        --caption-length 100 --steps 8 --output benchmarks/output/coca_gpu.json
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import coca_captions, coca_encoding, coca_reading, coca_training, measure

PARTS = {
    "training": coca_training.compare_steps,
    "padding": coca_training.compare_padding,
    "memory": coca_training.compare_memory,
    "encoding": coca_encoding.compare,
    "captions": coca_captions.compare,
    "reading": coca_reading.compare,
}
SMALLEST = {
    "text_lengths": [8, 16], "median_length": 8, "max_length": 24, "tiles": 50_000, "chunk": 1000, "runs": 1,
    "warm": 1, "caption_length": 5, "slides": 3, "slide_tiles": 200,
}  # fmt: skip
PACKAGES = ("torch", "CoCa-pytorch", "h5py", "accelerate")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--only", choices=PARTS, help="one of the six")
    made.add_argument("--batch-size", type=int, default=4, help="of training, padding and memory; published: 4")
    made.add_argument(
        "--text-lengths", type=int, nargs="+", default=[64, 512], help="of training and memory, in tokens"
    )
    made.add_argument("--median-length", type=float, default=100.0, help="of the texts of padding, in tokens")
    made.add_argument("--max-length", type=int, default=512, help="what the original pads to")
    made.add_argument("--steps", type=int, default=2, help="batches of a run of padding")
    made.add_argument("--compile", action="store_true", help="training on both sides compiled, too")
    made.add_argument("--tiles", type=int, default=40_000, help="of the slide of encoding")
    made.add_argument("--chunk", type=int, default=4096, help="tiles that our side looks at at a time")
    made.add_argument("--caption-batch", type=int, default=4)
    made.add_argument("--caption-length", type=int, default=32, help="new tokens")
    made.add_argument("--slides", type=int, default=16, help="of reading")
    made.add_argument("--slide-tiles", type=int, default=4000, help="of each slide of reading")
    made.add_argument("--runs", type=int, default=5)
    made.add_argument("--warm", type=int, default=1, help="untimed runs of training and padding")
    made.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    made.add_argument("--device", default="cpu")
    made.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32", help="of all but encoding")
    made.add_argument("--smallest", action="store_true", help="a trial of all parts that tells nothing about speed")
    made.add_argument("--output", type=Path, help="all figures as JSON")
    args = made.parse_args(argv)
    if args.smallest:
        vars(args).update(SMALLEST)
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    torch.set_num_threads(args.threads)
    measure.run_parts(args, PARTS, PACKAGES)


if __name__ == "__main__":
    main()
