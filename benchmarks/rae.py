"""Pipeline `rae`: Arrow folders, evaluation, training steps and data loading.

arrow       see `benchmarks.rae_arrow`: rule `rae_build_arrow` against datasets.load_dataset("imagefolder").save_to_disk
evaluation  see `benchmarks.rae_evaluation`: rule `rae_reconstruct` against PNGs and torch-fidelity
training    see `benchmarks.rae_training`: on a GPU a step at the paper's shapes, eager against compiled; on a CPU the
            share of a step that is neither forward nor backward
loading     see `benchmarks.rae_loading`: the data loader against ImageFolder, and against what a step needs

Pictures are drawn JPEGs of about ImageNet's size, weights are random: speed does not depend on them. The two sides must
find the same, else the exit status is 1.

    python -m benchmarks.rae --output benchmarks/output/rae.json
    python -m benchmarks.rae --device cuda --precision bf16 --batch-size 64 --output benchmarks/output/rae_gpu.json
"""

import argparse
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import measure, rae_arrow, rae_data, rae_evaluation, rae_loading, rae_training
from scripts.common.artefacts import write_json
from scripts.rae import build_arrow, extractors

PARTS = ("arrow", "evaluation", "training", "loading")
SMALLEST = {
    "images": 40, "evaluated": 16, "runs": 1, "batch_size": 4, "processes": 2, "workers": 1, "image_size": 64,
    "extractor": extractors.RANDOM,
}  # fmt: skip
PACKAGES = ("torch", "torchvision", "transformers", "datasets", "torch-fidelity", "pillow")


def build_dataset(images: Path, out: Path, args: argparse.Namespace) -> Path:
    """The Arrow folder of `images`."""
    build_arrow.main(["--images", str(images), "--output-folder", str(out), "--threads", str(args.processes)])
    return out / "dataset"


def measure_training(args: argparse.Namespace, root: Path) -> dict:
    """What the device can show."""
    if args.device != "cpu":
        return rae_training.compare_compiled(args, root, rae_training.PAPER)
    side = rae_training.DEMO_SIDE
    rae_data.draw_images(root / "small", args.images if args.smallest else rae_training.DEMO_IMAGES, 10, side, side)
    return rae_training.phases(args, root, build_dataset(root / "small", root / "small_arrow", args))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    cores = len(os.sched_getaffinity(0))
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--only", choices=PARTS, help="one of the four")
    made.add_argument("--images", type=int, default=4000, help="files of arrow and loading; a tenth is for validation")
    made.add_argument("--evaluated", type=int, default=256, help="pictures of evaluation")
    made.add_argument("--image-size", type=int, default=256, help="of evaluation and loading, in pixels")
    made.add_argument("--extractor", choices=(extractors.INCEPTION, extractors.RANDOM), default=extractors.INCEPTION)
    made.add_argument("--batch-size", type=int, default=32)
    made.add_argument("--runs", type=int, default=5)
    made.add_argument("--threads", type=int, default=cores)
    made.add_argument("--processes", type=int, default=cores, help="of both ways to an Arrow folder")
    made.add_argument("--workers", type=int, default=cores, help="processes that decode images")
    made.add_argument("--needed", type=float, help="images/s of a step (default: that of training, where measured)")
    made.add_argument("--device", default="cpu")
    made.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32", help="of training")
    made.add_argument("--peak-tflops", type=float, default=989.0, help="of the GPU, dense bf16; that of an H200")
    made.add_argument("--smallest", action="store_true", help="a trial of all parts that tells nothing about speed")
    made.add_argument("--output", type=Path, help="all figures as JSON")
    args = made.parse_args(argv)
    if args.smallest:
        vars(args).update(SMALLEST)
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    torch.set_num_threads(args.threads)
    facts = measure.facts(args, PACKAGES)
    print(json.dumps(facts, indent=1))
    wanted = [args.only] if args.only else list(PARTS)
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        if {"arrow", "loading"} & set(wanted):
            size = rae_data.draw_images(root / "images", args.images - args.images // 10, args.images // 10)
        for name in wanted:
            own = root / name
            own.mkdir()
            if name == "arrow":
                found = rae_arrow.compare(args, own, root / "images", size)
            elif name == "evaluation":
                most = max(args.evaluated, *rae_evaluation.memory_counts(args))
                rae_data.draw_images(own / "images", rae_data.CLASSES, most)
                build_dataset(own / "images", own, args)
                found = rae_evaluation.compare(args, own)
            elif name == "training":
                found = measure_training(args, own)
                stages = found.get("stages", {}).values()
                args.needed = args.needed or max((max(s["images_per_second"].values()) for s in stages), default=None)
            else:
                found = rae_loading.compare(args, root / "images", build_dataset(root / "images", own, args))
            facts[name] = found
            print(name, json.dumps(found, indent=1), flush=True)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        write_json(args.output, facts)


if __name__ == "__main__":
    main()
