"""Append-only shards of a folder's files, so that the cost of a run grows with what changed.

A small table, kept outside every rule's output, fixes the shard of each file for good. New files
open new shards; a removed or rewritten file changes the digest of its own shard and of no other.
Files are columns of Arrow tables: a million of them are sorted, looked up and hashed within seconds.
"""

import array
import hashlib
import itertools
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from scripts.common.artefacts import atomic_path
from scripts.common.errors import KilnError

FILES = pa.schema([("path", pa.large_string()), ("size", pa.int64()), ("mtime_ns", pa.int64())])


class Item(NamedTuple):
    """A file: its path relative to the folder (with /), its size in bytes, its mtime in nanoseconds."""

    path: str
    size: int
    mtime_ns: int


class Scan:
    """What a folder holds: the wanted files, and how many others there are.

    Attributes:
        files: a table of the schema `FILES`, sorted by path.
        ignored: how many files have other endings.
    """

    def __init__(self, items: Iterable[Item] | pa.Table, ignored: int = 0):
        made = items if isinstance(items, pa.Table) else _columns(list(items))
        self.files, self.ignored = made.sort_by("path"), ignored

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Scan) and (self.ignored, self.files) == (other.ignored, other.files)

    @property
    def items(self) -> list[Item]:
        """The files, one by one."""
        return _items(self.files)

    def digest(self) -> str:
        """Hex sha256 over names, sizes and mtimes of all files."""
        return _digest(self.files)


def _columns(items: Sequence[Item]) -> pa.Table:
    columns = list(zip(*items, strict=True)) if items else [[], [], []]
    return pa.table(dict(zip(FILES.names, columns, strict=True)), schema=FILES)


def _items(files: pa.Table) -> list[Item]:
    return list(map(Item, *(files[name].to_pylist() for name in FILES.names)))


def _digest(files: pa.Table) -> str:
    """Hex sha256 over a line for each file; a generation counts where it is not 0."""
    fields = [files["path"], *(files[name].cast(pa.large_string()) for name in ("size", "mtime_ns"))]
    zero, end, nothing = (pa.scalar(text, pa.large_string()) for text in ("\0", "\n", ""))
    lines = pc.binary_join_element_wise(*fields, zero)
    if "generation" in files.column_names:
        again = pc.binary_join_element_wise(lines, files["generation"].cast(pa.large_string()), zero)
        lines = pc.if_else(pc.not_equal(files["generation"], 0), again, lines)
    digest = hashlib.sha256()
    for chunk in pc.binary_join_element_wise(lines, end, nothing).chunks:
        first, last = np.frombuffer(chunk.buffers()[1], np.int64)[[chunk.offset, chunk.offset + len(chunk)]]
        digest.update(memoryview(chunk.buffers()[2] or b"")[first:last])
    return digest.hexdigest()


def scan(folder: Path, extensions: Iterable[str], may_be_empty: bool = False) -> Scan:
    """Names, sizes and mtimes below `folder`, at any depth, through links, in one walk.

    Files and folders whose name starts with a dot are left alone and not counted; so is a link to a
    folder that it lies in, which would never end.

    Args:
        may_be_empty: a folder that is missing, or holds no such file, has no items.

    Raises:
        KilnError: the folder is unreadable; unless it may be, missing, or without a file with one of the extensions.
    """
    endings = tuple(e.lower() for e in extensions)
    if may_be_empty and not folder.exists():
        return Scan([])
    if not folder.is_dir():
        raise KilnError(f"{folder}: no such folder", "set the folder in config/config.yaml to where your images are")
    try:
        files, ignored = _walk(folder, endings)
    except OSError as error:
        raise KilnError(
            f"{error.filename or folder}: cannot be listed ({error.strerror})",
            "make it readable, or move it out of the folder of images",
        ) from error
    if not len(files) and not may_be_empty:
        raise KilnError(
            f"{folder}: no file ends with one of {', '.join(endings)} ({ignored} other files)",
            "check the folder and the file endings",
        )
    return Scan(files, ignored)


def _walk(folder: Path, endings: tuple[str, ...]) -> tuple[pa.Table, int]:
    paths, sizes, times, ignored = [], array.array("q"), array.array("q"), 0
    todo: list[tuple[str, str, frozenset[str]]] = [(str(folder), "", frozenset())]
    while todo:
        place, prefix, above = todo.pop()
        real = os.path.realpath(place)
        if real in above:
            continue
        above |= {real}
        with os.scandir(place) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                _refuse_undecodable(entry.path)
                if entry.is_dir():
                    todo.append((entry.path, f"{prefix}{entry.name}/", above))
                elif entry.name.lower().endswith(endings) and entry.is_file():
                    facts = entry.stat()
                    paths.append(prefix + entry.name)
                    sizes.append(facts.st_size)
                    times.append(facts.st_mtime_ns)
                else:
                    ignored += 1
    numbers = [np.frombuffer(column, np.int64) if column else np.zeros(0, np.int64) for column in (sizes, times)]
    return pa.table([pa.array(paths, pa.large_string()), *map(pa.array, numbers)], schema=FILES), ignored


def _refuse_undecodable(path: str) -> None:
    try:
        path.encode()
    except UnicodeEncodeError:
        raise KilnError(f"{os.fsencode(path)!r}: this file name is not UTF-8", "rename the file") from None


def shard_name(number: int) -> str:
    """Name of a shard."""
    return f"s{number:05d}"


def shard_number(name: str) -> int | None:
    """The number in a shard's name; None if it is none."""
    return int(name[1:]) if re.fullmatch(r"s\d{5,9}", name, re.ASCII) else None


class ShardTable:
    """Which shard each file belongs to, and the files as they were last seen.

    Args:
        files: a table of `FILES` and `generation`: how often a file was found to have another content
            than its unchanged size and mtime said. Rows of a shard are sorted by path.
        numbers: shard of each row, ascending.
        ignored: how many files of the folder have other endings.
        following: number of the next shard that is opened; no number is given twice.
    """

    def __init__(self, files: pa.Table, numbers: np.ndarray, ignored: int = 0, following: int = 0):
        self.files, self.numbers, self.ignored = files, numbers, ignored
        own, first = np.unique(numbers, return_index=True)
        spans = itertools.pairwise([*first.tolist(), len(numbers)])
        self._rows = {shard_name(number): span for number, span in zip(own.tolist(), spans, strict=False)}
        self.following = max([following, *(own[-1:] + 1).tolist()])
        self._digests: dict[str, str] = {}

    @classmethod
    def of(cls, shards: Mapping[str, Iterable[Item]], ignored: int = 0) -> "ShardTable":
        """A table of the files of each shard, by name."""
        rows = [(shard_number(name), *item) for name, items in shards.items() for item in items]
        numbers = np.array([row[0] for row in rows], np.int64)
        return cls._sorted(_columns([Item(*row[1:]) for row in rows]), numbers, None, ignored, 0)

    @classmethod
    def _sorted(cls, files, numbers, generations, ignored, following) -> "ShardTable":
        """A table of rows in any order; those of one number may be in order already."""
        generations = np.zeros(len(numbers), np.int64) if generations is None else generations
        files = files.append_column("generation", pa.array(generations))
        keyed = files.append_column("number", pa.array(numbers))
        order = pc.sort_indices(keyed, [("number", "ascending"), ("path", "ascending")])
        return cls(files.take(order).combine_chunks(), numbers[order.to_numpy()], ignored, following)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, ShardTable)
            and (self.ignored, self.following) == (other.ignored, other.following)
            and np.array_equal(self.numbers, other.numbers)
            and self.files == other.files
        )

    def __len__(self) -> int:
        return len(self.numbers)

    def names(self) -> list[str]:
        """Names of the shards that hold a file, in order."""
        return list(self._rows)

    def rows(self, name: str) -> pa.Table:
        """path, size, mtime_ns and generation of one shard's files, sorted by path.

        Raises:
            KilnError: there is no such shard.
        """
        if name not in self._rows:
            raise KilnError(f"no shard {name!r}; there are {len(self._rows)}", "run the workflow, not the rule by hand")
        start, end = self._rows[name]
        return self.files.slice(start, end - start)

    def items(self, name: str) -> list[Item]:
        """The files of one shard, sorted by path.

        Raises:
            KilnError: there is no such shard.
        """
        return _items(self.rows(name))

    def digest(self, name: str) -> str:
        """Hex sha256 over names, sizes, mtimes and generations of one shard's files."""
        if name not in self._digests:
            self._digests[name] = _digest(self.rows(name))
        return self._digests[name]

    def renewed(self, paths: Sequence[str]) -> "ShardTable":
        """This table, in which `paths` are of the next generation: their shards have other digests."""
        chosen = pc.is_in(self.files["path"], value_set=pa.array(paths, pa.large_string())).to_numpy()
        files = self.files.set_column(3, "generation", pa.array(self.files["generation"].to_numpy() + chosen))
        return ShardTable(files, self.numbers, self.ignored, self.following)

    def resharded(self, per_shard: int) -> "ShardTable":
        """All files in as few new shards of up to `per_shard` files as can be, in the order of their paths."""
        files = self.files.sort_by("path")
        numbers = self.following + np.arange(len(files), dtype=np.int64) // per_shard
        return ShardTable(files.combine_chunks(), numbers, self.ignored)

    def save(self, path: Path) -> None:
        """Write the table as Parquet, atomically."""
        names = pa.DictionaryArray.from_arrays(
            np.searchsorted(np.unique(self.numbers), self.numbers).astype(np.int32), pa.array(self.names(), pa.string())
        )
        table = self.files.add_column(0, "shard", names)
        table = table.replace_schema_metadata({"ignored": str(self.ignored), "following": str(self.following)})
        with atomic_path(path) as temporary:
            pq.write_table(table, temporary, write_page_checksum=True)

    @classmethod
    def load(cls, path: Path) -> "ShardTable":
        """Read a table that `save` wrote.

        Raises:
            KilnError: it is missing, damaged, or says of a file what cannot be.
        """
        try:
            table = pq.ParquetFile(path, page_checksum_verification=True).read()
            columns = [table[name].cast(kind) for name, kind in zip(FILES.names, FILES.types, strict=True)]
            again = table["generation"].cast(pa.int64()).to_numpy() if "generation" in table.column_names else None
            shards = table["shard"].combine_chunks().dictionary_encode()
            metadata = table.schema.metadata or {}
            ignored, following = (int(metadata.get(name, b"0")) for name in (b"ignored", b"following"))
            if any(column.null_count for column in (table["shard"], *columns)):
                raise ValueError("a row has a gap")
            numbers = [shard_number(str(name)) for name in shards.dictionary.to_pylist()]
            if None in numbers:
                raise ValueError(f"{shards.dictionary[numbers.index(None)].as_py()!r} is no shard")
            if pc.count_distinct(columns[0]).as_py() < len(table):
                raise ValueError("a file has two rows")
        except FileNotFoundError:
            raise KilnError(f"{path}: no shard table", "start from the workflow: it scans the folder") from None
        except (pa.ArrowException, OSError, LookupError, TypeError, ValueError) as error:
            raise KilnError(
                f"{path}: damaged shard table: {error}", "start from the workflow: it makes the table anew"
            ) from None
        of_row = np.array(numbers, np.int64)[shards.indices.to_numpy()] if len(table) else np.zeros(0, np.int64)
        return cls._sorted(pa.table(columns, schema=FILES), of_row, again, ignored, following)


def assign(previous: ShardTable | None, found: Scan, per_shard: int) -> ShardTable:
    """Give each found file its shard: the one that it had, or a new one of up to `per_shard` files."""
    count = len(found.files)
    numbers, generations, following = np.full(count, -1, np.int64), np.zeros(count, np.int64), 0
    if previous is not None:
        rows = pc.index_in(found.files["path"], value_set=previous.files["path"])
        known = rows.is_valid().to_numpy()
        rows = rows.drop_null().to_numpy()
        numbers[known] = previous.numbers[rows]
        generations[known] = previous.files["generation"].to_numpy()[rows]
        following = previous.following
    new = numbers < 0
    numbers[new] = following + np.arange(new.sum()) // per_shard
    return ShardTable._sorted(found.files, numbers, generations, found.ignored, following)


def recover(tables: Iterable[Path], say: Callable[[str], None]) -> ShardTable | None:
    """Shards of files as tables of each shard (`<shard>.parquet`; columns path, generation) have them; None: of none.

    Where two name a file, the later shard has it: files move to new shards alone. Sizes and mtimes are unknown here.
    """
    homes: dict[str, tuple[int, int]] = {}
    following = 0
    for path in sorted(tables, key=lambda path: shard_number(path.stem) or 0):
        number = shard_number(path.stem)
        if number is None:
            continue
        following = number + 1
        try:
            own = pq.read_table(path, columns=["path", "generation"]).to_pydict()
            homes |= {name: (number, again) for name, again in zip(own["path"], own["generation"], strict=True)}
        except (pa.ArrowException, OSError, LookupError) as error:
            say(f"{path}: unreadable, its files count as new: {error}")
    if not homes:
        return None
    files = _columns([Item(path, 0, 0) for path in homes])
    numbers, generations = np.array(list(homes.values()), np.int64).T
    return ShardTable._sorted(files, numbers, generations, 0, following)


def refresh(
    table: Path,
    folder: Path,
    extensions: Iterable[str],
    per_shard: int,
    write: bool,
    made: Iterable[Path] = (),
    say: Callable[[str], None] = print,
) -> ShardTable:
    """Scan `folder` and bring the table at `table` up to date; with `write` false only in memory.

    Args:
        made: tables of shards, from which the shards of files are taken where `table` is missing or damaged.
        say: gets a line about such a loss.
    """
    previous = _previous(table, made, say)
    current = assign(previous, scan(folder, extensions), per_shard)
    if write and previous != current:
        current.save(table)
    return current


def _previous(table: Path, made: Iterable[Path], say: Callable[[str], None]) -> ShardTable | None:
    if table.exists():
        try:
            return ShardTable.load(table)
        except KilnError as error:
            say(error.message)
    recovered = recover(made, say)
    if recovered is not None:
        say(
            f"{table}: made anew from the tables of {len(recovered.names())} shards, {len(recovered)} files; "
            "their sizes and times of change are taken as they are now"
        )
    return recovered


def last(table: Path, say: Callable[[str], None]) -> ShardTable | None:
    """The table of the last scan; None, which is said, if there is none to be read."""
    try:
        return ShardTable.load(table)
    except KilnError as error:
        say(f"{error.message}; the folder is scanned although `rescan` is false")
        return None
