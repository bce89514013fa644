"""The workflow itself: what reruns cost, in seconds and in memory of Snakemake's main process.

items    see `benchmarks.workflow_items`: 100,000 small images through `snakemake vase_images`, beside DVC
plan     see `benchmarks.workflow_plan`: all pipelines at their published sizes, planned

    python -m benchmarks.workflow --output benchmarks/output/workflow.json
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import measure, workflow_dvc, workflow_items, workflow_plan

PARTS = {"items": workflow_items.measure_items, "plan": workflow_plan.measure_plan}
SMALLEST = {"images": 400, "images_per_shard": 100, "image_size": 32, "scale": 0.002, "runs": 1}
PACKAGES = ("snakemake", "torch", "pandas", "pyarrow")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--only", choices=PARTS, help="one of the two")
    made.add_argument("--images", type=int, default=100_000, help="of items")
    made.add_argument("--image-size", type=int, default=64, help="that ResNet50 sees, in items")
    made.add_argument("--images-per-shard", type=int, default=4096)
    made.add_argument("--scale", type=float, default=1.0, help="of plan: share of the published numbers of files")
    made.add_argument("--runs", type=int, default=5, help="with nothing to do, and of each plan")
    made.add_argument("--smallest", action="store_true", help="a trial of both parts that tells nothing about speed")
    made.add_argument("--place", type=Path, help="folder for the files (default: the system's temporary folder)")
    made.add_argument("--output", type=Path, help="all figures as JSON")
    args = made.parse_args(argv)
    args.device = "cpu"
    if args.smallest:
        vars(args).update(SMALLEST)
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    if args.only != "plan" and not workflow_dvc.DVC.exists():
        sys.exit(f"{workflow_dvc.DVC}: no such file\nHint: make dvc")
    measure.run_parts(args, PARTS, PACKAGES, args.place)


if __name__ == "__main__":
    main()
