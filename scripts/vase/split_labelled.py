"""Sides of the labelled vases, which the classifier is fitted, chosen and scored on.

Rule `vase_split_labelled`. It looks at labelled images alone, so that new raw images never move a
labelled vase, and never retrain the classifier. `split` deals the other vases around these.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from scripts.common import artefacts, step, tables
from scripts.common.errors import KilnError
from scripts.vase.settings import SplitSettings
from scripts.vase.sides import SIDES, attribute_strata, deal, group_by_identity, shares


def check_sides(labelled: pd.DataFrame) -> None:
    """Each side needs images of both classes.

    Raises:
        KilnError: names the side and the class.
    """
    for side in SIDES:
        for label in (0, 1):
            if not ((labelled["side"] == side) & (labelled["label"] == label)).any():
                vases = labelled.loc[labelled["label"] == label, "vase"].nunique()
                raise KilnError(
                    f"no labelled image of class {label} on side {side} (class {label} has {vases} vases in all)",
                    "label more vases, or change vase.split.seed or the shares",
                )


def check_labels(labelled: pd.DataFrame) -> None:
    """Byte-identical images must carry one label.

    Raises:
        KilnError: names a pair that does not.
    """
    torn = labelled.groupby("sha256")["label"].transform("nunique") > 1
    if torn.any():
        one = labelled[torn].sort_values(["sha256", "label"])
        paths = ", ".join(one.loc[one["sha256"] == one["sha256"].iloc[0], "path"])
        raise KilnError(
            f"{labelled.loc[torn, 'sha256'].nunique()} identical images carry both labels, first: {paths}",
            "delete one of each pair from the labelled folder",
        )


def label_strata(frame: pd.DataFrame) -> pd.Series:
    """A stratum per group: whether most of its images are of class 0, of class 1, or it is even."""
    high = frame.groupby("group")["label"].mean()
    kinds = np.select([high < 0.5, high > 0.5], ["mostly 0", "mostly 1"], "even")
    return pd.Series(kinds, index=high.index)


def main(argv: Sequence[str] | None = None) -> None:
    made = step.parser(__doc__, SplitSettings)
    made.add_argument("--labelled", type=Path, required=True, help="table of rule vase_list_labelled")
    made.add_argument("--attributes", type=Path, help="table by vase with the columns to stratify by")
    made.add_argument("--output-folder", type=Path, required=True, help="where labelled.parquet goes")
    run(made.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    """Split the vases of `args.labelled`."""
    values = step.read_settings(args)
    inputs = {"labelled": args.labelled} | ({"attributes": args.attributes} if args.attributes else {})
    record = step.record(args, "scripts.vase.split_labelled", values, inputs)
    frame = tables.read_table(args.labelled, ["path", "sha256", "vase", "status", "label"]).query("status == 'ok'")
    check_labels(frame)
    groups = group_by_identity(frame["vase"], frame["sha256"])
    frame = frame.assign(group=frame["vase"].map(groups))
    strata = label_strata(frame) + attribute_strata(groups, args.attributes, values.stratify)
    sides = deal(strata, shares(values), values.seed)
    frame = frame.assign(side=frame["group"].map(sides))
    check_sides(frame)
    outputs = [args.output_folder / name for name in ("labelled.parquet", "summary.json")]
    tables.write_table(outputs[0], frame[["path", "sha256", "vase", "group", "label", "side"]], ["path"])
    vases = frame.drop_duplicates("vase")
    by_side = {side: int((vases["side"] == side).sum()) for side in SIDES}
    images = frame.groupby(["side", "label"]).size()
    summary = {
        "vases": tables.reconcile("vase_split_labelled", len(vases), **by_side),
        "images": {side: {str(label): int(images[side, label]) for label in (0, 1)} for side in SIDES},
        "tied_by_identical_images": int((vases["vase"] != vases["group"]).sum()),
    }
    artefacts.write_json(outputs[1], summary)
    step.log.info("%s", summary)
    record.write(args.meta, outputs, items=len(vases))


if __name__ == "__main__":
    step.run(main)
