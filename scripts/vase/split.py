"""The side (train, validation, test) of every vase, decided once for all later steps.

Rule `vase_split`. A vase that is labelled, or shares a byte-identical image with one that is, stands
where `split_labelled` put it; the others are dealt by the same seed and shares.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from scripts.common import artefacts, step, tables
from scripts.common.errors import KilnError
from scripts.vase.settings import SplitSettings
from scripts.vase.sides import SIDES, attribute_strata, deal, group_by_identity, shares


def fixed_sides(labelled: pd.DataFrame, groups: pd.Series) -> pd.Series:
    """Side of each group that holds a labelled vase (index: group).

    Args:
        labelled: columns vase and side.
        groups: group of each vase (index: vase).

    Raises:
        KilnError: raw images tie labelled vases of different sides together.
    """
    known = labelled.drop_duplicates("vase").assign(group=lambda f: f["vase"].map(groups))
    torn = known.groupby("group")["side"].nunique() > 1
    if torn.any():
        group = torn.index[torn][0]
        members = known.loc[known["group"] == group].sort_values("vase")
        names = ", ".join(f"{m.vase} ({m.side})" for m in members.head(4).itertuples())
        raise KilnError(
            f"a raw vase has images byte-identical to labelled vases of different sides: {names}",
            "see duplicates.tsv of vase_list_images: give these vases one name, or delete the doubled images",
        )
    return known.drop_duplicates("group").set_index("group")["side"]


def main(argv: Sequence[str] | None = None) -> None:
    made = step.parser(__doc__, SplitSettings)
    made.add_argument("--manifest", type=Path, required=True, help="manifest of rule vase_list_images")
    made.add_argument("--labelled", type=Path, required=True, help="labelled.parquet of rule vase_split_labelled")
    made.add_argument("--attributes", type=Path, help="table by vase with the columns to stratify by")
    made.add_argument("--output-folder", type=Path, required=True, help="where splits.parquet goes")
    run(made.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    """Split the vases of `args.manifest` around those of `args.labelled`."""
    values = step.read_settings(args)
    inputs = {"manifest": args.manifest, "labelled": args.labelled}
    inputs |= {"attributes": args.attributes} if args.attributes else {}
    record = step.record(args, "scripts.vase.split", values, inputs)
    raw = tables.read_table(args.manifest, ["sha256", "vase", "status"]).query("status == 'ok'")
    labelled = tables.read_table(args.labelled, ["sha256", "vase", "side"])
    both = pd.concat([raw[["sha256", "vase"]], labelled[["sha256", "vase"]]], ignore_index=True)
    groups = group_by_identity(both["vase"], both["sha256"])
    fixed = fixed_sides(labelled, groups)
    strata = attribute_strata(groups, args.attributes, values.stratify)
    sides = pd.concat([fixed, deal(strata.drop(fixed.index), shares(values), values.seed)])
    vases = pd.DataFrame({"vase": groups.index, "group": groups.to_numpy()})
    vases = vases.assign(
        stratum=vases["group"].map(strata),
        labelled=vases["vase"].isin(set(labelled["vase"])),
        side=vases["group"].map(sides),
    )
    outputs = [args.output_folder / name for name in ("splits.parquet", "summary.json")]
    tables.write_table(outputs[0], vases, ["vase"])
    by_side = {side: int((vases["side"] == side).sum()) for side in SIDES}
    summary = {
        "vases": tables.reconcile("vase_split", len(vases), **by_side),
        "labelled": int(vases["labelled"].sum()),
        "tied_by_identical_images": int((vases["vase"] != vases["group"]).sum()),
    }
    artefacts.write_json(outputs[1], summary)
    step.log.info("%s", summary)
    record.write(args.meta, outputs, items=len(vases))


if __name__ == "__main__":
    step.run(main)
