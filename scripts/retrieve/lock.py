"""The lock of retrieved models or data sets: what the first retrieval got, and every later one must get again.

A JSON file, for models beside their table, {name: {source, asked, revision, files: {name: {bytes, sha256}}}}:
`asked` is what the table or the settings said, `revision` the commit that it meant then. Keep it under version control.
"""

import os
from pathlib import Path

import filelock
from pydantic import Field, ValidationError

from scripts.common.artefacts import explain_os_error, read_json, write_json
from scripts.common.errors import KilnError
from scripts.common.settings import Settings
from scripts.retrieve.models import Model

WAIT_SECONDS = 60


class FileRecord(Settings):
    """Size in bytes and hash of one file."""

    bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class Asked(Settings):
    """What the table of models, or the settings, said when the entry was made."""

    revision: str
    files: tuple[str, ...]


class Entry(Settings):
    """What was retrieved for one name."""

    source: str
    asked: Asked
    revision: str
    files: dict[str, FileRecord]


def asked_by(model: Model) -> Asked:
    """The part of a row that an entry answers."""
    return Asked(revision=model.revision, files=model.asked_files)


def read(path: Path) -> dict[str, Entry]:
    """The entries of the lock at `path`, by model; none if there is no such file.

    Raises:
        KilnError: the file is not a lock.
    """
    if not path.exists():
        return {}
    values = read_json(path)
    try:
        return {name: Entry.model_validate(value) for name, value in values.items()}
    except (ValidationError, AttributeError) as error:
        raise KilnError(f"{path}: not a lock of retrieved files: {error}", "restore it from version control") from None


def locked_bytes(path: Path, name: str) -> int | None:
    """Bytes of what is locked under `name`; None: nothing is.

    Raises:
        KilnError: the file is not a lock.
    """
    entry = read(path).get(name)
    return entry and sum(file.bytes for file in entry.files.values())


def entry_for(path: Path, model: Model) -> Entry | None:
    """What is locked for `model`, if anything.

    Raises:
        KilnError: the lock was made for another source or revision, or cannot be added to.
    """
    entry = read(path).get(model.name)
    if entry is None:
        if not os.access(path if path.exists() else _existing(path.parent), os.W_OK):
            raise KilnError(f"{path}: cannot be written", "make it writable, or give another one by --lock")
        return None
    for what, locked, now in (
        ("source", entry.source, model.source),
        ("revision", entry.asked.revision, model.revision),
    ):
        if locked != now:
            raise KilnError(
                f"{model.title}: {model.place} says {what} {now!r}, but {path} was made for {locked!r}",
                f"undo the change, or remove {model.name!r} from {path} to lock it anew",
            )
    return entry


def _existing(folder: Path) -> Path:
    while not folder.exists():
        folder = folder.parent
    return folder


def check(path: Path, model: Model, entry: Entry, name: str, got: FileRecord) -> None:
    """Compare one file with what is locked.

    Raises:
        KilnError: the bytes differ; says what was expected and what came.
    """
    expected = entry.files.get(name)
    if expected is not None and expected != got:
        raise KilnError(
            f"{model.title}: {name} from {model.source} is not what {path} has locked: expected sha256"
            f" {expected.sha256} ({expected.bytes} bytes), got {got.sha256} ({got.bytes} bytes)",
            "the source has changed, or something in between has. Results made with the locked bytes cannot be"
            f" compared with these; if you trust the new ones, remove {model.name!r} from {path} and run again",
        )


def add(path: Path, model: Model, revision: str, files: dict[str, FileRecord]) -> None:
    """Lock what was retrieved, beside what is locked already.

    Raises:
        KilnError: another process has locked other bytes meanwhile, or the file cannot be written.
    """
    guard = path.with_name(f".{path.name}.guard")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # No soft lock: it would outlive a killed holder.
        with filelock.FileLock(guard, timeout=WAIT_SECONDS, fallback_to_soft=False):
            entries = read(path)
            old = entries.get(model.name)
            if old is not None:
                for name, record in files.items():
                    check(path, model, old, name, record)
                files = {**old.files, **files}
            new = Entry(
                source=model.source, asked=asked_by(model), revision=revision, files=dict(sorted(files.items()))
            )
            if new != old:
                entries[model.name] = new
                write_json(path, {name: entries[name].model_dump(mode="json") for name in sorted(entries)})
    except filelock.Timeout:
        raise KilnError(
            f"{path}: another process has held its lock for {WAIT_SECONDS} s", "wait until it ends, and run again"
        ) from None
    except OSError as error:
        raise explain_os_error(error, path) from error
