"""Changes that kept a file's size and mtime, which no scan can see: found by reading all files of a folder again."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import joblib
import pyarrow as pa
import pyarrow.parquet as pq

from scripts.common import progress
from scripts.common.artefacts import sha256_file
from scripts.common.errors import KilnError
from scripts.common.shards import ShardTable

SHOWN = 20  # files that are named one by one


def mark_changed(
    table: ShardTable, path: Path, folder: Path, inspected: Path, write: bool, say: Callable[[str], None]
) -> ShardTable:
    """`table`, in which each file whose content is not what its shard's table says is of the next generation.

    So is each file of a shard that has no table yet. The others are read in parallel, in pieces, shard by shard.

    Args:
        path: where the table is kept; it is written there if `write` is true and something changed.
        folder: of the files.
        inspected: folder of the shards' tables (`<shard>.parquet`, columns path and sha256).
        say: gets what was found.

    Raises:
        KilnError: a file cannot be read.
    """
    work = joblib.Parallel(n_jobs=len(os.sched_getaffinity(0)), prefer="threads", return_as="generator")(
        joblib.delayed(_is_changed)(folder / name, name, sha256) for name, sha256 in _known(table, inspected)
    )
    count, changed = 0, []
    for name, differs in progress.bar(work, f"rehash {folder}", len(table)):
        count += 1
        if differs:
            changed.append(name)
    say(f"rehash: {count} files of {folder} read, {len(changed)} differ from what was listed")
    for name in changed[:SHOWN]:
        say(f"rehash: {name} differs, and is listed anew")
    if len(changed) > SHOWN:
        say(f"rehash: ... and {len(changed) - SHOWN} more")
    # Of a shard without a table, as after `make reshard`, nothing can be compared, and what is kept of it may be stale.
    unknown = [path for name in table.names() if not (inspected / f"{name}.parquet").is_file()
               for path in table.rows(name)["path"].to_pylist()]  # fmt: skip
    if unknown:
        say(f"rehash: {len(unknown)} more files are of shards without a table, and are all inspected anew")
    if not changed and not unknown:
        return table
    marked = table.renewed([*changed, *unknown])
    if write:
        marked.save(path)
    return marked


def _known(table: ShardTable, inspected: Path) -> Iterator[tuple[str, str]]:
    """(path, sha256) of the files that have been inspected and are still there, shard by shard."""
    for name in table.names():
        file = inspected / f"{name}.parquet"
        if not file.is_file():
            continue
        try:
            columns = pq.read_table(file, columns=["path", "sha256"]).to_pydict()
        except (pa.ArrowException, OSError) as error:
            raise KilnError(f"{file}: unreadable table: {error}", f"rm {file}: the next run makes it anew") from None
        there = set(table.rows(name)["path"].to_pylist())
        yield from (pair for pair in zip(columns["path"], columns["sha256"], strict=True) if pair[0] in there)


def _is_changed(path: Path, name: str, sha256: str) -> tuple[str, bool]:
    try:
        return name, sha256_file(path) != sha256
    except OSError as error:
        raise KilnError(
            f"{path}: cannot be read ({error.strerror})", "make it readable, or move it out of the folder of images"
        ) from None
