"""What a step has computed before, by item, so that a rerun of a shard computes new items alone.

A step keeps, outside every rule's output, a folder named by all that decides its numbers: settings, code, models,
packages. In it lie, for each shard, `<shard>.keys` (a key for each row of the shard's result) and
`<shard>-<digest>.values`, the result itself as a hard link, which takes no space of its own. Both are checked before
they are used: what is damaged, cut, edited or of another folder is said and computed anew.
"""

import argparse
import hashlib
import importlib.metadata
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from scripts.common.artefacts import atomic_path, sha256_file
from scripts.common.errors import KilnError
from scripts.common.fingerprint import fingerprint

T = TypeVar("T")
KEY = pa.binary(32)
KEYS, VALUES = ".keys", ".values"
BEFORE = f".before{KEYS}"  # what was kept of a shard until it was made anew
log = logging.getLogger("kiln")


def add_state_folder(made: argparse.ArgumentParser) -> None:
    """Add `--state-folder` to a parser."""
    made.add_argument("--state-folder", type=Path, help="where results are kept by item (default: nothing is)")


def facts(shard: str, computed: int, items: int) -> dict[str, int]:
    """What a record says of reuse, which is logged too."""
    log.info("%s: %d items computed, %d reused", shard, computed, items - computed)
    return {"items_computed": computed, "items_reused": items - computed}


def key(*parts: str | int) -> bytes:
    """Key of an item: 32 bytes that say all that its result depends on beside the folder's name."""
    return hashlib.sha256(b"".join(f"{part}\0".encode() for part in parts)).digest()


def folder(
    state: Path | None, numerics: Mapping, inputs: Mapping[str, str], code: str, packages: Sequence[str]
) -> Path | None:
    """The folder below `state` for results that these settings, {input: sha256}, code key and packages decide."""
    if state is None:
        return None
    versions = {f"package {name}": importlib.metadata.version(name) for name in packages}
    return state / fingerprint(numerics, {**inputs, **versions}, code)


class Kept(Generic[T]):
    """What is kept of one shard and, to be found when items move between shards, of all others.

    Args:
        place: the folder (`folder`); None: nothing is kept or found.
        shard: name of the shard.
        read: (file, numbers of rows) -> those rows of a result.
    """

    def __init__(self, place: Path | None, shard: str, read: Callable[[Path, np.ndarray], T]):
        self.place, self.shard, self.read = place, shard, read

    def find(self, keys: Sequence[bytes]) -> Iterator[tuple[np.ndarray, T]]:
        """(positions in `keys`, their rows) of what is known, file by file; one file's rows are in memory at a time."""
        wanted, missing = pa.array(keys, KEY), np.arange(len(keys))
        for file in self._files():
            if not len(missing):
                return
            try:
                known, digest = _read_keys(file)
                rows = pc.index_in(wanted.take(pa.array(missing)), value_set=known)
                hit = rows.is_valid().to_numpy(zero_copy_only=False)
                if not hit.any():
                    continue
                values = values_of(file, digest)
                if sha256_file(values) != digest:
                    raise ValueError(f"{values.name} is not what was kept")
                part = self.read(values, rows.drop_null().to_numpy())
            except FileNotFoundError as error:
                log.warning("%s is gone: its items are computed anew", error.filename)
                continue
            except (OSError, ValueError, LookupError, TypeError, pa.ArrowException, KilnError) as error:
                log.warning("%s: damaged, so its items are computed anew: %s", file, error)
                continue
            yield missing[hit], part
            missing = missing[~hit]

    def _files(self) -> list[Path]:
        if self.place is None or not self.place.is_dir():
            return []
        own = self.place / f"{self.shard}{KEYS}"
        return sorted(self.place.glob(f"*{KEYS}"), key=lambda path: (path != own, path))

    def keep(self, keys: Sequence[bytes | None], result: Path) -> None:
        """Keep a finished `result`, whose rows have these keys; None: of that row nothing is kept.

        What was kept of the shard before stays until the run has ended (`before`): an item that moved to another
        shard is looked for there. Killed in between, either the old or the new is found.
        """
        if self.place is None:
            return
        file, digest = self.place / f"{self.shard}{KEYS}", sha256_file(result)
        values, before = values_of(file, digest), file.with_name(f"{self.shard}{BEFORE}")
        link(result, values)
        column = pa.array(keys, KEY)
        facts = {"folder": self.place.name, "values": digest, "rows": len(keys), "keys": _checksum(column)}
        table = pa.table({"key": column}).replace_schema_metadata({"kept": json.dumps(facts)})
        if file.exists():
            shutil.copyfile(file, before)
        with (
            atomic_path(file) as temporary,
            pa.OSFile(str(temporary), "wb") as sink,
            pa.ipc.new_file(sink, table.schema) as writer,
        ):
            writer.write_table(table)


def values_of(file: Path, digest: str) -> Path:
    """Where the result that a file of keys belongs to is kept."""
    return file.with_name(f"{file.name.partition('.')[0]}-{digest[:16]}{VALUES}")


def before(place: Path) -> list[Path]:
    """Files of a folder that were kept of shards which have been made anew since."""
    found = []
    for file in place.glob(f"*{BEFORE}"):
        shard = file.name.removesuffix(BEFORE)
        values = sorted(place.glob(f"{shard}-*{VALUES}"), key=lambda one: one.stat().st_mtime_ns)
        found += [file, *values[:-1]]
    return found


def _read_keys(file: Path) -> tuple[pa.Array, str]:
    """The keys of a file, and the sha256 of their result; a ValueError says what is wrong."""
    table = pa.ipc.open_file(pa.BufferReader(file.read_bytes())).read_all()
    facts = json.loads((table.schema.metadata or {})[b"kept"])
    column = table["key"].combine_chunks()
    column = column.chunk(0) if isinstance(column, pa.ChunkedArray) else column
    found = {"folder": file.parent.name, "rows": len(column), "keys": _checksum(column)}
    if column.type != KEY or found != {name: facts[name] for name in found}:
        raise ValueError("its keys are not what was kept")
    return column, facts["values"]


def _checksum(column: pa.Array) -> str:
    return hashlib.sha256(b"".join(one or b"-" for one in column.to_pylist())).hexdigest()


def link(file: Path, place: Path) -> None:
    """Make `place` a hard link of `file`, atomically; a copy where the file system has no links."""
    if place.exists() and place.samefile(file):
        return  # a rename between two links of one file does nothing, and would leave both
    with atomic_path(place) as temporary:
        temporary.unlink(missing_ok=True)
        try:
            os.link(file, temporary)
        except OSError:
            shutil.copyfile(file, temporary)
