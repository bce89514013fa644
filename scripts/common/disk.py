"""Room on the disks: what a step will write, and before the first job what all will, against what is free there.

Two folders share a filesystem if they have the same st_dev, whatever their paths. What is free is what the filesystem
says (statvfs): a quota of a project or a user, which it may not know of, is not looked at.
"""

import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from scripts.common.errors import KilnError

CAN = "cannot be reached"


class Need(NamedTuple):
    """What a job writes.

    Attributes:
        place: a file or folder that it writes to; it need not exist.
        bytes: how many; None: not known, such as those of a model that is yet to be retrieved.
        what: what they are, in words, such as "training state".
        shared: jobs that write this write it once, together, such as a cache of one size.
    """

    place: Path
    bytes: int | None
    what: str
    shared: bool = False


class Filesystem(NamedTuple):
    """A filesystem that jobs will write to.

    Attributes:
        place: an existing folder on it.
        free: bytes that are free.
        needs: (rule, what, number of jobs, their bytes in all or None), the largest first.
    """

    place: Path
    free: int
    needs: Sequence[tuple[str, str, int, int | None]]

    @property
    def needed(self) -> int:
        """Bytes that are known to be needed."""
        return sum(number or 0 for *_, number in self.needs)


def existing(path: Path) -> Path:
    """`path`, or its nearest parent that exists.

    Raises:
        KilnError: it cannot be reached.
    """
    place = path.absolute()
    try:
        while not place.exists():
            place = place.parent
    except OSError as error:
        raise KilnError(f"{path}: {CAN} ({error.strerror})", "check the path and its permissions") from error
    return place


def free_bytes(place: Path) -> int:
    """Bytes that this user may still write on the filesystem of the existing folder `place`.

    Raises:
        KilnError: it cannot be reached.
    """
    try:
        return shutil.disk_usage(place).free
    except OSError as error:
        raise KilnError(f"{place}: {CAN} ({error.strerror})", "check the path and its permissions") from error


def require_disk(path: Path, needed_bytes: int, what: str) -> None:
    """Make sure that `needed_bytes` bytes are free where `path` is, or will be.

    Args:
        path: a file or folder; it need not exist.
        needed_bytes: bytes that will be written there.
        what: what they are for, in words, such as "the shards".

    Raises:
        KilnError: fewer are free, or `path` cannot be reached.
    """
    place = existing(path)
    free = free_bytes(place)
    if free < needed_bytes:
        raise KilnError(
            f"{path}: {what} need {size(needed_bytes)}, and {size(free)} are free on the disk of {place}",
            "free some space, or point `results` (for models and data: HF_HOME) at another disk",
        )


def by_filesystem(needs: Iterable[tuple[str, Need]]) -> list[Filesystem]:
    """What (rule, need) pairs come to on each filesystem, the fullest first.

    Raises:
        KilnError: a folder cannot be reached.
    """
    found: dict[int, tuple[Path, dict[tuple[str, str], list[int | None]]]] = {}
    counted = set()
    places: dict[Path, tuple[Path, int]] = {}
    for rule, need in needs:
        if need.shared and need in counted:
            continue
        counted.add(need)
        if need.place not in places:
            place = existing(need.place)
            places[need.place] = place, os.stat(place).st_dev
        place, device = places[need.place]
        found.setdefault(device, (place, {}))[1].setdefault((rule, need.what), []).append(need.bytes)
    systems = [Filesystem(place, free_bytes(place), _summed(asked)) for place, asked in found.values()]
    return sorted(systems, key=lambda one: one.free - one.needed)


def _summed(asked: dict[tuple[str, str], list[int | None]]) -> list[tuple[str, str, int, int | None]]:
    rows = []
    for (rule, what), numbers in asked.items():
        known = [number for number in numbers if number is not None]
        if known:
            rows.append((rule, what, len(known), sum(known)))
        if len(known) < len(numbers):
            rows.append((rule, what, len(numbers) - len(known), None))
    return sorted(rows, key=lambda row: (row[3] is not None, -(row[3] or 0), row[0]))


def table(systems: Sequence[Filesystem]) -> str:
    """The filesystems in columns, below each the rules that write there."""
    lines = [("filesystem of", "needed", "free", "")]
    for one in systems:
        lines.append((str(one.place), size(one.needed), size(one.free), "TOO LITTLE" if one.needed > one.free else ""))
        for rule, what, jobs, number in one.needs:
            name = f"  {rule}" + (f" x {jobs}" if jobs > 1 else "")
            lines.append((name, "unknown" if number is None else size(number), "", what))
    widths = [max(len(line[column]) for line in lines) for column in range(3)]
    return "\n".join(
        f"{name:<{widths[0]}}  {needed:>{widths[1]}}  {free:>{widths[2]}}  {note}".rstrip()
        for name, needed, free, note in lines
    )


def require(systems: Sequence[Filesystem], warn: Callable[[str], None] | None = None) -> None:
    """Make sure that every filesystem has the room that is known to be needed.

    Args:
        warn: told of what is wrong, in place of an error.

    Raises:
        KilnError: one has not; the message holds the table.
    """
    short = [one for one in systems if one.needed > one.free]
    if not short:
        return
    error = KilnError(
        f"too little room on the disk of {', '.join(str(one.place) for one in short)} for the jobs that will run:\n"
        f"{table(systems)}",
        "free some space (`make prune` lists what no configuration names), build one pipeline at a time, or point "
        "`results` (models, datasets, biomedica.remote.cache_folder) at another disk; `check_disk: false` goes on "
        "all the same",
    )
    if warn is None:
        raise error
    warn(str(error))


def size(number: float) -> str:
    """Bytes as text, such as 1.5 GB: of 1000, to three digits."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if number < 999.5 or unit == "TB":
            break
        number /= 1000
    return f"{number:.0f} {unit}" if unit == "B" or number >= 99.95 else f"{number:.1f} {unit}"
