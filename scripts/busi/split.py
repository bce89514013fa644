"""Sides of the images: whole duplicate groups, stratified by class.

Rule `busi_split`. Groups of near-twins whose labels differ are kept, dropped or quarantined. Of groups with the same
images per class, a hash of seed and name says which goes where; how many go where is a small mixed-integer programme.
scikit-learn's StratifiedGroupKFold makes equal folds alone, no shares such as 0.7, 0.1 and 0.2, and its deal changes
with the order of the rows.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.optimize import Bounds, LinearConstraint, OptimizeResult, milp
from scipy.sparse import block_array, diags_array, eye_array, kron, vstack

from scripts.busi.settings import SplitSettings
from scripts.common import artefacts, step, tables
from scripts.common.errors import KilnError
from scripts.common.hashed import unit

SIDES = ("train", "validation", "test")
COLUMNS = ("path", "label", "group", "conflict", "sha256", "side")
LIMIT = 0.02  # how far the shares of a side may be off, where groups allow
LEFT_OUT = {"drop": "dropped", "quarantine": "quarantined"}
_NODES = 500  # of the search; it ends much earlier but for hundreds of different kinds of group


def deal(groups: pd.Series, labels: pd.Series, shares: Mapping[str, float], seed: int) -> pd.Series:
    """The side of each group (index: group, sorted), whatever the order of the rows.

    Each side gets an image of each class. On no side is a class's share of the images more than `LIMIT` off its share
    of the whole, nor is the side's own share off, unless no deal of whole groups achieves that; then the excess,
    summed, is least. Below the limit, images of each class, and groups of each kind, are dealt out as `shares` say.

    Args:
        groups: group of each image.
        labels: class number of each image.
        shares: of the images, {side: share}; they sum to 1.
        seed: another seed deals anew.

    Raises:
        KilnError: no deal gives each side each class.
    """
    contents = pd.crosstab(groups, labels)
    kinds, kind, copies = np.unique(contents, axis=0, return_inverse=True, return_counts=True)
    ties = np.array([[unit(seed, "kind", str(one.tolist()), side) for side in shares] for one in kinds])
    counts = _counts(kinds, copies, np.array([*shares.values()]), ties)
    sides = pd.Series(index=contents.index, dtype=object)
    for number, dealt in enumerate(counts):
        members = contents.index[kind == number]
        order = sorted(members, key=lambda group: (unit(seed, "group", group), group))
        sides[order] = np.repeat([*shares], dealt)
    return sides


def _counts(kinds: np.ndarray, copies: np.ndarray, shares: np.ndarray, ties: np.ndarray) -> np.ndarray:
    """How many groups of each kind go to each side: int64 [kinds, sides].

    Args:
        kinds: int [kinds, classes], images of each class in a group of that kind.
        copies: int [kinds], how many such groups there are.
        ties: float [kinds, sides] in [0, 1), which of equally good deals is taken.
    """
    # A deal in proportion, but for the few groups that rounding leaves over; only if that fails, any deal.
    proportional = np.floor(np.outer(copies, shares) + 1e-9).astype(np.int64)
    counts, excess = _programme(kinds, copies, shares, ties, proportional)
    if excess > 1e-6:
        freely, less = _programme(kinds, copies, shares, ties, np.zeros_like(proportional))
        counts = freely if less < excess else counts
    if counts is None:
        raise KilnError(
            "no deal of whole duplicate groups gives each side images of each class",
            "add images of the rare classes, or look at the largest groups: a higher busi.duplicates.threshold makes "
            "smaller ones",
        )
    return counts


def _programme(kinds, copies, shares, ties, least) -> tuple[np.ndarray | None, float]:
    """(counts of at least `least`, the excess over the limits), or (None, inf) if there are none."""
    (n_kinds, n_classes), n_sides = kinds.shape, len(shares)
    sizes, whole = kinds.sum(axis=1), copies @ kinds
    total = whole.sum()
    wanted_of_class, wanted = np.outer(whole, shares).ravel(), shares * total
    # Unknowns: groups by kind and side; excess of class shares by class and side, and of sides; distance by class and
    # side from what is wanted. Products with `kron(v, side)` sum over kinds for each side.
    side = eye_array(n_sides)
    of_kind = kron(eye_array(n_kinds), np.ones((1, n_sides)))
    of_class, of_side = kron(kinds.T, side), kron(sizes[None], side)
    skew = kron((kinds - np.outer(sizes, whole / total)).T, side)  # images of a class beyond its share of the side
    allowed = LIMIT * vstack([of_side] * n_classes)
    excess = -diags_array(np.tile(wanted, n_classes))
    excess_of_side, distance = -total * side, -eye_array(n_classes * n_sides)
    matrix = block_array(
        [
            [of_kind, None, None, None],
            [of_class, None, None, None],
            [skew - allowed, excess, None, None],
            [-skew - allowed, excess, None, None],
            [of_side, None, excess_of_side, None],
            [-of_side, None, excess_of_side, None],
            [of_class, None, None, distance],
            [-of_class, None, None, distance],
        ],
        format="csr",
    )
    cells = n_classes * n_sides
    upper = np.concatenate(
        [copies, np.full(cells, np.inf), np.zeros(2 * cells), wanted + LIMIT * total, LIMIT * total - wanted,
         wanted_of_class, -wanted_of_class]
    )  # fmt: skip
    lower = np.full(len(upper), -np.inf)
    lower[:n_kinds], lower[n_kinds : n_kinds + cells] = copies, 1
    slack = slice(ties.size, ties.size + cells + n_sides)
    first, last = np.zeros(matrix.shape[1]), np.full(matrix.shape[1], np.inf)
    first[: ties.size] = least.ravel()
    last[: ties.size] = (least + (copies - least.sum(axis=1))[:, None]).ravel()
    integral = np.arange(len(first)) < ties.size

    def solve(cost: np.ndarray) -> OptimizeResult:
        return milp(
            cost, integrality=integral, bounds=Bounds(first, last), constraints=LinearConstraint(matrix, lower, upper),
            options={"node_limit": _NODES, "mip_rel_gap": 1e-9},
        )  # fmt: skip

    cost = np.zeros(len(first))
    cost[slack] = 1
    solved = solve(cost)
    if solved.x is None:
        return None, np.inf
    over = solved.x[slack]
    last[slack] = np.maximum(over, 0) + 1e-9
    cost[slack], cost[slack.stop :], cost[: ties.size] = 0, 1, 1e-3 * ties.ravel()
    closer = solve(cost)
    chosen = solved if closer.x is None else closer
    return np.rint(chosen.x[: ties.size]).astype(np.int64).reshape(ties.shape), over.sum()


def check_labels(frame: pd.DataFrame, classes: Sequence[str], source: Path) -> None:
    """Labels are class numbers.

    Raises:
        KilnError: one is not; names its image.
    """
    strange = frame[~frame["label"].isin(range(len(classes)))]
    if len(strange):
        raise KilnError(
            f"{source}: {strange['path'].iloc[0]} has label {strange['label'].iloc[0]}, which is no class; expected "
            f"0 to {len(classes) - 1} ({', '.join(classes)})",
            "give --classes in the order of busi.list.classes, which the images were listed with",
        )


def check_classes(frame: pd.DataFrame, classes: Sequence[str], sides: Sequence[str], source: Path) -> None:
    """Each class needs a duplicate group for each side.

    Raises:
        KilnError: all images are of one class, or a class has too few groups; names it and its count.
    """
    present = frame["label"].unique()
    if len(present) < 2:
        what = f"all {len(frame)} images are of class {classes[present[0]]}" if len(present) else "no image"
        raise KilnError(f"{source}: {what}; a classifier needs two classes at least", "add images of other classes")
    for label, name in enumerate(classes):
        own = frame[frame["label"] == label]
        if own["group"].nunique() < len(sides):
            raise KilnError(
                f"{source}: class {name} is too small to split: {own['group'].nunique()} duplicate groups "
                f"({len(own)} images) for the sides {', '.join(sides)}",
                "add images of it; groups with label conflicts count only if busi.split.conflicts is keep",
            )


def deviations(frame: pd.DataFrame, shares: Mapping[str, float]) -> tuple[pd.DataFrame, pd.Series]:
    """In points: (each class's share of a side minus its share of the whole; each side's share minus the wanted one).

    Args:
        frame: columns side and label.

    Returns: float64 [side, label] and float64 [side].
    """
    by_class = pd.crosstab(frame["side"], frame["label"]).reindex(list(shares), fill_value=0)
    sizes = by_class.sum(axis=1)
    skew = by_class.div(sizes, axis=0) - by_class.sum() / len(frame)
    return 100 * skew, 100 * (sizes / len(frame) - pd.Series(shares))


def describe(frame: pd.DataFrame, classes: Sequence[str], shares: Mapping[str, float]) -> dict:
    """What summary.json says of the dealt images."""
    skew, off = deviations(frame, shares)
    by_class = pd.crosstab(frame["side"], frame["label"])
    side, label = skew.abs().stack().idxmax()
    largest = frame["group"].value_counts().sort_index()
    over = max(skew.abs().to_numpy().max(), off.abs().max()) > 100 * LIMIT + 1e-6
    return {
        "images": {s: {name: int(by_class.loc[s, i]) for i, name in enumerate(classes)} for s in shares},
        "groups": {s: int(frame.loc[frame["side"] == s, "group"].nunique()) for s in shares},
        "shares": {s: float((frame["side"] == s).mean()) for s in shares},
        "class_shares": {name: float((frame["label"] == i).mean()) for i, name in enumerate(classes)},
        "largest_class_share_deviation": {
            "points": float(abs(skew.loc[side, label])), "side": side, "class": classes[label],
        },
        "largest_side_share_deviation": {"points": float(off.abs().max()), "side": off.abs().idxmax()},
        "largest_group": {"group": largest.idxmax(), "images": int(largest.max())},
        "limit_points": 100 * LIMIT,
        "forced_over_limit_by_groups": bool(over),
    }  # fmt: skip


def with_reasons(left_out: pd.DataFrame, fate: str | None, classes: Sequence[str]) -> pd.DataFrame:
    """Images of groups with label conflicts, with a column reason: what became of them, and which labels differ."""
    held = {
        group: ", ".join(classes[label] for label in sorted(set(labels)))
        for group, labels in left_out.groupby("group")["label"]
    }
    reasons = [f"{fate}: labels differ ({held[group]}) in group {group}" for group in left_out["group"]]
    return left_out.assign(reason=reasons)


def read_splits(path: Path, classes: Sequence[str]) -> pd.DataFrame:
    """splits.csv of this rule: columns path, label (int64), group, conflict (bool), sha256, side.

    Raises:
        KilnError: a missing file or column, an image twice, an unknown side or label; names the row (first row = 1).
    """
    frame = tables.read_table(path, COLUMNS)
    numbers = pd.to_numeric(frame["label"], errors="coerce")
    for bad, says in (
        (frame["path"].duplicated(), "a second row for this image"),
        (~frame["side"].isin(SIDES), f"its side is none of {', '.join(SIDES)}"),
        (~numbers.isin(range(len(classes))), f"its label is no class, 0 to {len(classes) - 1}"),
        (frame["group"].isna(), "it has no group"),
    ):
        if bad.any():
            row = int(np.argmax(bad))
            raise KilnError(f"{path}, row {row + 1}: {frame['path'][row]}: {says}", "make it anew by rule busi_split")
    return frame.assign(label=numbers.astype(np.int64))


def main(argv: Sequence[str] | None = None) -> None:
    made = step.parser(__doc__, SplitSettings)
    made.add_argument("--groups", type=Path, required=True, help="groups.parquet of rule busi_find_duplicates")
    made.add_argument("--classes", nargs="+", required=True, help="names of the classes 0, 1, ...")
    made.add_argument("--output-folder", type=Path, required=True, help="splits.csv, left_out.tsv, summary.json")
    run(made.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    """Split the images of `args.groups`."""
    values = step.read_settings(args)
    record = step.record(args, "scripts.busi.split", values, {"groups": args.groups})
    frame = tables.read_table(args.groups, ["path", "label", "group", "conflict", "sha256"])
    fate = LEFT_OUT.get(values.conflicts)
    torn = frame["conflict"].astype(bool) & (fate is not None)
    kept = frame[~torn].sort_values("path", ignore_index=True)
    check_labels(frame, args.classes, args.groups)
    check_classes(kept, args.classes, SIDES, args.groups)
    left_out = with_reasons(frame[torn].sort_values("path"), fate, args.classes)
    shares = {side: getattr(values, side) for side in SIDES}
    kept = kept.assign(side=kept["group"].map(deal(kept["group"], kept["label"], shares, values.seed)))
    parts = {**{side: int((kept["side"] == side).sum()) for side in SIDES}, "dropped": 0, "quarantined": 0}
    if fate:
        parts[fate] = len(left_out)
    counts = tables.reconcile("busi_split", len(frame), **parts)
    summary = {
        **counts,
        "conflict_groups": int(frame.loc[frame["conflict"].astype(bool), "group"].nunique()),
        "conflicts": values.conflicts,
        **describe(kept, args.classes, shares),
    }
    folder = args.output_folder
    outputs = [folder / name for name in ("splits.csv", "left_out.tsv", "summary.json")]
    artefacts.write_text(outputs[0], kept[list(COLUMNS)].to_csv(index=False))
    artefacts.write_text(outputs[1], left_out[["path", "reason"]].to_csv(sep="\t", index=False))
    artefacts.write_json(outputs[2], summary)
    step.log.info("%s", counts)
    if summary["forced_over_limit_by_groups"]:
        step.log.warning(
            "shares are up to %.1f points off, more than %g: whole groups allow no less (the largest has %d images)",
            max(summary[f"largest_{kind}_share_deviation"]["points"] for kind in ("class", "side")),
            100 * LIMIT,
            summary["largest_group"]["images"],
        )
    record.write(args.meta, outputs, items=len(frame))


if __name__ == "__main__":
    step.run(main)
