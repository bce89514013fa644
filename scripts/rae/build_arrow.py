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
import errno
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

from scripts.common import artefacts, disk, progress, step, tables, workers
from scripts.common.errors import KilnError
from scripts.common.locks import writer_lock
from scripts.common.settings import of_kind, to_json
from scripts.rae import arrow, sources
from scripts.rae.arrow import Picture
from scripts.rae.settings import VALIDATION, DatasetSettings

NO_LINKS = (errno.EXDEV, errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)


class Shard(NamedTuple):
    """One shard to build: its file in the state folder, its split, and its pictures."""

    file: Path
    split: str
    pictures: list[Picture]


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
    disk.require_disk(todo[0].file, needed, "the shards")
    work = (
        joblib.delayed(arrow.write_shard)(shard.file, shard.pictures, classes, values.max_pixels, values.verify)
        for shard in todo
    )
    made = workers.pool(processes, return_as="generator_unordered")(work)
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
    if values.source == "folders":
        listing = sources.list_pictures(args.images, values, labels)
    else:
        listing = sources.list_rows(args.images, values)
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
