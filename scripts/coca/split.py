"""Sides of the slides, by patient.

Rule `coca_split`. A patient's side follows from seed and name alone, so that new patients move no other; shares of few
patients are therefore met by chance only. Texts that repeat are counted: as negatives they would be false.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from scripts.coca.settings import SplitSettings
from scripts.coca.sides import COLUMNS, SIDES
from scripts.common import artefacts, step, tables
from scripts.common.errors import KilnError
from scripts.common.hashed import unit


def side_of(patient: str, values: SplitSettings) -> str:
    """The side of a patient."""
    place = unit(values.seed, patient)
    if place < values.test:
        return "test"
    return "validation" if place < values.test + values.validation else "train"


def check_sides(frame: pd.DataFrame, values: SplitSettings, source: Path) -> None:
    """Each side has a patient.

    Raises:
        KilnError: one has none; says how many patients there are.
    """
    patients = frame.groupby("side")["patient"].nunique()
    empty = [side for side in SIDES if side not in patients]
    if empty:
        n = frame["patient"].nunique()
        raise KilnError(
            f"{source}: no patient for {' and '.join(empty)}: there are {n} patients ({len(frame)} slides), and the "
            f"shares are {values.validation:g} for validation and {values.test:g} for test",
            "give more patients, set coca.split.validation or test higher, or another coca.split.seed",
        )


def describe(frame: pd.DataFrame) -> dict:
    """Patients, slides and texts of each side, and how many slides of the others have a text of train."""
    made = {}
    in_train = set(frame.loc[frame["side"] == "train", "text"])
    for side in SIDES:
        own = frame[frame["side"] == side]
        made[side] = {
            "patients": int(own["patient"].nunique()),
            "slides": len(own),
            "distinct_texts": int(own["text"].nunique()),
            "slides_with_repeated_text": int(own["text"].duplicated(keep=False).sum()),
        }
        if side != "train":
            made[side]["slides_with_a_text_of_train"] = int(own["text"].isin(in_train).sum())
    return made


def main(argv: Sequence[str] | None = None) -> None:
    made = step.parser(__doc__, SplitSettings)
    made.add_argument("--manifest", type=Path, required=True, help="manifest.parquet of rule coca_list_slides")
    made.add_argument("--output-folder", type=Path, required=True, help="splits.csv, summary.json")
    run(made.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    """Split the slides of `args.manifest`."""
    values = step.read_settings(args)
    record = step.record(args, "scripts.coca.split", values, {"manifest": args.manifest})
    frame = tables.read_table(args.manifest, ["slide", "patient", "text"]).sort_values("slide", ignore_index=True)
    frame["side"] = frame["patient"].map(lambda patient: side_of(patient, values))
    check_sides(frame, values, args.manifest)
    counts = tables.reconcile("coca_split", len(frame), **{side: int((frame["side"] == side).sum()) for side in SIDES})
    outputs = [args.output_folder / name for name in ("splits.csv", "summary.json")]
    artefacts.write_text(outputs[0], frame[list(COLUMNS)].to_csv(index=False))
    artefacts.write_json(outputs[1], {**counts, "sides": describe(frame)})
    step.log.info("%s", counts)
    record.write(args.meta, outputs, items=len(frame))


if __name__ == "__main__":
    step.run(main)
