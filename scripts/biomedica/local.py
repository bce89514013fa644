"""Local pairs, read at random from their tar shards by the offsets of the index."""

import functools
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from scripts.biomedica.pairs import Pair, caption_id
from scripts.biomedica.sides import article_of
from scripts.common.errors import KilnError

NUMBERS = ("image_offset", "image_bytes", "text_offset", "text_bytes", "width", "height")
REPEATED = ("shard", "side", "panel_type", "panel_subtype")  # few values
OPEN_SHARDS = 256  # files that a process holds open
AGAIN = "run biomedica_index_local again: it reads what has changed"


class LocalPairs:
    """The pairs of an index: about 100 bytes of memory each, images and captions stay in the shards.

    Rows are numbered as in index.parquet. May be pickled (the index is then read anew), forked, and read by threads:
    reading moves no file position.

    Args:
        index_folder: of rule biomedica_index_local.
        shards_folder: where the shards lie that it names; None will do if it has no pairs.

    Raises:
        KilnError: the index is missing or damaged, or there is no folder for its pairs.
    """

    def __init__(self, index_folder: Path, shards_folder: Path | None):
        self._given = (index_folder, shards_folder)
        self._folder, path = shards_folder, index_folder / "index.parquet"
        table = read_columns(path, ["key", *NUMBERS, *REPEATED], REPEATED)
        if len(table) and shards_folder is None:
            raise KilnError(f"{path}: {len(table)} local pairs, but no folder of shards", "give --shards")
        self._keys = table["key"].cast(pa.large_string()).combine_chunks()
        self._numbers = {name: table[name].to_numpy() for name in NUMBERS}
        self._codes, self._names = {}, {}
        for name in REPEATED:
            column = table[name].unify_dictionaries().combine_chunks()
            self._codes[name], self._names[name] = column.indices.to_numpy(), column.dictionary.to_pylist()
        known = read_columns(index_folder / "shards.parquet", ["shard", "bytes", "mtime_ns"]).to_pylist()
        self._known = {one["shard"]: (one["bytes"], one["mtime_ns"]) for one in known}
        self._file = functools.lru_cache(OPEN_SHARDS)(_File)

    def __reduce__(self):
        return LocalPairs, self._given

    def __len__(self) -> int:
        return len(self._keys)

    def rows(self, side: str) -> np.ndarray:
        """(n,) int64: numbers of the rows of one side, ascending."""
        names = self._names["side"]
        return np.flatnonzero(self._codes["side"] == names.index(side)) if side in names else np.empty(0, np.int64)

    def key(self, row: int) -> str:
        """The key of a row, without reading its shard."""
        return self._keys[row].as_py()

    def read(self, row: int) -> Pair:
        """The pair of a row; its image is as it was when it was indexed, and so can be decoded.

        Raises:
            KilnError: its shard is gone, or is another one than was indexed, by size or time of change.
        """
        numbers = {name: int(values[row]) for name, values in self._numbers.items()}
        names = {name: self._names[name][codes[row]] for name, codes in self._codes.items()}
        key, path = self.key(row), self._folder / names["shard"]
        try:
            file = self._file(path)
            found = file.state()
            image = os.pread(file.number, numbers["image_bytes"], numbers["image_offset"])
            text = os.pread(file.number, numbers["text_bytes"], numbers["text_offset"])
        except OSError as error:
            raise KilnError(f"{path}: cannot be read ({error.strerror}), pair {key}", AGAIN) from None
        if found != self._known[names["shard"]]:
            raise KilnError(
                f"{path}: {found[0]} bytes, changed at {found[1]} ns, but was indexed with "
                "{} bytes, changed at {} ns".format(*self._known[names["shard"]]),
                AGAIN,
            )
        if (len(image), len(text)) != (numbers["image_bytes"], numbers["text_bytes"]):
            raise KilnError(f"{path}: ends within pair {key}", AGAIN)
        caption = text.decode("utf-8").strip()
        return Pair(
            key, article_of(key), names["side"], caption, caption_id(caption), image, numbers["width"],
            numbers["height"], names["panel_type"], names["panel_subtype"],
        )  # fmt: skip


class _File:
    """An open file, closed when the last one who reads it lets go: another thread may push it out of the cache."""

    def __init__(self, path: Path):
        self.number = os.open(path, os.O_RDONLY)

    def state(self) -> tuple[int, int]:
        facts = os.fstat(self.number)
        return facts.st_size, facts.st_mtime_ns

    def __del__(self):
        if hasattr(self, "number"):
            os.close(self.number)


def read_columns(path: Path, columns: list[str], repeated: tuple[str, ...] = ()) -> pa.Table:
    """Columns of a Parquet table as Arrow has them, `repeated` ones as dictionaries.

    Raises:
        KilnError: the file is missing or damaged, or lacks a column.
    """
    try:
        return pq.read_table(path, columns=columns, read_dictionary=list(repeated), partitioning=None)
    except FileNotFoundError:
        raise KilnError(f"{path}: no such table", "check the path, or run the rule that makes it") from None
    except (pa.ArrowException, OSError) as error:
        raise KilnError(f"{path}: unreadable table: {error}", "delete it, and run its rule again") from None
