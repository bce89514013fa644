"""Times of results, by which Snakemake tells what is older than what it was made from."""

import os
import time
from collections.abc import Iterable
from pathlib import Path

from scripts.common.errors import KilnError

TIMESTAMP = ".snakemake_timestamp"  # Snakemake's, in a folder that is an output: it stands for the folder's time
SKEW_SECONDS = 60  # by which clocks of one cluster may differ


def carrier(path: Path) -> Path:
    """The file whose time Snakemake takes for that of `path`."""
    inside = path / TIMESTAMP
    return inside if inside.is_file() else path


def mtime_ns(path: Path) -> int:
    """The time of `path` as Snakemake sees it, in nanoseconds."""
    return carrier(path).lstat().st_mtime_ns


def set_mtime(path: Path, nanoseconds: int) -> None:
    """Give `path` that time, unless it has it."""
    place = carrier(path)
    if place.lstat().st_mtime_ns != nanoseconds:
        os.utime(place, ns=(nanoseconds, nanoseconds), follow_symlinks=False)


def bring_back_from_future(ours: Iterable[Path], theirs: Iterable[Path]) -> None:
    """After a clock has jumped back: give our own files that lie in the future the time that it is now.

    What is made from now on would else look older than what it is made from, and be made again each time. All
    get one and the same time, so that none of them looks newer than another.

    Args:
        ours: results; those that are missing are left out.
        theirs: files of the user's, which are not touched.

    Raises:
        KilnError: one of the user's files lies more than a minute in the future.
    """
    now = time.time_ns()
    for path in theirs:
        if path.exists():
            refuse_future(path)
    for path in ours:
        if os.path.lexists(path) and mtime_ns(path) > now:
            set_mtime(path, now)


def seconds_ahead(path: Path) -> float:
    """By how much a file's time is ahead of this machine's clock; negative where it is not."""
    return path.stat().st_mtime - time.time()


def refuse_future(path: Path) -> None:
    """Stop at a file whose time lies in the future: all that is made from it would look older.

    Raises:
        KilnError: it does, by more than clocks of one cluster differ.
    """
    ahead = seconds_ahead(path)
    if ahead > SKEW_SECONDS:
        raise KilnError(
            f"{path}: its time lies {ahead / 60:.0f} minutes in the future, by the clock of this machine",
            "set the clock right; if it is right, `touch` the file. A file below `results` needs no touch: "
            "start Snakemake again",
        )
