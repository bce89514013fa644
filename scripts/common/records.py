"""What Snakemake knows of the results, kept beside them: whoever copies or shares a results folder has it with them.

Snakemake records in `.snakemake/metadata` of the working directory how each output was made, and compares times. In a
copy of the results, or for a second user, those records are missing or older than the results, and a copy's times are
of any order. So `{results}/records/` holds the records once more, with the size and time of each output; a run that
starts takes over those that describe the outputs as they are. A folder that was copied is told by the inode and change
time of `origin`, which no tool for copying can set.
"""

import base64
import binascii
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from scripts.common import edited, file_times, locks
from scripts.common.artefacts import (
    atomic_path,
    explain_os_error,
    read_json,
    record_of,
    sha256_file,
    write_json,
    write_text,
)
from scripts.common.errors import KilnError

FOLDER = "records"
TABLE = "outputs.parquet"
TAKEN = "kiln-records.json"  # beside Snakemake's metadata: which table was last taken over from, by results folder
HASHED_BYTES = 16 * 2**20  # longer files of a copy are compared by length alone
NAME_BYTES = 254  # to which Snakemake cuts a record's file name
SHOWN = 5
_PATH_LISTS = ("input", "log")


class Row(NamedTuple):
    """An output below the results: its path there, bytes, time, and Snakemake's record as JSON."""

    path: str
    size: int
    mtime_ns: int
    record: str


def keep(results: Path, metadata: Path) -> None:
    """Write what Snakemake recorded of outputs below `results` into its table; call it when a run ends.

    Args:
        results: the results folder, as the rules name it.
        metadata: Snakemake's folder of records.
    """
    table = results / FOLDER / TABLE
    rows = {row.path: row for row in _read(table)} if table.is_file() else {}
    nested = [f"{place.parent.name}/" for place in results.glob(f"*/{FOLDER}")]
    for output, record in _snakemake_records(metadata):
        name = output.removeprefix(f"{results}/")
        if name != output and not name.startswith(tuple(nested)) and os.path.lexists(output):
            text = json.dumps(_moved(record, f"{results}/", "{results}/"), sort_keys=True)
            path = Path(output)
            rows[name] = Row(name, path.lstat().st_size, file_times.mtime_ns(path), text)
    standing = [rows[name] for name in sorted(rows) if os.path.lexists(results / name)]
    columns = list(zip(*standing, strict=True)) or [[], [], [], []]
    with atomic_path(table) as temporary:
        pq.write_table(pa.table(dict(zip(Row._fields, columns, strict=True))), temporary, compression="zstd")
    if not _is_original(results):
        _mark(results)
    _note(results, metadata)


def take_over(results: Path, metadata: Path) -> None:
    """Before the DAG is built: give a copied folder's outputs their times, and Snakemake the records that it lacks.

    Nothing is written where the folder is no copy and no one else has run in it.

    Raises:
        KilnError: a copied output is not what was recorded, or the folder cannot be written.
    """
    table = results / FOLDER / TABLE
    if not table.is_file():
        return
    copied = not _is_original(results)
    if not copied and _noted(metadata).get(str(results)) == sha256_file(table):
        return
    rows = _read(table)
    if copied:
        with locks.writer_lock(results, "snakemake, which sets the times of copied results", wait_seconds=60):
            _set_times(results, rows)
            _mark(results)
    for row in rows:
        path = results / row.path
        if os.path.lexists(path) and file_times.mtime_ns(path) == row.mtime_ns:
            record = _moved(json.loads(row.record), "{results}/", f"{results}/")
            _write_record(metadata, str(path), record)
    _note(results, metadata)


def _set_times(results: Path, rows: list[Row]) -> None:
    standing = [(results / row.path, row) for row in rows if os.path.lexists(results / row.path)]
    wrong = [text for path, row in standing for text in _wrong_in_copy(path, row)]
    if wrong:
        more = f"\nand {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        raise KilnError(
            f"{results}: this folder was copied, and not all of it arrived as it was:\n"
            + "\n".join(f"    {text}" for text in wrong[:SHOWN])
            + more,
            "copy again what is named, or delete it: the next run that needs it makes it anew",
        )
    try:
        for path, row in standing:
            file_times.set_mtime(path, row.mtime_ns)
            for member in edited.listed(path):
                if member.is_file() and not member.is_symlink() and member.stat().st_mtime_ns > row.mtime_ns:
                    file_times.set_mtime(member, row.mtime_ns)
        for benchmark in (results / "benchmarks").rglob("*"):  # as old as the oldest output, to Snakemake
            if benchmark.is_file():
                benchmark.touch()
    except OSError as error:
        raise explain_os_error(error, results) from error


def _wrong_in_copy(path: Path, row: Row) -> Iterator[str]:
    if not path.is_file() or path.is_symlink():
        return
    found, record = path.stat().st_size, record_of(path)
    if found != row.size:
        yield f"{path}: {found} bytes, expected {row.size}"
    elif record and found <= HASHED_BYTES and sha256_file(path) != record[0]["sha256"]:
        yield f"{path}: sha256 {sha256_file(path)}, expected {record[0]['sha256']}, by its record"
    for member, entry in edited.listed(path).items():
        if member.is_symlink():  # to raw data, which may change as it likes
            continue
        length = member.stat().st_size if member.is_file() else None
        if length != entry["bytes"]:
            yield f"{member}: {'missing' if length is None else f'{length} bytes'}, expected {entry['bytes']}"


def _is_original(results: Path) -> bool:
    origin, said = results / FOLDER / "origin", results / FOLDER / "origin.json"
    return origin.is_file() and said.is_file() and read_json(said) == _identity(origin)


def _mark(results: Path) -> None:
    origin = results / FOLDER / "origin"
    origin.unlink(missing_ok=True)
    write_text(origin, "")
    write_json(origin.with_name("origin.json"), _identity(origin))


def _identity(path: Path) -> dict[str, int]:
    facts = path.stat()
    return {"inode": facts.st_ino, "changed_ns": facts.st_ctime_ns}


def _noted(metadata: Path) -> dict[str, str]:
    note = metadata.parent / TAKEN
    return read_json(note) if note.is_file() else {}


def _note(results: Path, metadata: Path) -> None:
    digest = sha256_file(results / FOLDER / TABLE)
    write_json(metadata.parent / TAKEN, _noted(metadata) | {str(results): digest})


def _read(table: Path) -> list[Row]:
    try:
        columns = pq.read_table(table, columns=list(Row._fields)).to_pydict()
        return [Row(*one) for one in zip(*(columns[name] for name in Row._fields), strict=True)]
    except (pa.ArrowException, OSError, LookupError, TypeError, ValueError) as error:
        raise KilnError(
            f"{table}: damaged: {error}",
            "copy it again; or delete it: what is in `.snakemake` of this working directory then counts alone",
        ) from None


def _moved(record: dict, old: str, new: str) -> dict:
    """A record whose paths below `old` lie below `new`."""

    def path(text: str) -> str:
        return new + text.removeprefix(old) if text.startswith(old) else text

    lists = {name: sorted(map(path, record[name])) for name in _PATH_LISTS if record.get(name) is not None}
    checksums = {path(name): value for name, value in (record.get("input_checksums") or {}).items()}
    return record | lists | {"input_checksums": checksums}


def _snakemake_records(metadata: Path) -> Iterator[tuple[str, dict]]:
    for folder, _, names in os.walk(metadata):
        parts = [part[1:] for part in Path(folder).relative_to(metadata).parts]  # each starts with @
        for name in names:
            try:
                output = base64.urlsafe_b64decode("".join([*parts, name])).decode()
                record = json.loads(Path(folder, name).read_text(encoding="utf-8"))
            except (binascii.Error, ValueError):
                continue  # half-written by a Snakemake that was killed, which takes it for none, too
            yield output, record


def _write_record(metadata: Path, output: str, record: dict) -> None:
    name = base64.urlsafe_b64encode(output.encode()).decode()
    parts = [name[i : i + NAME_BYTES] for i in range(0, len(name), NAME_BYTES)]
    write_json(metadata.joinpath(*(f"@{part}" for part in parts[:-1]), parts[-1]), record)
