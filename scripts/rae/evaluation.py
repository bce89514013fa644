"""The validation pictures that scores rest on."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from scripts.rae import arrow, fid
from scripts.rae.extractors import Extractor
from scripts.rae.pictures import CentreCrop


class Split(NamedTuple):
    """Pictures (uint8 [3,S,S], label), their names and labels in the order of rows, the side S, the split's name."""

    pictures: arrow.Pictures
    names: list[str]
    labels: list[int]
    image_size: int
    name: str


def open_validation(dataset: Path, image_size: int, max_images: int | None) -> Split:
    """The validation split of a dataset folder, or its first `max_images`, in steps that reach through all classes."""
    rows = arrow.open_split(dataset, "validation")
    names, labels = arrow.paths(rows), list(rows["label"])
    if max_images is not None and max_images < len(rows):
        chosen = np.linspace(0, len(rows) - 1, max_images).astype(int).tolist()
        rows, names, labels = rows.select(chosen), [names[i] for i in chosen], [labels[i] for i in chosen]
    return Split(arrow.Pictures(rows, CentreCrop(image_size)), names, labels, image_size, "validation")


def origin(split: Split, extractor: Extractor) -> fid.Origin:
    """What features of the split's pictures, or of their reconstructions, are taken of."""
    return fid.Origin(
        images=fid.image_list_hash(split.names), split=split.name,
        preprocessing=f"ADM centre crop {split.image_size}, uint8", extractor=extractor.name,
        weights=extractor.weights_sha256, label=extractor.label,
    )  # fmt: skip
