"""Sides (train, validation, test) by vase, for the classifier and for every later step.

Rule `vase_split`. Vases that share a byte-identical image stay together. Vases are dealt within
strata (the labels of their images, and the columns that settings name), in an order that a hash of
seed and name gives: a vase that comes or goes in one stratum moves no vase of another.
"""

import argparse
import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from scripts.common import artefacts, step, tables
from scripts.common.errors import KilnError
from scripts.vase.settings import SplitSettings

SIDES = ("train", "validation", "test")


def group_by_identity(vases: pd.Series, hashes: pd.Series) -> pd.Series:
    """For each vase (index) the first name of the vases that it is tied to by identical images."""
    names = np.sort(vases.unique())
    vase_code = pd.Categorical(vases, categories=names).codes
    hash_code = pd.factorize(hashes)[0]
    count = len(names) + hash_code.max() + 1
    edges = coo_array((np.ones(len(vases)), (vase_code, len(names) + hash_code)), shape=(count, count))
    _, component = connected_components(edges, directed=False)
    first = pd.Series(names).groupby(component[: len(names)]).transform("min")
    return pd.Series(first.to_numpy(), index=names)


def deal(groups: pd.Series, strata: pd.Series, shares: Sequence[float], seed: int) -> pd.Series:
    """A side for each group (index: group name), stratum by stratum.

    Within a stratum of n groups in hash order, group i goes where (i + u) / n falls among the shares'
    cumulative cuts; u in [0, 1) is a hash of the stratum, so that small strata round without bias.

    Args:
        groups: group names, unique.
        strata: stratum of each group, same index.
        shares: of train, validation and test; they sum to 1.
        seed: another seed deals anew.
    """
    cuts = np.cumsum(shares)[:-1]
    sides = pd.Series(index=groups.index, dtype=object)
    for stratum, members in groups.groupby(strata):
        order = sorted(members.index, key=lambda g: (_unit(seed, "group", groups[g]), groups[g]))
        position = (np.arange(len(order)) + _unit(seed, "stratum", str(stratum))) / len(order)
        sides[order] = np.array(SIDES)[np.searchsorted(cuts, position, side="right")]
    return sides


def _unit(seed: int, kind: str, name: str) -> float:
    digest = hashlib.sha256(f"{seed}\0{kind}\0{name}".encode()).digest()
    return int.from_bytes(digest[:8]) / 2**64


def strata_of(frame: pd.DataFrame, attributes: pd.DataFrame | None) -> pd.Series:
    """A stratum per group: which labels it has, as low, high, mixed or none, and its attributes."""
    low = frame["label"].eq(0).groupby(frame["group"]).sum()
    high = frame["label"].eq(1).groupby(frame["group"]).sum()
    kinds = np.select(
        [(low == 0) & (high == 0), low > high, high > low], ["unlabelled", "mostly 0", "mostly 1"], "even"
    )
    strata = pd.Series(kinds, index=low.index)
    if attributes is not None:
        first = frame.drop_duplicates("group").set_index("group")["vase"]
        for column in attributes.columns:
            strata = strata + " | " + first.map(attributes[column]).reindex(strata.index).fillna("?").astype(str)
    return strata


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


def main(argv: Sequence[str] | None = None) -> None:
    made = step.parser(__doc__, SplitSettings)
    made.add_argument("--manifest", type=Path, required=True, help="manifest of rule vase_list_images")
    made.add_argument("--labelled", type=Path, required=True, help="table of rule vase_list_labelled")
    made.add_argument("--attributes", type=Path, help="table by vase with the columns to stratify by")
    made.add_argument("--output-folder", type=Path, required=True, help="where splits.parquet goes")
    run(made.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    """Split the vases of `args.manifest` and `args.labelled`."""
    values = step.read_settings(args)
    inputs = {"manifest": args.manifest, "labelled": args.labelled}
    if args.attributes:
        inputs["attributes"] = args.attributes
    record = step.record(args, "scripts.vase.split", values, inputs)
    columns = ["path", "sha256", "vase", "status"]
    raw = tables.read_table(args.manifest, columns).assign(label=-1)
    labelled = tables.read_table(args.labelled, [*columns, "label"])
    check_labels(labelled.query("status == 'ok'"))
    frame = pd.concat([raw, labelled], ignore_index=True).query("status == 'ok'")
    frame = frame.assign(group=frame["vase"].map(group_by_identity(frame["vase"], frame["sha256"])))
    attributes = None
    if values.stratify:
        if not args.attributes:
            raise KilnError("vase.split.stratify names columns, but there is no table", "set vase.attributes")
        attributes = tables.read_table(args.attributes, ["vase", *values.stratify]).set_index("vase")
    names = pd.Series(np.sort(frame["group"].unique()))
    groups = pd.Series(names.to_numpy(), index=names.to_numpy())
    strata = strata_of(frame, attributes).reindex(groups.index)
    sides = deal(groups, strata, (values.train, values.validation, values.test), values.seed)
    vases = frame.groupby("vase").agg(group=("group", "first"), labelled=("label", lambda x: int((x >= 0).sum())))
    vases = vases.assign(side=vases["group"].map(sides), stratum=vases["group"].map(strata)).reset_index()
    labelled = frame[frame["label"] >= 0].assign(side=lambda f: f["group"].map(sides))
    check_sides(labelled)
    outputs = [args.output_folder / name for name in ("splits.parquet", "labelled.parquet", "summary.json")]
    tables.write_table(outputs[0], vases[["vase", "group", "stratum", "labelled", "side"]], ["vase"])
    tables.write_table(outputs[1], labelled[["path", "sha256", "vase", "label", "side"]], ["path"])
    by_side = {side: int((vases["side"] == side).sum()) for side in SIDES}
    summary = {
        "vases": tables.reconcile("vase_split", len(vases), **by_side),
        "labelled_images": {
            side: {str(k): int(v) for k, v in part["label"].value_counts().sort_index().items()}
            for side, part in labelled.groupby("side")
        },
        "vases_tied_by_identical_images": int((vases["vase"] != vases["group"]).sum()),
    }
    artefacts.write_json(outputs[2], summary)
    step.log.info("%s", summary)
    record.write(args.meta, outputs, items=len(vases))


if __name__ == "__main__":
    step.run(main)
