"""The pictures that scores rest on."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from scripts.common.errors import KilnError
from scripts.rae import arrow, fid
from scripts.rae.extractors import Extractor
from scripts.rae.pictures import CentreCrop


class Split(NamedTuple):
    """Pictures (uint8 [3,S,S], label), their names and labels in the order of rows, the side S in pixels, its name."""

    pictures: arrow.Pictures
    names: list[str]
    labels: list[int]
    image_size: int
    name: str


def open_validation(dataset: Path, image_size: int, max_images: int | None) -> Split:
    """The validation split of a dataset folder; see `open_pictures`."""
    return open_pictures(dataset, "validation", image_size, max_images)


def open_pictures(dataset: Path, name: str, image_size: int, max_images: int | None) -> Split:
    """A split of a dataset folder, or `max_images` of it, in steps that reach through all classes.

    Raises:
        KilnError: no such split, or fewer than two pictures.
    """
    rows = arrow.open_split(dataset, name)
    if len(rows) < 2:
        raise KilnError(f"{dataset / name}: 1 picture; a Fréchet distance needs 2 or more", "give more images")
    names, labels = arrow.paths(rows), list(rows["label"])
    if max_images is not None and max_images < len(rows):
        chosen = np.linspace(0, len(rows) - 1, max_images).astype(int).tolist()
        rows, names, labels = rows.select(chosen), [names[i] for i in chosen], [labels[i] for i in chosen]
    return Split(arrow.Pictures(rows, CentreCrop(image_size)), names, labels, image_size, name)


def origin(split: Split, extractor: Extractor) -> fid.Origin:
    """What features of the split's pictures, or of their reconstructions, are taken of."""
    return fid.Origin(
        images=fid.image_list_hash(split.names), split=split.name,
        preprocessing=f"ADM centre crop {split.image_size}, uint8", extractor=extractor.name,
        weights=extractor.weights_sha256, label=extractor.label,
    )  # fmt: skip
