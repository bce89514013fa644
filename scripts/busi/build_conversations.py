"""Chat rows for training and scoring, from our split or a published one.

Rule `busi_build_conversations`. Each side is written twice, in order of path: `<side>.json` in the published form
(image, text, answer, label), `<side>.jsonl` as chat rows. From our split (`--splits`) texts are made: training draws
one of `prompts` for each image, by a hash of seed and path; validation and test use the first. A published split
(`--train`, `--test`) is taken as it is, its own texts included: `prompts` are then not used. As it has no validation
side, whole duplicate groups are cut off its train side. Near-twins may stand on both sides of a published split; how
many groups do is counted, and warned of.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from scripts.busi import published
from scripts.busi.settings import ConversationSettings
from scripts.busi.split import SIDES, check_classes, deal, read_splits
from scripts.common import artefacts, step, tables
from scripts.common.errors import KilnError
from scripts.common.hashed import unit


def from_ours(file: Path, listed: pd.DataFrame, classes: Sequence[str], values: ConversationSettings) -> pd.DataFrame:
    """Columns path, side, label, text, answer of our split.

    Args:
        listed: index path; columns group, sha256 and label of the readable images.

    Raises:
        KilnError: an image that is not listed, or not as it was when it was split, or a group on two sides.
    """
    frame = read_splits(file, classes)
    known = listed.reindex(frame["path"])
    columns = ["sha256", "group", "label"]
    stale = (frame[columns].to_numpy() != known[columns].to_numpy()).any(axis=1)
    if stale.any():
        row = int(stale.argmax())
        raise KilnError(
            f"{file}, row {row + 1}: {frame['path'][row]}: not listed, or not with these bytes, this group, this label",
            "manifest, groups and splits are not of one run: delete the older and run again",
        )
    torn = frame.groupby("group")["side"].transform("nunique") > 1
    if torn.any():
        group = frame.loc[torn, "group"].iloc[0]
        raise KilnError(f"{file}: duplicate group {group} is on two sides", "make it anew by rule busi_split")
    train = frame["side"] == "train"
    drawn = [values.prompts[int(unit(values.seed, "prompt", path) * len(values.prompts))] for path in frame["path"]]
    frame["text"] = pd.Series(drawn, index=frame.index).where(train, values.prompts[0])
    return frame.assign(answer=frame["label"].map(dict(enumerate(classes))))


def from_published(
    files: dict[str, Path], listed: pd.DataFrame, reasons: pd.Series, classes: Sequence[str], values
) -> pd.DataFrame:
    """Columns path, side, label, text, answer of a published split, validation cut off its train side.

    Args:
        files: {"train": file, "test": file}.
        listed: as for `from_ours`.
        reasons: why each unreadable image (index: path) is.

    Raises:
        KilnError: a row for an image that is missing or unreadable, or that is on the other side too; or a class has
            too few groups in train for a validation side.
    """
    sides = {}
    for side, file in files.items():
        frame = sides[side] = published.read_matched(file, classes, [*listed.index, *reasons.index])
        for row, image, path in zip(frame["row"], frame["image"], frame["path"], strict=True):
            if pd.isna(path) or path in reasons.index:
                why = "no such image" if pd.isna(path) else f"unreadable: {reasons[path]}"
                raise KilnError(
                    f"{file}, row {row}: {image}: {why}",
                    "rule busi_audit_split lists all such rows; put the image there, or take the row out",
                )
    both = sides["train"].merge(sides["test"], on="path", suffixes=("_train", "_test"))
    if len(both):
        one = both.iloc[0]
        raise KilnError(
            f"{one['path']} is on two sides: row {one['row_train']} of {files['train']}, row {one['row_test']} of "
            f"{files['test']} ({len(both)} such images)",
            "take it out of one of them",
        )
    train = sides["train"].assign(group=listed["group"].reindex(sides["train"]["path"]).to_numpy())
    check_classes(train, classes, SIDES[:2], files["train"])
    shares = {"train": 1 - values.validation_share, "validation": values.validation_share}
    train["side"] = train["group"].map(deal(train["group"], train["label"], shares, values.seed))
    return pd.concat([train, sides["test"].assign(side="test")], ignore_index=True)


def chat_row(row) -> dict:
    """A chat row of an image: its prompt, and its answer."""
    return {
        "image": row.path,
        "sha256": row.sha256,
        "label": row.label,
        "group": row.group,
        "messages": [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": row.text}]},
            {"role": "assistant", "content": [{"type": "text", "text": row.answer}]},
        ],
    }


def describe(frame: pd.DataFrame, ok: int, classes: Sequence[str], kind: str) -> dict:
    """What summary.json says; `ok` is the number of readable images.

    Raises:
        KilnError: images do not add up.
    """
    sizes = {side: int((frame["side"] == side).sum()) for side in SIDES}
    counts = tables.reconcile("busi_build_conversations", ok, **sizes, not_in_split=ok - len(frame["path"].unique()))
    by_class = frame.groupby(["side", "label"]).size()
    groups = {side: set(frame.loc[frame["side"] == side, "group"]) for side in SIDES}
    trained = groups["train"] | groups["validation"]
    return {
        **counts,
        "split": kind,
        "images": {s: {name: int(by_class.get((s, i), 0)) for i, name in enumerate(classes)} for s in SIDES},
        "groups": {side: len(names) for side, names in groups.items()},
        "prompts": {side: int(frame.loc[frame["side"] == side, "text"].nunique()) for side in SIDES},
        "groups_on_both_sides_of_test": len(trained & groups["test"]),
        "test_images_in_such_groups": int(
            (frame["group"].isin(trained & groups["test"]) & (frame["side"] == "test")).sum()
        ),
    }


def write_side(folder: Path, side: str, frame: pd.DataFrame) -> list[Path]:
    """Write one side in both forms; the files."""
    rows = frame.rename(columns={"path": "image"})[list(published.COLUMNS)].to_dict("records")
    lines = (json.dumps(chat_row(row)) for row in frame.itertuples())  # ASCII: U+2028 and the like end no line
    outputs = [folder / f"{side}.json", folder / f"{side}.jsonl"]
    artefacts.write_json(outputs[0], rows)
    artefacts.write_text(outputs[1], "".join(f"{line}\n" for line in lines))
    return outputs


def main(argv: Sequence[str] | None = None) -> None:
    made = step.parser(__doc__, ConversationSettings)
    made.add_argument("--manifest", type=Path, required=True, help="table of rule busi_list_images")
    made.add_argument("--groups", type=Path, required=True, help="groups.parquet of rule busi_find_duplicates")
    split = made.add_mutually_exclusive_group(required=True)
    split.add_argument("--splits", type=Path, help="splits.csv of rule busi_split")
    split.add_argument("--train", type=Path, help="train side of a published split (.json, .jsonl, .csv)")
    made.add_argument("--test", type=Path, help="its test side")
    made.add_argument("--classes", nargs="+", required=True, help="names of the classes 0, 1, ...; also the answers")
    made.add_argument("--output-folder", type=Path, required=True, help="where the rows of each side go")
    args = made.parse_args(argv)
    if (args.train is None) != (args.test is None):
        made.error("--train and --test belong together")
    run(args)


def run(args: argparse.Namespace) -> None:
    """Build the rows of the split that `args` name."""
    values = step.read_settings(args)
    files = {n: getattr(args, n) for n in ("splits", "train", "test") if getattr(args, n) is not None}
    inputs = {"manifest": args.manifest, "groups": args.groups, **files}
    record = step.record(args, "scripts.busi.build_conversations", values, inputs)
    manifest = tables.read_table(args.manifest, ["path", "sha256", "status", "reason", "label"]).set_index("path")
    groups = tables.read_table(args.groups, ["path", "group"]).set_index("path")["group"]
    ok = manifest["status"] == "ok"
    listed = manifest[ok].assign(group=groups.reindex(manifest.index[ok]))
    ungrouped = listed.index[listed["group"].isna()]
    if len(ungrouped):
        raise KilnError(
            f"{args.groups}: no row for {len(ungrouped)} readable images, such as {ungrouped[0]}",
            "manifest and groups are not of one run: delete the older and run again",
        )
    if args.splits is not None:
        frame = from_ours(args.splits, listed, args.classes, values)
    else:
        frame = from_published(files, listed, manifest.loc[~ok, "reason"], args.classes, values)
    columns = ["path", "side", "label", "text", "answer"]
    frame = frame[columns].join(listed[["sha256", "group"]], on="path").sort_values("path", ignore_index=True)
    for side in SIDES:
        if not (frame["side"] == side).any():
            raise KilnError(f"{files.get(side) or args.splits}: no image on side {side}", "look at the split")
    other_label = frame["label"].to_numpy() != listed["label"].reindex(frame["path"]).to_numpy()
    summary = describe(frame, len(listed), args.classes, "ours" if args.splits is not None else "published")
    summary["label_not_folder"] = int(other_label.sum())
    outputs = []
    for side in SIDES:
        outputs += write_side(args.output_folder, side, frame[frame["side"] == side])
    outputs.append(args.output_folder / "summary.json")
    artefacts.write_json(outputs[-1], summary)
    step.log.info("%s", summary)
    if summary["groups_on_both_sides_of_test"]:
        step.log.warning(
            "%d duplicate groups are on both sides: %d test images have a near-twin in train or validation",
            summary["groups_on_both_sides_of_test"], summary["test_images_in_such_groups"],
        )  # fmt: skip
    if summary["label_not_folder"]:
        step.log.warning("%d images are labelled as another class than their folder's", summary["label_not_folder"])
    record.write(args.meta, outputs, items=len(frame))


if __name__ == "__main__":
    step.run(main)
