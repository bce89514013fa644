"""What every download needs: room on the disk, and a word on its progress."""

import contextlib
import errno
import logging
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from scripts.common.errors import KilnError

ATTEMPTS = 5
LOG_SECONDS = 30
ELSEWHERE = "set `models` (for data sets `datasets`) to a folder on another disk"
log = logging.getLogger("kiln")


def need_room(folder: Path, size: int) -> None:
    """Stop before a download that cannot fit.

    Args:
        folder: where it goes.
        size: bytes still to come.

    Raises:
        KilnError: less is free.
    """
    free = shutil.disk_usage(folder).free
    if free < size:
        raise KilnError(
            f"{folder}: {size / 1e9:.2f} GB are to come, but only {free / 1e9:.2f} GB are free",
            f"free space, or {ELSEWHERE}; what has been downloaded is kept",
        )


def explain_disk(error: BaseException, folder: Path) -> KilnError | None:
    """A full or read-only disk as a `KilnError`; None for anything else."""
    number = getattr(error, "errno", None)
    if number in (errno.ENOSPC, errno.EDQUOT):
        return KilnError(
            f"{folder}: the disk is full",
            f"free space, or {ELSEWHERE}; what has been downloaded is kept, so run again",
        )
    if number in (errno.EACCES, errno.EROFS, errno.EPERM):
        return KilnError(
            f"{folder}: cannot be written",
            f"make it writable, or {ELSEWHERE}",
        )
    return None


@contextlib.contextmanager
def progress(name: str, folder: Path, total: int | None) -> Iterator[None]:
    """Report how `folder` grows while the block runs: a bar on a terminal, a line now and then in a log.

    Args:
        name: what is retrieved.
        total: bytes that the folder will hold, if known.
    """
    over = threading.Event()
    watcher = threading.Thread(target=_watch, args=(name, folder, total, over), daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()


def _watch(name: str, folder: Path, total: int | None, over: threading.Event) -> None:
    if sys.stderr.isatty():
        with tqdm(desc=name, total=total, unit="B", unit_scale=True, dynamic_ncols=True) as bar:
            while not over.wait(0.5):
                bar.update(_size(folder) - bar.n)
            bar.update(_size(folder) - bar.n)
        return
    whole = f"{total / 1e9:.2f} GB" if total else "?"
    while not over.wait(LOG_SECONDS):
        log.info("%s: %.2f GB of %s", name, _size(folder) / 1e9, whole)


def _size(folder: Path) -> int:
    size = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # files are renamed meanwhile
            size += path.stat().st_size if path.is_file() else 0
    return size
