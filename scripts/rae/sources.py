"""What an Arrow dataset is built from: class folders of images, or rows of a data set's parquet files."""

import difflib
import fnmatch
import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from scripts.common import artefacts, images, shards
from scripts.common.errors import KilnError
from scripts.rae import parquet
from scripts.rae.arrow import Picture
from scripts.rae.settings import CUT_FROM_TRAIN, VALIDATION, DatasetSettings


class Listing(NamedTuple):
    """What will be built: the class names, the pictures of each split, and where validation comes from."""

    classes: list[str]
    splits: dict[str, list[Picture]]
    validation: str
    ignored: int
    digest: str


def list_pictures(root: Path, values: DatasetSettings, labels: Path | None) -> Listing:
    """Every image below `root`, by split.

    Raises:
        KilnError: no class folders, a class without images, an image outside the classes of train, labels that do not
            fit the images, or nothing to validate on.
    """
    train = root / values.train_split
    train = train if train.is_dir() else root
    held = _validation_folder(root, values)
    if held and train == root:
        raise KilnError(
            f"{root}: {held.name}/ is there, but no {values.train_split}/",
            "set train_split to the name of the folder to train on",
        )
    if labels and not held:
        raise KilnError(f"{root}: labels {labels} are given, but no validation folder", "set validation_split")
    classes = class_folders(train)
    found = shards.scan(train, images.EXTENSIONS)
    pictures = _by_folder(train, found.items, classes)
    empty = sorted(set(range(len(classes))) - {picture.label for picture in pictures})
    if empty:
        raise KilnError(
            f"{train / classes[empty[0]]}: no image in this class folder ({len(empty)} such folders)",
            "fill it, or remove it: each folder is a class",
        )
    scans = [found]
    if held is None:
        source = CUT_FROM_TRAIN
        pictures, validation = cut_validation(pictures, values.train_share, values.seed)
    else:
        scans.append(shards.scan(held, images.EXTENSIONS))
        if labels:
            source = f"labels of {labels.name}"
            validation = _by_labels(held, scans[1].items, read_labels(labels, classes), labels)
        elif any("/" in item.path for item in scans[1].items):
            source = "class folders"
            validation = _by_folder(held, scans[1].items, classes)
        else:
            raise KilnError(
                f"{held}: images without class folders",
                "set labels to a file of lines `name label`, or move the images into folders named by their class",
            )
    if not validation:
        raise KilnError(
            f"{root}: validation is empty: no class has two images to cut one from",
            "give more images, or a validation folder",
        )
    parts = [one.digest() for one in scans]
    digest = artefacts.sha256_text(*parts, *classes, artefacts.sha256_file(labels) if labels else "")
    return Listing(
        classes, {"train": pictures, "validation": validation}, source, sum(one.ignored for one in scans), digest
    )


def _validation_folder(root: Path, values: DatasetSettings) -> Path | None:
    names = [values.validation_split] if values.validation_split else VALIDATION
    there = next((root / name for name in names if (root / name).is_dir()), None)
    if there is None and values.validation_split:
        raise KilnError(
            f"{root / values.validation_split}: no such folder", "name the folder to validate on in validation_split"
        )
    return there


def class_folders(folder: Path) -> list[str]:
    """Names of the class folders in `folder`, sorted: a label is a name's index.

    Raises:
        KilnError: there is none.
    """
    if not folder.is_dir():
        raise KilnError(f"{folder}: no such folder", "give the folder of raw images")
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise KilnError(
            f"{folder}: no class folders",
            "expected train/CLASS/*.JPEG, or CLASS/*.JPEG, below the folder of images; for an Arrow folder set "
            "source=arrow",
        )
    return names


def _picture(folder: Path, item: shards.Item, label: int) -> Picture:
    return Picture(os.path.abspath(folder / item.path), item.path, label, item.size)


def _by_folder(folder: Path, items: Sequence[shards.Item], classes: Sequence[str]) -> list[Picture]:
    numbers = {name: label for label, name in enumerate(classes)}
    pictures = []
    for item in items:
        top, slash, _ = item.path.partition("/")
        if not slash:
            raise KilnError(f"{folder / item.path}: not in a class folder", "move it into one, or out of the folder")
        if top not in numbers:
            raise KilnError(f"{folder / top}: {top!r} is no class of train{_near(top, classes)}", "rename or remove it")
        pictures.append(_picture(folder, item, numbers[top]))
    return pictures


def _near(name: str, classes: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, classes, n=1)
    return f"; the nearest is {near[0]!r}" if near else ""


def read_labels(file: Path, classes: Sequence[str]) -> dict[str, int]:
    """{image name: label} from lines `name label`; a label is a class folder's name, or its index from 0.

    A text that is both, in data whose class folders are numbers, is a name.

    Raises:
        KilnError: an unknown class, a line of another form, or an image with two lines.
    """
    numbers = {name: label for label, name in enumerate(classes)}
    labels = {}
    for row, line in enumerate(_lines(file), start=1):
        if not line.strip():
            continue
        name, _, text = line.strip().replace("\t", " ").rpartition(" ")
        name, label = name.strip(), numbers.get(text)
        if not name:
            raise KilnError(f"{file}: row {row}: {line!r}, expected `name label`", "mend the row")
        if label is None and text.isdecimal() and int(text) < len(classes):
            label = int(text)
        if label is None:
            raise KilnError(
                f"{file}: row {row}: {text!r} is no class{_near(text, classes)}; expected one of {len(classes)} "
                f"folder names such as {classes[0]!r}, or an index from 0 to {len(classes) - 1}",
                "mend the row, or add the class to train",
            )
        if name in labels:
            raise KilnError(f"{file}: row {row}: a second label of {name!r}", "keep one of the rows")
        labels[name] = label
    return labels


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise KilnError(f"{file}: unreadable label file: {error}", "give a text file of lines `name label`") from None


def _by_labels(folder: Path, items: Sequence[shards.Item], labels: Mapping[str, int], file: Path) -> list[Picture]:
    missing = sorted(set(labels) - {item.path for item in items})
    if missing:
        raise KilnError(
            f"{file}: {missing[0]!r} is not in {folder} ({len(missing)} such rows)", "add the images or cut the rows"
        )
    without = [item.path for item in items if item.path not in labels]
    if without:
        raise KilnError(
            f"{file}: no label of {without[0]!r} in {folder} ({len(without)} such images)",
            "label them, or move them out of the folder",
        )
    return [_picture(folder, item, labels[item.path]) for item in items]


def cut_validation(pictures: Sequence[Picture], share: float, seed: int) -> tuple[list[Picture], list[Picture]]:
    """(train, validation), in the order of `pictures`.

    Of each class, round((1 - share) n) images are cut off, at least one of two or more, and never all: those whose
    paths hash lowest. An image that is added later thus moves at most one other of its class.
    """
    ranked: dict[int, list[tuple[str, int]]] = {}
    for index, picture in enumerate(pictures):
        key = hashlib.sha256(f"{seed}\0{picture.path}".encode()).hexdigest()
        ranked.setdefault(picture.label, []).append((key, index))
    cut = set()
    for own in ranked.values():
        count = min(max(round((1 - share) * len(own)), 1), len(own) - 1)
        cut.update(index for _, index in sorted(own)[:count])
    train = [picture for index, picture in enumerate(pictures) if index not in cut]
    return train, [picture for index, picture in enumerate(pictures) if index in cut]


def list_rows(root: Path, values: DatasetSettings) -> Listing:
    """Every row of the splits' parquet files below `root`.

    Raises:
        KilnError: no such files, or others than were retrieved; other columns, or classes that differ; a label that is
            no class; or nothing to validate on.
    """
    known = artefacts.read_json(root / "files.json")
    files = {"train": _parquet_files(root, values, values.train_split, known)}
    if not files["train"]:
        raise KilnError(
            f"{root}: no {values.parquet_files(values.train_split)}; it has {', '.join(sorted(known)) or 'no files'}",
            "name the split to train on in train_split, and its files in parquet",
        )
    source = CUT_FROM_TRAIN
    for name in [values.validation_split] if values.validation_split else VALIDATION:
        if found := _parquet_files(root, values, name, known):
            source, files["validation"] = name, found
            break
    if values.validation_split and source == CUT_FROM_TRAIN:
        raise KilnError(
            f"{root}: no {values.parquet_files(values.validation_split)}; it has {', '.join(sorted(known))}",
            "name the split to validate on in validation_split",
        )
    classes = parquet.read_classes(files["train"][0])
    splits = {split: _rows(own, classes) for split, own in files.items()}
    if source == CUT_FROM_TRAIN:
        splits["train"], splits["validation"] = cut_validation(splits["train"], values.train_share, values.seed)
    for split, pictures in splits.items():
        if not pictures:
            raise KilnError(f"{root}: {split} is empty", "choose another split, or give more images")
    used = [str(file.relative_to(root)) for own in files.values() for file in own]
    digest = artefacts.sha256_text(*(f"{name} {known[name]['sha256']}" for name in used), *classes)
    return Listing(classes, splits, source, 0, digest)


def _parquet_files(root: Path, values: DatasetSettings, split: str, known: Mapping[str, Mapping]) -> list[Path]:
    pattern = values.parquet_files(split)
    wanted = sorted(fnmatch.filter(known, pattern))
    for name in wanted:
        size = (root / name).stat().st_size if (root / name).is_file() else None
        if size != known[name]["bytes"]:
            raise KilnError(
                f"{root / name}: {'no such file' if size is None else f'{size} bytes'}, but files.json says "
                f"{known[name]['bytes']} bytes",
                f"delete {root / 'files.json'} and run again: what is missing is retrieved again",
            )
    return [root / name for name in wanted]


def _rows(files: Sequence[Path], classes: Sequence[str]) -> list[Picture]:
    pictures = []
    for file in files:
        if parquet.read_classes(file) != classes:
            raise KilnError(
                f"{file}: its classes are not those of the first file of train", "all files must have one ClassLabel"
            )
        labels, paths = parquet.read_listing(file, len(classes))
        place = os.path.abspath(file)
        pictures += [
            Picture(place, path or f"{file.name}#{row}", label, None, row)
            for row, (label, path) in enumerate(zip(labels, paths, strict=True))
        ]
    return pictures
