"""How many test images of a split have a near-twin in training, at several similarities.

Rule `busi_audit_split`. By hand, for a published split (JSON, JSON Lines or CSV rows image, text, answer, label; class
folders in any letter case; the record goes beside the report):

    python -m scripts.busi.audit_split --images DIR --train train.json --test test.json --output leakage_report.json

With `--splits` our own split is audited. Its train side is then train and validation together, since both shape the
model that the test side is scored on; twins between validation and train are counted too, as
`validation_with_twin_in_train`. Groups are made at `busi.duplicates.threshold` (0.98): at that and above nothing is
found, below it there may be pairs, and these are reported as they are.

Leaks are warned of and never an error, unless `--require-clean` says from which similarity on they are one. Pictures
with the same pixels count at every threshold, an image that is listed on both sides among them.

The report: for each threshold `test_with_twin_in_train` (test images), `pairs`, `cross_class_pairs` (by the split's
labels) and `items`; `missing` (listed, but no readable image), with `missing_reasons`; `unlisted` (images, not masks,
that the split lists nowhere); `on_both_sides`; `label_not_folder` (listed with another class than their folder's);
`counts` of rows.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from threadpoolctl import threadpool_limits

from scripts.busi import duplicates, published
from scripts.busi.list_images import image_of_mask
from scripts.busi.settings import AuditSettings, ListSettings
from scripts.busi.split import SIDES, read_splits
from scripts.busi.thumbnails import Subset
from scripts.common import artefacts, images, inspection, shards, step, tables
from scripts.common.errors import KilnError


def list_folder(folder: Path, max_pixels: int, processes: int) -> pd.DataFrame:
    """Columns path, status, reason of the images below `folder`, masks left out; see `images.inspect`.

    Raises:
        KilnError: no such folder, or no image file in it.
    """
    paths = [item.path for item in shards.scan(folder, images.EXTENSIONS).items]
    paths = [path for path in paths if image_of_mask(path) is None]
    rows = inspection.inspect_files(folder, paths, max_pixels, processes)
    return pd.DataFrame(rows, columns=["path", "status", "reason"])


def read_sides(args: argparse.Namespace, paths: Sequence[str]) -> dict[str, pd.DataFrame]:
    """{side: columns image (as listed), path (which of `paths` it is, or NA), label} of the split that `args` name."""
    if args.splits is None:
        files = {"train": args.train, "test": args.test}
        return {side: published.read_matched(file, args.classes, paths) for side, file in files.items()}
    frame = read_splits(args.splits, args.classes).rename(columns={"path": "image"})
    frame["path"] = frame["image"].where(frame["image"].isin(set(paths)), pd.NA)
    return {side: frame[frame["side"] == side] for side in SIDES}


def find_missing(sides: dict[str, pd.DataFrame], listed: pd.DataFrame) -> dict[str, str]:
    """{image as listed: why there is none}, sorted; `listed` has columns path, status, reason."""
    unreadable = listed[listed["status"] != "ok"].set_index("path")["reason"]
    reasons = {}
    for frame in sides.values():
        for image, path in zip(frame["image"], frame["path"], strict=True):
            if pd.isna(path):
                reasons[image] = "no such image" if image_of_mask(image) is None else "a mask, no image"
            elif path in unreadable.index:
                reasons[image] = f"unreadable: {unreadable[path]}"
    return dict(sorted(reasons.items()))


def find_twins(
    left: pd.DataFrame, right: pd.DataFrame, pictures: dict[str, int], read: duplicates.Pictures, threshold: float
) -> pd.DataFrame:
    """Columns test, train (paths), similarity, test_label, train_label of all near-twins, sorted by paths.

    Args:
        left: columns path, label of the test side.
        right: the same of the train side.
        pictures: number of each path among those `read`.
    """
    left, right = (side.sort_values("path", ignore_index=True) for side in (left, right))
    chosen = [[pictures[path] for path in side["path"]] for side in (left, right)]
    ours, theirs = (
        duplicates.Pictures(Subset(read.thumbnails, np.array(i, np.int64)), [read.pixels[n] for n in i]) for i in chosen
    )
    pairs = duplicates.pairs_between(ours, theirs, threshold)
    return pd.DataFrame(
        {
            "test": left["path"].to_numpy()[pairs["left"]],
            "train": right["path"].to_numpy()[pairs["right"]],
            "similarity": pairs["similarity"].to_numpy(),
            "test_label": left["label"].to_numpy()[pairs["left"]],
            "train_label": right["label"].to_numpy()[pairs["right"]],
        }
    )


def at_threshold(twins: pd.DataFrame, threshold: float, classes: Sequence[str]) -> dict:
    """What the report says of the twins at or above `threshold`."""
    near = twins[twins["similarity"] >= threshold]
    named = near.assign(
        test_label=near["test_label"].map(lambda label: classes[label]),
        train_label=near["train_label"].map(lambda label: classes[label]),
        similarity=near["similarity"].round(6),
    )
    return {
        "test_with_twin_in_train": int(near["test"].nunique()),
        "pairs": len(near),
        "cross_class_pairs": int((near["test_label"] != near["train_label"]).sum()),
        "items": named.to_dict("records"),
    }


def other_folder(frame: pd.DataFrame, classes: Sequence[str]) -> list[str]:
    """Paths whose first folder names another class than their label."""
    numbers = {name.casefold(): number for number, name in enumerate(classes)}
    named = frame["path"].map(lambda path: numbers.get(path.partition("/")[0].casefold()))
    return sorted(set(frame.loc[named.notna() & (named != frame["label"]), "path"]))


def count_rows(source: Path, side: str, frame: pd.DataFrame, found: pd.DataFrame) -> dict[str, int]:
    """Rows of a side: in = compared + missing.

    Raises:
        KilnError: the side has no row, or none of its images is there.
    """
    if frame.empty:
        raise KilnError(f"{source}: no image is on side {side}", "an audit compares train and test: look at the split")
    if found.empty:
        raise KilnError(
            f"{source}: none of its {len(frame)} images is there, such as {frame['image'].iloc[0]}",
            "--images is the folder of the class folders, which the listed paths are relative to",
        )
    missing = int((~frame["image"].isin(found["image"])).sum())
    return tables.reconcile("busi_audit_split", len(frame), compared=len(found), missing=missing)


def require_clean(twins: dict[str, pd.DataFrame], threshold: float) -> None:
    """No pair is at or above `threshold`.

    Raises:
        KilnError: one is; names it.
    """
    for between, pairs in twins.items():
        near = pairs[pairs["similarity"] >= threshold]
        if len(near):
            one = near.iloc[0]
            raise KilnError(
                f"{len(near)} pairs of near-twins at {threshold:g} or above between {between}, such as "
                f"{one['test']} and {one['train']} ({one['similarity']:.4f})",
                "split whole duplicate groups: make groups, split and audit of one run, with "
                f"busi.duplicates.threshold at most {threshold:g}",
            )


def main(argv: Sequence[str] | None = None) -> None:
    made = step.parser(__doc__, AuditSettings, by_hand=True)
    made.add_argument("--images", type=Path, required=True, help="folder with one folder of images per class")
    made.add_argument("--manifest", type=Path, help="table of rule busi_list_images; spares listing the folder")
    split = made.add_mutually_exclusive_group(required=True)
    split.add_argument("--splits", type=Path, help="splits.csv of rule busi_split")
    split.add_argument("--train", type=Path, help="train side of a published split (.json, .jsonl, .csv)")
    made.add_argument("--test", type=Path, help="its test side")
    made.add_argument(
        "--classes", nargs="+", default=list(ListSettings().classes), help="names of the labels 0, 1, ... (%(default)s)"
    )
    made.add_argument(
        "--require-clean", type=float, metavar="SIMILARITY", help="fail if there is any near-twin at it or above"
    )
    made.add_argument("--output", type=Path, required=True, help="leakage_report.json")
    args = made.parse_args(argv)
    if (args.train is None) != (args.test is None):
        made.error("--train and --test belong together")
    if args.require_clean is not None and not 0 < args.require_clean <= 1:
        made.error(f"--require-clean is a similarity in (0, 1], not {args.require_clean}")
    run(args)


def run(args: argparse.Namespace) -> None:
    """Audit the split that `args` name."""
    values = step.read_settings(args)
    files = {name: getattr(args, name) for name in ("manifest", "splits", "train", "test")}
    record = step.record(args, "scripts.busi.audit_split", values, {n: p for n, p in files.items() if p is not None})
    processes = step.threads(args)
    listed = (
        tables.read_table(args.manifest, ["path", "status", "reason"])
        if args.manifest
        else list_folder(args.images, ListSettings().max_pixels, processes)
    )
    sides = read_sides(args, listed["path"].tolist())
    missing = find_missing(sides, listed)
    found = {side: frame[~frame["image"].isin(missing)] for side, frame in sides.items()}
    counts = {s: count_rows(args.splits or files[s], s, sides[s], found[s]) for s in sides}

    paths = sorted(set(pd.concat(found.values())["path"]))
    numbers = {path: number for number, path in enumerate(paths)}
    lowest = min([*values.thresholds, *([] if args.require_clean is None else [args.require_clean])])
    trained = pd.concat([frame for side, frame in found.items() if side != "test"])
    with threadpool_limits(processes, "blas"):
        read = duplicates.read(args.images, paths, processes, args.output.parent)
        twins = {"test and train": find_twins(found["test"], trained, numbers, read, lowest)}
        if "validation" in found:
            within = find_twins(found["validation"], found["train"], numbers, read, lowest)
            twins["validation and train"] = within
    if args.require_clean is not None:
        require_clean(twins, args.require_clean)

    thresholds = {}
    for threshold in sorted(set(values.thresholds)):
        one = at_threshold(twins["test and train"], threshold, args.classes)
        if "validation" in found:
            near = within.loc[within["similarity"] >= threshold, "test"]
            one["validation_with_twin_in_train"] = int(near.nunique())
        thresholds[str(threshold)] = one
        warn = step.log.warning if one["pairs"] else step.log.info
        warn(
            "at %s: %d of %d test images have a near-twin in train; %d pairs, %d of them across classes",
            threshold, one["test_with_twin_in_train"], len(found["test"]), one["pairs"], one["cross_class_pairs"],
        )  # fmt: skip
    everything = pd.concat(found.values())
    report = {
        "thresholds": thresholds,
        "counts": counts,
        "missing": list(missing),
        "missing_reasons": missing,
        "unlisted": sorted(set(listed["path"]) - set(pd.concat(sides.values())["path"].dropna())),
        "on_both_sides": sorted(set(found["test"]["path"]) & set(trained["path"])),
        "label_not_folder": other_folder(everything, args.classes),
    }
    for name in ("missing", "unlisted", "on_both_sides", "label_not_folder"):
        if report[name]:
            step.log.warning("%s: %d images, such as %s", name.replace("_", " "), len(report[name]), report[name][0])
    artefacts.write_json(args.output, report)
    record.write(step.meta_beside(args, args.output), [args.output], items=len(paths))


if __name__ == "__main__":
    step.run(main)
