"""Append-only shards of a folder's files, so that the cost of a run grows with what changed.

A small table, kept outside every rule's output, fixes the shard of each file for good. New files
open new shards; a removed or rewritten file changes the digest of its own shard and of no other.
"""

import collections
import hashlib
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from scripts.common.artefacts import atomic_path
from scripts.common.errors import KilnError


class Item(NamedTuple):
    """A file: its path relative to the folder (with /), its size in bytes, its mtime in nanoseconds."""

    path: str
    size: int
    mtime_ns: int


class Scan(NamedTuple):
    """What a folder holds: the wanted files sorted by path, and how many others there are."""

    items: list[Item]
    ignored: int


def scan(folder: Path, extensions: Iterable[str], may_be_empty: bool = False) -> Scan:
    """Names, sizes and mtimes below `folder`, at any depth, through links, in one walk.

    Files and folders whose name starts with a dot are left alone and not counted; so is a link to a
    folder that it lies in, which would never end.

    Raises:
        KilnError: the folder is missing or unreadable, or holds no file with one of the extensions, unless it
            `may_be_empty`.
    """
    endings = tuple(e.lower() for e in extensions)
    if not folder.is_dir():
        raise KilnError(f"{folder}: no such folder", "set the folder in config/config.yaml to where your images are")
    try:
        items, ignored = _walk(folder, endings)
    except OSError as error:
        raise KilnError(
            f"{error.filename or folder}: cannot be listed ({error.strerror})",
            "make it readable, or move it out of the folder of images",
        ) from error
    if not items and not may_be_empty:
        raise KilnError(
            f"{folder}: no file ends with one of {', '.join(endings)} ({ignored} other files)",
            "check the folder and the file endings",
        )
    return Scan(sorted(items), ignored)


def _walk(folder: Path, endings: tuple[str, ...]) -> tuple[list[Item], int]:
    items, ignored = [], 0
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
                    items.append(Item(prefix + entry.name, facts.st_size, facts.st_mtime_ns))
                else:
                    ignored += 1
    return items, ignored


def _refuse_undecodable(path: str) -> None:
    try:
        path.encode()
    except UnicodeEncodeError:
        raise KilnError(f"{os.fsencode(path)!r}: this file name is not UTF-8", "rename the file") from None


class ShardTable:
    """Which shard each file belongs to, and the files as they were last seen."""

    def __init__(self, shards: dict[str, list[Item]], ignored: int = 0):
        self.shards = shards
        self.ignored = ignored

    def names(self) -> list[str]:
        """Names of the shards that hold a file, in order."""
        return sorted(self.shards)

    def items(self, name: str) -> list[Item]:
        """The files of one shard, sorted by path.

        Raises:
            KilnError: there is no such shard.
        """
        if name not in self.shards:
            raise KilnError(
                f"no shard {name!r}; there are {len(self.shards)}", "run the workflow, not the rule by hand"
            )
        return self.shards[name]

    def digest(self, name: str) -> str:
        """Hex sha256 over names, sizes and mtimes of one shard's files."""
        digest = hashlib.sha256()
        for item in self.items(name):
            digest.update(f"{item.path}\0{item.size}\0{item.mtime_ns}\n".encode())
        return digest.hexdigest()

    def save(self, path: Path) -> None:
        """Write the table as Parquet, atomically."""
        rows = [(name, *item) for name in self.names() for item in self.shards[name]]
        columns = list(zip(*rows, strict=True)) if rows else [[], [], [], []]
        table = pa.table(dict(zip(("shard", "path", "size", "mtime_ns"), columns, strict=True)))
        table = table.replace_schema_metadata({"ignored": str(self.ignored)})
        with atomic_path(path) as temporary:
            pq.write_table(table, temporary)

    @classmethod
    def load(cls, path: Path) -> "ShardTable":
        """Read a table that `save` wrote.

        Raises:
            KilnError: it is missing or damaged.
        """
        shards = collections.defaultdict(list)
        try:
            table = pq.read_table(path)
            columns = (table.column(n).to_pylist() for n in ("shard", "path", "size", "mtime_ns"))
            for name, *item in zip(*columns, strict=True):
                if not re.fullmatch(r"s\d{5,}", name):
                    raise ValueError(f"{name!r} is no shard")
                shards[name].append(Item(*item))
            return cls(dict(shards), int((table.schema.metadata or {}).get(b"ignored", b"0")))
        except FileNotFoundError:
            raise KilnError(f"{path}: no shard table", "start from the workflow: it scans the folder") from None
        except (pa.ArrowException, OSError, LookupError, TypeError, ValueError) as error:
            raise KilnError(f"{path}: damaged shard table: {error}", "delete it: the next run makes it anew") from None


def assign(previous: ShardTable | None, found: Scan, per_shard: int) -> ShardTable:
    """Give each found file its shard: the one that it had, or a new one of up to `per_shard` files."""
    home = {item.path: name for name, items in previous.shards.items() for item in items} if previous else {}
    shards: dict[str, list[Item]] = collections.defaultdict(list)
    new = []
    for item in found.items:
        if item.path in home:
            shards[home[item.path]].append(item)
        else:
            new.append(item)
    first = 1 + max((int(name[1:]) for name in home.values()), default=-1)
    for index, item in enumerate(new):
        shards[f"s{first + index // per_shard:05d}"].append(item)
    return ShardTable(dict(shards), found.ignored)


def refresh(table: Path, folder: Path, extensions: Iterable[str], per_shard: int, write: bool) -> ShardTable:
    """Scan `folder` and bring the table at `table` up to date; with `write` false only in memory."""
    previous = ShardTable.load(table) if table.exists() else None
    current = assign(previous, scan(folder, extensions), per_shard)
    if write and (previous is None or previous.shards != current.shards or previous.ignored != current.ignored):
        current.save(table)
    return current
