"""Pairs of validation and test with their images, in a Parquet file each: what no training sees, and scores are of."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from scripts.biomedica.pairs import UNKNOWN, Pair
from scripts.common import artefacts, images
from scripts.common.errors import KilnError

SIDES = ("validation", "test")
LOCAL = "local"  # the source of pairs of the shards on disk; of streamed ones it is the shard's name
SCHEMA = pa.schema(
    [
        ("key", pa.string()), ("article", pa.string()), ("source", pa.string()), ("caption", pa.string()),
        ("caption_id", pa.int64()), ("panel_type", pa.string()), ("panel_subtype", pa.string()),
        ("width", pa.int32()), ("height", pa.int32()), ("image", pa.binary()),
    ]
)  # fmt: skip
ROWS = 32  # of a row group: what is in memory at a time
COLUMNS = tuple(name for name in SCHEMA.names if name != "image")


@contextlib.contextmanager
def writer(path: Path) -> Iterator[Callable[[Pair, str], None]]:
    """A function `add(pair, source)` that appends a `pairs.Pair`; the file appears, whole, when the block ends well.

    At most `ROWS` images are in memory. The bytes depend on the pairs and their order alone.
    """
    with artefacts.atomic_path(path) as temporary:
        waiting: list[dict] = []
        # images are compressed already
        with pq.ParquetWriter(temporary, SCHEMA, compression="none", use_dictionary=False) as file:

            def flush() -> None:
                file.write_table(pa.Table.from_pylist(waiting, SCHEMA), row_group_size=ROWS)
                waiting.clear()

            def add(pair: Pair, source: str) -> None:
                row = {name: getattr(pair, name) for name in SCHEMA.names if name != "source"}
                waiting.append(row | {"source": source})
                if len(waiting) == ROWS:
                    flush()

            yield add
            if waiting:
                flush()


def _open(path: Path) -> pq.ParquetFile:
    hint = "run rule biomedica_hold_out again"
    try:
        file = pq.ParquetFile(path)
    except FileNotFoundError:
        raise KilnError(f"{path}: no such file", hint) from None
    except (pa.ArrowException, OSError) as error:
        raise KilnError(f"{path}: unreadable table: {error}", hint) from None
    missing = [name for name in SCHEMA.names if name not in file.schema_arrow.names]
    if missing:
        raise KilnError(f"{path}: no column {', '.join(missing)}", f"check which table this is, or {hint}")
    return file


def read(path: Path) -> pd.DataFrame:
    """All columns but the images: `COLUMNS`, in the order of the file.

    Raises:
        KilnError: no such file, no such table, or no pair in it.
    """
    with _open(path) as file:
        table = file.read(columns=list(COLUMNS)).to_pandas()
    if table.empty:
        raise KilnError(f"{path}: no pairs", "give another seed or larger shares of articles (biomedica.held_out)")
    return table


def batches(path: Path, size: int) -> Iterator[list[bytes]]:
    """The image files in the order of `read`, `size` at a time; memory does not grow with their number."""
    with _open(path) as file:
        for batch in file.iter_batches(size, columns=["image"]):
            yield batch.column(0).to_pylist()


def decoded(files: Sequence[bytes], keys: Sequence[str], max_pixels: int = 2**62) -> list[Image.Image]:
    """RGB images of image files, `keys` of which name them in errors.

    Raises:
        KilnError: an image that was whole when it was held out no longer is.
    """
    made = []
    for data, key in zip(files, keys, strict=True):
        try:
            made.append(images.open_rgb(data, max_pixels))
        except images.ImageError as error:
            raise KilnError(f"held-out figure {key}: {error}", "run rule biomedica_hold_out again") from None
    return made


class Side(NamedTuple):
    """A held-out side: its file, its rows without images, and [N] numbers of their panel types, -1 where unknown."""

    path: Path
    table: pd.DataFrame
    labels: np.ndarray

    @property
    def captions(self) -> list[str]:
        """Captions, in order."""
        return self.table["caption"].to_list()

    @property
    def articles(self) -> np.ndarray:
        """Articles, in order."""
        return self.table["article"].to_numpy()

    def images(self, size: int):
        """Batches of up to `size` RGB images, in order."""
        keys, done = self.table["key"].to_list(), 0
        for files in batches(self.path, size):
            yield decoded(files, keys[done : done + len(files)])
            done += len(files)


def read_sides(folder: Path) -> tuple[Side, Side, list[str]]:
    """Validation and test, and the panel types of both, sorted."""
    tables = [read(folder / f"{side}.parquet") for side in SIDES]
    classes = sorted(set().union(*(one["panel_type"] for one in tables)) - {UNKNOWN})
    numbers = {name: number for number, name in enumerate(classes)}
    made = [
        Side(folder / f"{side}.parquet", table, table["panel_type"].map(lambda one: numbers.get(one, -1)).to_numpy())
        for side, table in zip(SIDES, tables, strict=True)
    ]
    return *made, classes
