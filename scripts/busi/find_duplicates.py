"""Groups of images that show the same, and those whose labels disagree.

Rule `busi_find_duplicates`. Writes groups.parquet (a row per readable image; `group` is the first path of its group),
pairs.parquet, conflicts.png and summary.json; see `scripts/busi/duplicates.py` for what counts as the same.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from threadpoolctl import threadpool_limits

from scripts.busi import duplicates
from scripts.busi.settings import DuplicatesSettings
from scripts.common import artefacts, sheets, step, tables
from scripts.common.errors import KilnError

SHOWN, SHOWN_CONFLICTS = 18, 12  # pairs on the sheet, at most, and label conflicts among them
SIDE_BY_SIDE = 3  # pairs in a line


def group_table(frame: pd.DataFrame, groups) -> pd.DataFrame:
    """path, group, conflict, label, sha256 of each image; `groups` holds the number of each group's first image."""
    frame = frame.assign(group=frame["path"].to_numpy()[groups])
    frame["conflict"] = frame.groupby("group")["label"].transform("nunique") > 1
    return frame[["path", "group", "conflict", "label", "sha256"]]


def pair_table(frame: pd.DataFrame, pairs: pd.DataFrame) -> pd.DataFrame:
    """Pairs of numbers as pairs of paths, with their labels."""
    paths, labels = frame["path"].to_numpy(), frame["label"].to_numpy()
    return pd.DataFrame(
        {
            "first": paths[pairs["first"]],
            "second": paths[pairs["second"]],
            "similarity": pairs["similarity"],
            "identical": pairs["identical"],
            "first_label": labels[pairs["first"]],
            "second_label": labels[pairs["second"]],
        }
    )


def draw_sheet(path: Path, images: Path, pairs: pd.DataFrame, total: int, classes: Sequence[str], threshold: float):
    """A contact sheet of the conflicts, then of the closest pairs of equal label; there, equal pixels come last.

    It holds up to `SHOWN` pairs, `SIDE_BY_SIDE` in a line, and says how many it leaves out. `pairs` are those listed,
    of `total` in all.
    """
    ordered = pairs.sort_values(["similarity", "first", "second"], ascending=[False, True, True])
    torn = ordered["first_label"] != ordered["second_label"]
    conflicts = ordered[torn].head(SHOWN_CONFLICTS)
    equal = ordered[~torn].sort_values("identical", kind="stable").head(SHOWN - len(conflicts))
    rows = []
    for label, part, mark in (("different labels", conflicts, "bad"), ("equal labels", equal, None)):
        tiles = []
        for pair in part.itertuples():
            alike = "equal pixels," if pair.identical else f"{pair.similarity:.4f}"
            for one, number in ((pair.first, pair.first_label), (pair.second, pair.second_label)):
                tiles.append(sheets.Tile(images / one, f"{alike} {classes[number]}: {one}", mark))
        rows += [(label, tiles)] if tiles else []
    title = f"{total or 'No'} pairs of near-twins at similarity {threshold:g} or above"
    if len(pairs) < total:
        title += f" ({len(pairs)} listed)"
    for name, count, shown in (("different", torn.sum(), len(conflicts)), ("equal", (~torn).sum(), len(equal))):
        if total:
            title += f"; {count} with {name} labels"
            title += f" (the closest {shown} shown, {count - shown} left out)" if shown < count else ""
    sheets.contact_sheet(path, rows, title, columns=2 * SIDE_BY_SIDE, caption_lines=3, max_pixels=duplicates.NO_LIMIT)


def main(argv: Sequence[str] | None = None) -> None:
    made = step.parser(__doc__, DuplicatesSettings)
    made.add_argument("--images", type=Path, required=True, help="folder that was listed")
    made.add_argument("--manifest", type=Path, required=True, help="manifest of rule busi_list_images")
    made.add_argument("--classes", nargs="+", required=True, help="names of the labels 0, 1, ...")
    made.add_argument("--output-folder", type=Path, required=True, help="where groups, pairs and the sheet go")
    run(made.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    """Find the duplicates among the readable images of `args.manifest`.

    Raises:
        KilnError: a label has no name among the classes, or an image is gone.
    """
    values = step.read_settings(args)
    record = step.record(args, "scripts.busi.find_duplicates", values, {"manifest": args.manifest})
    frame = tables.read_table(args.manifest, ["path", "sha256", "status", "label"]).query("status == 'ok'")
    frame = frame.sort_values("path", ignore_index=True)
    nameless = frame[~frame["label"].isin(range(len(args.classes)))]
    if len(nameless):
        raise KilnError(
            f"{args.manifest}: {nameless['path'].iloc[0]} has label {nameless['label'].iloc[0]}, but --classes names "
            f"{len(args.classes)}: {', '.join(args.classes)}",
            "give the classes that the images were listed with, in their order",
        )
    with threadpool_limits(step.threads(args), "blas"):
        pictures = duplicates.read(args.images, frame["path"].tolist(), step.threads(args), args.output_folder)
        found = duplicates.find(pictures, values.threshold, values.block)
    groups, pairs = group_table(frame, found.groups), pair_table(frame, found.pairs)
    sizes = groups.groupby("group").agg(images=("path", "size"), conflict=("conflict", "first"))
    several, torn = sizes[sizes["images"] > 1], sizes[sizes["conflict"]]
    cross = pairs["first_label"] != pairs["second_label"]
    summary = {
        "images": len(groups),
        "threshold": values.threshold,
        "groups": len(sizes),
        "groups_of_several": len(several),
        "images_in_groups_of_several": int(several["images"].sum()),
        "largest_group": int(sizes["images"].max()),
        "pairs": found.total,
        "pairs_listed": len(pairs),  # fewer than `pairs` where there are very many: see `duplicates.find`
        "identical_pairs": found.identical,
        "cross_class_pairs_listed": int(cross.sum()),
        "conflict_groups": len(torn),
        "images_in_conflict_groups": int(torn["images"].sum()),
    }
    tables.reconcile(
        "busi_find_duplicates",
        len(frame),
        singletons=int((sizes["images"] == 1).sum()),
        in_groups_of_several=summary["images_in_groups_of_several"],
    )
    folder = args.output_folder
    outputs = [folder / name for name in ("groups.parquet", "pairs.parquet", "conflicts.png", "summary.json")]
    tables.write_table(outputs[0], groups, ["path"])
    tables.write_table(outputs[1], pairs, ["first", "second"])
    draw_sheet(outputs[2], args.images, pairs, found.total, args.classes, values.threshold)
    artefacts.write_json(outputs[3], summary)
    step.log.info("%s", summary)
    record.write(args.meta, outputs, items=len(frame))


if __name__ == "__main__":
    step.run(main)
