"""Shards on disk that were read whole from the hub, never more than a stated size; for any number of processes."""

import contextlib
import fcntl
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import filelock

from scripts.common.artefacts import explain_os_error

WAIT_SECONDS = 60
ENDING = ".shard"  # nothing else in the folder is ever removed
log = logging.getLogger("kiln")


class Cache:
    """A folder that keeps shards, each whole or absent; the longest unused make room for new ones.

    Args:
        folder: made where it is missing.
        size: bytes that all files in it have at most, those still to come included.
    """

    def __init__(self, folder: Path, size: int):
        self.folder, self.size = folder, size

    def find(self, key: str, size: int) -> BinaryIO | None:
        """The shard `key` of `size` bytes, if it is kept; marks it as used."""
        path = self.folder / f"{key}{ENDING}"
        try:
            handle = path.open("rb")
        except FileNotFoundError:
            return None
        if os.fstat(handle.fileno()).st_size != size:
            handle.close()
            return None
        with contextlib.suppress(FileNotFoundError):  # it has just made room; the open file can still be read
            os.utime(path)
        return handle

    def begin(self, key: str, size: int) -> "Entry | None":
        """A place for the shard `key` of `size` bytes; None if there is no room, or if it is being read already.

        Raises:
            KilnError: the folder cannot be written.
        """
        if size > self.size:
            return None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._locked():
                self._remove_orphans()
                part = self.folder / f"{key}{ENDING}.part"
                if part.exists() or not self._make_room(size):
                    return None
                return Entry(part, size)
        except filelock.Timeout:
            log.warning("%s: its lock has been held for %d s: a shard is not kept", self.folder, WAIT_SECONDS)
            return None
        except OSError as error:
            raise explain_os_error(error, self.folder) from error

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        # No soft lock: it would outlive a killed holder.
        with filelock.FileLock(self.folder / ".lock", timeout=WAIT_SECONDS, fallback_to_soft=False):
            yield

    def _remove_orphans(self) -> None:
        """Parts whose reader was killed hold no lock."""
        for path in self.folder.glob(f"*{ENDING}.part"):
            with contextlib.suppress(FileNotFoundError, BlockingIOError), path.open("rb") as handle:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()

    def _make_room(self, size: int) -> bool:
        kept, used = [], size
        for path in self.folder.iterdir():
            with contextlib.suppress(FileNotFoundError):
                facts = path.stat()
                used += facts.st_size
                if path.suffix == ENDING:
                    kept.append((facts.st_mtime_ns, path.name, facts.st_size))
        if used - sum(own for *_, own in kept) > self.size:
            return False  # what is being read takes it all
        for _, name, own in sorted(kept):
            if used > self.size:
                (self.folder / name).unlink(missing_ok=True)
                used -= own
        return True


class Entry:
    """A shard on its way into the cache: `write` all of it, then `finish`, else `drop`."""

    def __init__(self, part: Path, size: int):
        self._part, self._handle = part, part.open("xb")
        fcntl.flock(self._handle, fcntl.LOCK_EX)
        os.truncate(self._handle.fileno(), size)  # so that others see what it will take

    def write(self, data: bytes) -> None:
        """Add bytes. Where the disk is full, the shard is not kept, and said so."""
        if self._handle is None:
            return
        try:
            self._handle.write(data)
        except OSError as error:
            self._fail(error)

    def finish(self) -> None:
        """Keep it."""
        if self._handle is None:
            return
        try:
            self._handle.flush()
            os.fsync(self._handle.fileno())
            self._part.replace(self._part.with_suffix(""))
            self._handle.close()
            self._handle = None
        except OSError as error:
            self._fail(error)

    def drop(self) -> None:
        """Keep nothing, unless it was finished."""
        if self._handle is not None:
            self._part.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # a full disk, once more
                self._handle.close()
            self._handle = None

    def _fail(self, error: OSError) -> None:
        free = shutil.disk_usage(self._part.parent).free
        log.warning("%s: not kept: %s (%.0f MB free)", self._part, error.strerror, free / 1e6)
        self.drop()
