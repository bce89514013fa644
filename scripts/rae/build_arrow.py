"""Images as an Arrow dataset with the splits train and validation; files are kept byte for byte.

Rule `rae_build_arrow`. Below the folder of images lie train/CLASS/* and validation/ or val/, which holds class folders
or, with a label file, images alone; a folder of nothing but class folders has a share of each class cut off for
validation. What is no whole image goes to quarantine.tsv. Shards are built in parallel and survive a killed run. A
data set of the hub (source=hub) is read from the parquet files of rule `retrieve_dataset`, a shard for each; it becomes
Arrow, too, for parquet cannot be read row by row. An existing Arrow folder (source=arrow) is checked, and linked to. By
hand:
`python -m scripts.rae.build_arrow --images DIR --output-folder OUT`; then `datasets.load_from_disk("OUT/dataset")`.
"""

import argparse
import difflib
import errno
import fnmatch
import hashlib
import itertools
import os
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import joblib
import numpy as np
import pandas as pd

from scripts.common import artefacts, images, preflight, progress, shards, step, tables
from scripts.common.errors import KilnError
from scripts.common.locks import writer_lock
from scripts.common.settings import of_kind, to_json
from scripts.rae import arrow, parquet
from scripts.rae.arrow import Picture
from scripts.rae.settings import VALIDATION, DatasetSettings

NO_LINKS = (errno.EXDEV, errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)


class Listing(NamedTuple):
    """What will be built: the class names, the pictures of each split, and where validation comes from."""

    classes: list[str]
    splits: dict[str, list[Picture]]
    validation: str
    ignored: int
    digest: str


class Shard(NamedTuple):
    """One shard to build: its file in the state folder, its split, and its pictures."""

    file: Path
    split: str
    pictures: list[Picture]


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
        source = "cut from train"
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
    parts = [shards.ShardTable({"all": one.items}).digest("all") for one in scans]
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
    source = "cut from train"
    for name in [values.validation_split] if values.validation_split else VALIDATION:
        if found := _parquet_files(root, values, name, known):
            source, files["validation"] = name, found
            break
    if values.validation_split and source == "cut from train":
        raise KilnError(
            f"{root}: no {values.parquet_files(values.validation_split)}; it has {', '.join(sorted(known))}",
            "name the split to validate on in validation_split",
        )
    classes = parquet.read_classes(files["train"][0])
    splits = {split: _rows(own, classes) for split, own in files.items()}
    if source == "cut from train":
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


def plan_shards(state: Path, splits: Mapping[str, Sequence[Picture]], per_shard: int) -> list[Shard]:
    """The shards of all splits, in order, to be built below `state`: of `per_shard` files, or of one parquet file."""
    planned = []
    for split, pictures in splits.items():
        if pictures[0].row is None:
            chunks = [list(pictures[start : start + per_shard]) for start in range(0, len(pictures), per_shard)]
        else:
            chunks = [list(own) for _, own in itertools.groupby(pictures, key=lambda picture: picture.file)]
        names = arrow.shard_names(len(chunks))
        planned += [Shard(state / split / name, split, chunk) for name, chunk in zip(names, chunks, strict=True)]
    return planned


def build_shards(planned: Sequence[Shard], classes: Sequence[str], values: DatasetSettings, processes: int) -> None:
    """Build the shards that are not yet whole, one per process at a time.

    Raises:
        KilnError: too little room on the disk, or a file changed since it was listed.
    """
    todo = [shard for shard in planned if arrow.read_record(shard.file) is None]
    step.log.info("%d of %d shards to build, %d processes", len(todo), len(planned), processes)
    if not todo:
        return
    needed = sum(_size(shard) for shard in todo)
    preflight.require_disk(todo[0].file, needed, "the shards")
    work = (
        joblib.delayed(arrow.write_shard)(shard.file, shard.pictures, classes, values.max_pixels, values.verify)
        for shard in todo
    )
    made = joblib.Parallel(n_jobs=processes, return_as="generator_unordered")(work)
    for _ in progress.bar(made, "shards", total=len(todo)):
        pass


def _size(shard: Shard) -> int:
    if shard.pictures[0].row is None:
        return sum(picture.size for picture in shard.pictures)
    return os.path.getsize(shard.pictures[0].file)


def check_shards(planned: Sequence[Shard], classes: Sequence[str], root: Path) -> tuple[dict, list[tuple]]:
    """Compare images and bytes of each class in the shards, as stored, with those that were listed (or read).

    Returns: {split: counts}, and the quarantined as rows (split, path below `root`, reason).

    Raises:
        KilnError: they do not add up, or a split has no readable image.
    """
    counts, bad = {}, []
    for split in dict.fromkeys(shard.split for shard in planned):
        own = [shard for shard in planned if shard.split == split]
        want = np.zeros((2, len(classes)), dtype=np.int64)
        reasons = []
        for shard in own:
            made = arrow.read_record(shard.file)
            quarantined = dict(made["quarantined"])
            for index, picture in enumerate(shard.pictures):
                if index in quarantined:
                    reasons.append((split, os.path.relpath(picture.place, os.path.abspath(root)), quarantined[index]))
                else:
                    size = made["sizes"][index] if picture.size is None else picture.size
                    want[:, picture.label] += 1, size
        have = np.stack(arrow.count_by_class([shard.file for shard in own], len(classes)))
        for label in np.flatnonzero((want != have).any(axis=0))[:1]:
            raise KilnError(
                f"{own[0].file.parent}: class {classes[label]}: {have[0, label]} images of {have[1, label]} bytes "
                f"stored, expected {want[0, label]} of {want[1, label]}",
                "delete the state folder and run again; if this stays, report it",
            )
        total = sum(len(shard.pictures) for shard in own)
        counts[split] = _counts(split, classes, have, total, quarantined=len(reasons))
        if not have[0].any():
            raise KilnError(
                f"{split}: none of {total} images can be used; the first, {reasons[0][1]}: {reasons[0][2]}",
                "look at the images, and at max_pixels",
            )
        bad += reasons
    return counts, bad


def _counts(split: str, classes: Sequence[str], have: np.ndarray, total: int, **parts: int) -> dict:
    return {
        **tables.reconcile(f"rae_build_arrow {split}", total, ok=int(have[0].sum()), **parts),
        "bytes": int(have[1].sum()),
        "by_class": dict(zip(classes, have[0].tolist(), strict=True)),
    }


def _place(source: Path, target: Path) -> None:
    """A hard link, which needs no room, or a copy where the file system has none."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        shutil.copyfile(source, target)


def build(args: argparse.Namespace, values: DatasetSettings, labels: Path | None, record) -> tuple[dict, list[tuple]]:
    """Build the dataset from folders of images or parquet files; (summary, quarantined)."""
    in_folders = values.source == "folders"
    listing = list_pictures(args.images, values, labels) if in_folders else list_rows(args.images, values)
    record.facts["listing"] = listing.digest
    numerics = to_json(of_kind(values, "numerics"))
    # what training_state.fingerprint gives, without its torch
    state = args.state_folder / artefacts.sha256_text(numerics, listing.digest, record.code)[:16]
    processes = min(values.processes, step.threads(args))
    with writer_lock(state, owner="rae_build_arrow"):
        for left in state.rglob(".*.tmp"):
            left.unlink()
        planned = plan_shards(state, listing.splits, values.images_per_shard)
        build_shards(planned, listing.classes, values, processes)
        counts, bad = check_shards(planned, listing.classes, args.images)
        with artefacts.atomic_folder(args.output_folder / "dataset") as folder:
            hashes: dict[str, dict[str, str]] = {}
            for shard in planned:
                (folder / shard.split).mkdir(exist_ok=True)
                _place(shard.file, folder / shard.split / shard.file.name)
                hashes.setdefault(shard.split, {})[shard.file.name] = arrow.read_record(shard.file)["sha256"]
            arrow.describe_splits(folder, hashes, arrow.make_features(listing.classes))
    reasons = Counter(reason.split(":")[0] for _, _, reason in bad)
    return {
        "source": values.source,
        "validation": listing.validation,
        "classes": len(listing.classes),
        "not_images_by_name": listing.ignored,
        "reasons": dict(sorted(reasons.items())),
        "splits": counts,
    }, bad


def link_arrow(source: Path, folder: Path, values: DatasetSettings) -> dict:
    """Check an existing Arrow folder and make `folder` of links to its shards; the summary.

    Raises:
        KilnError: a split is missing or of another schema, or the two differ in their classes.
    """
    there = next((name for name in VALIDATION if (source / name).is_dir()), VALIDATION[0])
    names = {"train": values.train_split, "validation": values.validation_split or there}
    opened = {split: arrow.open_split(source, name) for split, name in names.items()}
    classes = opened["train"].features["label"].names
    if opened["validation"].features["label"].names != classes:
        raise KilnError(f"{source}: train and validation differ in their classes", "give both the same ClassLabel")
    counts: dict[str, dict] = {}
    hashes: dict[str, dict[str, str]] = {}
    final = folder.parent.resolve() / folder.name
    with artefacts.atomic_folder(folder) as temporary:
        for split, dataset in opened.items():
            files = [Path(one["filename"]).resolve() for one in dataset.cache_files]
            have = np.stack(arrow.count_by_class(files, len(classes)))
            counts[split] = _counts(split, classes, have, len(dataset))
            (temporary / split).mkdir()
            hashes[split] = {}
            named = list(zip(files, arrow.shard_names(len(files)), strict=True))
            for file, name in progress.bar(named, f"hash {split}"):
                (temporary / split / name).symlink_to(os.path.relpath(file, final / split))
                hashes[split][name] = artefacts.sha256_file(file)
        arrow.describe_splits(temporary, hashes, opened["train"].features)
    return {"source": "arrow", "validation": names["validation"], "classes": len(classes), "splits": counts}


def main(argv: Sequence[str] | None = None) -> None:
    made = step.parser(__doc__, DatasetSettings, by_hand=True)
    made.add_argument("--images", type=Path, required=True, help="folder of images, of Arrow or of parquet files")
    made.add_argument("--labels", type=Path, help="label file of a flat validation folder (default: setting labels)")
    made.add_argument("--output-folder", type=Path, required=True, help="where dataset/ and its companions go")
    made.add_argument("--state-folder", type=Path, help="where finished shards lie meanwhile (default: beside it)")
    run(made.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    """Build, or check and link, the dataset of `args.images`."""
    values = step.read_settings(args)
    out = args.output_folder
    args.meta = args.meta or out / "meta.json"
    args.state_folder = args.state_folder or out.with_name(f".{out.name}.state")
    labels = args.labels or (Path(values.labels) if values.labels else None)
    inputs = {"labels": labels} if labels else {}
    inputs |= {"retrieved": args.images / "files.json"} if values.source == "hub" else {}
    record = step.record(args, "scripts.rae.build_arrow", values, inputs)
    if values.source == "arrow":
        summary, bad = link_arrow(args.images, out / "dataset", values), []
    else:
        summary, bad = build(args, values, labels, record)
    outputs = [out / "dataset/files.json", out / "quarantine.tsv", out / "summary.json"]
    quarantined = pd.DataFrame(bad, columns=["split", "path", "reason"])
    artefacts.write_text(outputs[1], quarantined.to_csv(sep="\t", index=False))
    artefacts.write_json(outputs[2], summary)
    record.write(args.meta, outputs, items=sum(one["in"] for one in summary["splits"].values()))
    for split, one in summary["splits"].items():
        step.log.info("%s: %s", split, {name: number for name, number in one.items() if name != "by_class"})
    if values.source != "arrow":
        shutil.rmtree(args.state_folder, ignore_errors=True)


if __name__ == "__main__":
    step.run(main)
