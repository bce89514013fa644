"""The slides of a manifest with their sides."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from scripts.common import tables
from scripts.common.errors import KilnError

SIDES = ("train", "validation", "test")
COLUMNS = ("slide", "patient", "side")


def read_splits(path: Path) -> pd.DataFrame:
    """splits.csv of rule coca_split: columns slide, patient, side, all text.

    Raises:
        KilnError: a missing file or column, a slide twice, or an unknown side; names the row (first row = 1).
    """
    frame = tables.read_table(path, COLUMNS)
    for bad, says in (
        (frame["slide"].duplicated(), "a second row for this slide"),
        (~frame["side"].isin(SIDES), f"its side is none of {', '.join(SIDES)}"),
    ):
        if bad.any():
            row = int(np.argmax(bad))
            raise KilnError(f"{path}, row {row + 1}: {frame['slide'][row]}: {says}", "make it anew by rule coca_split")
    return frame


def read(manifest: Path, splits: Path, columns: Sequence[str] = ()) -> pd.DataFrame:
    """Columns slide, text, patient, side, and `columns` of the manifest; sorted by slide.

    Raises:
        KilnError: a table is unreadable, or the two hold different slides.
    """
    slides, sides = tables.read_table(manifest, ["slide", "text", *columns]), read_splits(splits)
    odd = set(slides["slide"]) ^ set(sides["slide"])
    if odd:
        first = min(odd)
        where = splits if first in set(slides["slide"]) else manifest
        raise KilnError(
            f"{where}: no slide {first} ({len(odd)} slides are in one table alone)",
            "manifest and splits are not of one run: run coca_split again",
        )
    return slides.merge(sides, on="slide", validate="one_to_one").sort_values("slide", ignore_index=True)


def only(slides: pd.DataFrame, side: str) -> pd.DataFrame:
    """The rows of one side.

    Raises:
        KilnError: there are none.
    """
    chosen = slides[slides["side"] == side].reset_index(drop=True)
    if chosen.empty:
        raise KilnError(f"no slide on the {side} side", "give splits.csv of rule coca_split")
    return chosen
