"""Parquet tables whose bytes depend on their rows alone, never on the order in which they were made."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from scripts.common.artefacts import atomic_path
from scripts.common.errors import KilnError

TEXT = ("path", "vase", "slide", "patient")  # columns that stay text as they stand: 007 is no number, NA is no gap
GAPS = ("", "NA", "N/A", "n/a", "NaN", "nan", "NULL", "null", "None")


def write_table(path: Path, frame: pd.DataFrame, sort_by: Sequence[str], schema: pa.Schema | None = None) -> None:
    """Write `frame`, sorted by columns that identify a row, as Parquet, atomically.

    Raises:
        KilnError: two rows share the same key.
    """
    keys = list(sort_by)
    doubled = frame.duplicated(keys)
    if doubled.any():
        first = frame.loc[doubled, keys].iloc[0].to_dict()
        raise KilnError(f"{path}: two rows for {first}", "each row needs a key of its own; look at the inputs")
    ordered = frame.sort_values(keys, kind="stable").reset_index(drop=True)
    table = pa.Table.from_pandas(ordered, schema=schema, preserve_index=False)
    with atomic_path(path) as temporary:  # a chunk ends a page, and chunks tell of what the rows were put together from
        pq.write_table(table.replace_schema_metadata(None).combine_chunks(), temporary)


def read_table(path: Path, columns: Sequence[str]) -> pd.DataFrame:
    """The named columns of a Parquet or CSV table.

    Raises:
        KilnError: the file is missing or unreadable, or lacks a column.
    """
    try:
        if path.suffix.lower() == ".csv":
            gaps = {name: GAPS for name in pd.read_csv(path, nrows=0).columns if name not in TEXT}
            frame = pd.read_csv(path, dtype=dict.fromkeys(TEXT, str), na_values=gaps, keep_default_na=False)
            there = list(frame.columns)
        else:
            there = pq.read_schema(path).names
            frame = pd.read_parquet(path, columns=[name for name in there if name in columns])
    except FileNotFoundError:
        raise KilnError(f"{path}: no such table", "check the path, or run the rule that makes it") from None
    except (pa.ArrowException, ValueError, OSError) as error:
        hint = "mend it; if a rule made it, delete it and run again"
        raise KilnError(f"{path}: unreadable table: {error}", hint) from None
    missing = [name for name in columns if name not in frame.columns]
    if missing:
        raise KilnError(
            f"{path}: no column {', '.join(missing)}; it has {', '.join(there)}", "check which table this is"
        )
    return frame[list(columns)]


def read_rows(path: Path, rows: np.ndarray) -> pd.DataFrame:
    """Rows of a Parquet table, by their numbers.

    Raises:
        pyarrow.ArrowException: it is unreadable.
        IndexError: it has no such row.
    """
    return pq.read_table(path).take(pa.array(rows)).to_pandas()


def reconcile(where: str, total: int, **parts: int) -> dict[str, int]:
    """{"in": total, part: count, ...}, after checking that the parts add up to the whole.

    Raises:
        KilnError: something was lost or doubled.
    """
    if total != sum(parts.values()):
        counts = " + ".join(f"{n} {name}" for name, n in parts.items())
        raise KilnError(f"{where}: {total} in, but {counts} = {sum(parts.values())}", "this is a defect: report it")
    return {"in": total, **parts}
