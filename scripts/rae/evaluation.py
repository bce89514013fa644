"""The pictures that scores rest on: the validation split of a dataset folder, or what a user names by hand."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from scripts.common import artefacts, images, shards
from scripts.common.errors import KilnError
from scripts.common.images import ImageError
from scripts.rae import arrow, fid
from scripts.rae.extractors import Extractor
from scripts.rae.pictures import CentreCrop
from scripts.rae.settings import VALIDATION, DatasetSettings


class Files:
    """index -> (transformed 8-bit RGB image, label), or a KilnError as an item; `arrow.Pictures` of image files."""

    def __init__(self, files: Sequence[Path], labels: Sequence[int], transform):
        self.files, self.labels, self.transform = files, labels, transform
        self.max_pixels = DatasetSettings().max_pixels

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Any, int] | KilnError:
        try:
            image = images.open_rgb(self.files[index], self.max_pixels)
        except (ImageError, OSError) as error:
            return KilnError(
                f"{self.files[index]}: {error}",
                "mend or remove it; rule rae_build_arrow would put it into quarantine, and say so",
            )
        return self.transform(image), self.labels[index]


class Split(NamedTuple):
    """Pictures (uint8 [3,S,S], label), their names and labels in the order of rows, the side S, the split's name."""

    pictures: arrow.Pictures | Files
    names: list[str]
    labels: list[int]
    image_size: int
    name: str


def open_validation(dataset: Path, image_size: int, max_images: int | None) -> Split:
    """The validation split of a dataset folder; see `open_split`."""
    return open_split(dataset, "validation", image_size, max_images)


def open_split(dataset: Path, name: str, image_size: int, max_images: int | None) -> Split:
    """A split of a dataset folder, or `max_images` of it, in steps that reach through all classes.

    Raises:
        KilnError: no such split, or fewer than two pictures.
    """
    rows = arrow.open_split(dataset, name)
    if len(rows) < 2:
        raise KilnError(f"{dataset / name}: 1 picture; a Fréchet distance needs 2 or more", "give more images")
    names, labels = arrow.paths(rows), list(rows["label"])
    chosen = _chosen(len(rows), max_images)
    if len(chosen) < len(rows):
        rows, names, labels = rows.select(chosen), [names[i] for i in chosen], [labels[i] for i in chosen]
    return Split(arrow.Pictures(rows, CentreCrop(image_size)), names, labels, image_size, _split_name(name))


def open_pictures(data: Path, image_size: int, max_images: int | None) -> tuple[Split, str]:
    """(pictures, hash of what they are read from), or `max_images` of them, in steps through all.

    Args:
        data: a folder that `datasets.load_from_disk` reads: a split, or a dataset with validation, val, or one split
            alone; or a folder of images at any depth, or one with such a folder validation or val.

    Raises:
        KilnError: it holds no pictures, or several splits of which none is for validation.
    """
    data = Path(os.path.abspath(data))
    saved = [data] if (data / "state.json").is_file() else sorted(p.parent for p in data.glob("*/state.json"))
    if saved:
        place = saved[0] if len(saved) == 1 else _validation_of(data, [one.name for one in saved])
        digest = artefacts.sha256_file(place / "state.json")
        return open_split(place.parent, place.name, image_size, max_images), digest
    splits = [one.name for one in (data / name for name in (*VALIDATION, "train")) if one.is_dir()]
    place = _validation_of(data, splits) if splits else data
    found = shards.scan(place, images.EXTENSIONS)
    items, digest = found.items, found.digest()
    folders = [item.path.rpartition("/")[0].partition("/")[0] for item in items]
    number = {name: label for label, name in enumerate(sorted(set(folders)))}
    rows = _chosen(len(items), max_images)
    names, labels = [items[row].path for row in rows], [number[folders[row]] for row in rows]
    files = Files([place / name for name in names], labels, CentreCrop(image_size))
    return Split(files, names, labels, image_size, _split_name(place.name)), digest


def _validation_of(data: Path, splits: Sequence[str]) -> Path:
    for name in VALIDATION:
        if name in splits:
            return data / name
    raise KilnError(
        f"{data}: none of its splits {', '.join(splits)} is validation or val",
        f"name the one to score on, such as {data / splits[0]}",
    )


def _split_name(folder: str) -> str:
    return "validation" if re.search(r"(^|[^a-z])val(idation)?$", folder.lower()) else folder


def _chosen(count: int, most: int | None) -> list[int]:
    return list(range(count)) if most is None or most >= count else np.linspace(0, count - 1, most).astype(int).tolist()


def origin(split: Split, extractor: Extractor) -> fid.Origin:
    """What features of the split's pictures, or of their reconstructions, are taken of."""
    return fid.Origin(
        images=fid.image_list_hash(split.names), split=split.name,
        preprocessing=f"ADM centre crop {split.image_size}, uint8", extractor=extractor.name,
        weights=extractor.weights_sha256, label=extractor.label,
    )  # fmt: skip
