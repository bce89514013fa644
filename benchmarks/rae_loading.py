"""Pictures per second that training's data loader gives, against what a step needs and against torchvision.

alternative  torchvision.datasets.ImageFolder with Resize(1.5 x side, bicubic), RandomCrop(side), ToTensor
ours         the loader of rule `rae_train_autoencoder`: Arrow rows, the same transform, crops seeded by picture

Both have the same workers and batch. A run is an epoch, the start of the workers included; files lie in the page cache.
"""

import argparse
import math
import statistics
import sys
from pathlib import Path

import numpy as np
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from benchmarks import measure
from scripts.common.data_order import EpochBatches
from scripts.common.listed_images import collate
from scripts.rae import arrow
from scripts.rae.autoencoder_training import TrainingPictures

CHECKED = 16


def compare(args: argparse.Namespace, images: Path, dataset: Path) -> dict:
    """Interleaved epochs of both; ends the program if they read other pictures."""
    rows = arrow.open_split(dataset, "train")
    ours = TrainingPictures(rows, args.image_size, 42)
    theirs = ImageFolder(
        images / "train",
        transforms.Compose(
            [
                transforms.Resize(int(1.5 * args.image_size), transforms.InterpolationMode.BICUBIC),
                transforms.RandomCrop(args.image_size),
                transforms.ToTensor(),
            ]
        ),
    )
    places = {Path(path).name: index for index, path in enumerate(arrow.paths(rows))}
    for path, label in theirs.samples[:CHECKED]:
        image, ours_label = ours.pictures[places[Path(path).name]]
        if label != ours_label or not np.array_equal(theirs.loader(path), image):
            sys.exit(f"{path}: another picture or label than that of the Arrow folder")
    size = min(args.batch_size, len(ours))
    count = len(ours) // size * size

    def epoch(loader: DataLoader) -> float:
        seen = []
        seconds = measure.seconds_of(lambda: seen.extend(len(batch[0]) for batch in loader), measure.CPU)
        if sum(seen) != count:
            sys.exit(f"an epoch of {sum(seen)} pictures, expected {count}")
        return seconds

    def loader_of_ours() -> DataLoader:
        batches = EpochBatches(len(ours), size, 42, 0)
        return DataLoader(ours, batch_sampler=batches, num_workers=args.workers, collate_fn=collate)

    def loader_of_theirs() -> DataLoader:
        return DataLoader(theirs, batch_size=size, shuffle=True, drop_last=True, num_workers=args.workers)

    ways = {"alternative": loader_of_theirs, "ours": loader_of_ours}
    for make in ways.values():
        epoch(make())
    seconds = measure.interleave({name: lambda make=make: epoch(make()) for name, make in ways.items()}, args.runs)
    rates = {name: count / statistics.median(values) for name, values in seconds.items()}
    own = rates["ours"] / max(args.workers, 1)
    needed = {"images_per_second": args.needed, "workers": math.ceil(args.needed / own)} if args.needed else None
    return {
        "alternative": "torchvision ImageFolder, Resize, RandomCrop, ToTensor",
        "images": count, "image_size": args.image_size, "batch_size": size, "workers": args.workers,
        "seconds": seconds, "images_per_second": rates, "images_per_second_and_worker": own,
        **measure.ratio(seconds["alternative"], seconds["ours"]), "a_step_needs": needed,
    }  # fmt: skip
