"""What a results folder holds and how large it is, written into its README.md at the end of a run.

Sizes are those on disk; a file with several hard links counts where it is met first, and no link is followed. On a slow
disk, or with very many files, counting stops after a while, and the table says which figures are not the whole.
"""

import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from scripts.common import disk, prune
from scripts.common.artefacts import write_text

SECONDS = 20.0  # of counting; about two million files on a local disk
NOT_STEPS = ("logs", "benchmarks")


def write_readme(results: Path, description: str, current: prune.Current) -> None:
    """Write README.md: `description`, and a table of sizes by step with what `make prune` would remove.

    Args:
        current: as of `prune.look`.
    """
    counter = Counter(time.monotonic() + SECONDS)
    lines = ["| folder | size | files |", "|---|---:|---:|"]
    for name, folder in places(results):
        number, files, whole = counter.count(folder)
        at_least = "" if whole else "at least "
        lines.append(f"| `{name}/` | {at_least}{disk.size(number)} | {at_least}{files:,} |")
    going: dict[str, int] = {}
    for one in prune.look(results, current, None, leftovers=False):
        if one.stays is None:
            going[one.kind] = going.get(one.kind, 0) + one.bytes
    said = ", ".join(f"{disk.size(number)} of {kind}" for kind, number in sorted(going.items())) or "nothing"
    table = "\n".join(lines)
    when = f"As of {time.strftime('%Y-%m-%d %H:%M')}, at the end of a run."
    text = f"{when} `make prune` would remove {said}; it lists first.\n\n{table}\n"
    write_text(results / "README.md", f"{description.rstrip()}\n\n## Sizes\n\n{text}")


def places(results: Path) -> Iterator[tuple[str, Path]]:
    """(name, folder) of each row: a pipeline's steps one by one, the others whole."""
    for top in sorted(entry.name for entry in os.scandir(results) if _is_folder(entry)):
        if top in NOT_STEPS or top.startswith("."):
            yield top, results / top
            continue
        inner = sorted(entry.name for entry in os.scandir(results / top) if _is_folder(entry))
        for step in inner:
            yield f"{top}/{step}", results / top / step


def _is_folder(entry: os.DirEntry) -> bool:
    return entry.is_dir(follow_symlinks=False)


class Counter:
    """Counts until a deadline, on the clock of `time.monotonic`."""

    def __init__(self, deadline: float):
        self.deadline = deadline
        self.linked: set[tuple[int, int]] = set()

    def count(self, folder: Path) -> tuple[int, int, bool]:
        """Bytes and files of a folder, and whether all of it is counted."""
        number = files = 0
        todo = [str(folder)]
        while todo:
            if time.monotonic() > self.deadline:
                return number, files, False
            try:
                entries = list(os.scandir(todo.pop()))
            except (FileNotFoundError, PermissionError):
                continue
            for entry in entries:
                try:
                    facts = entry.stat(follow_symlinks=False)
                except FileNotFoundError:  # gone since it was listed
                    continue
                if stat.S_ISDIR(facts.st_mode):
                    todo.append(entry.path)
                else:
                    files += 1
                if facts.st_nlink > 1 and stat.S_ISREG(facts.st_mode):
                    if (facts.st_dev, facts.st_ino) in self.linked:
                        continue
                    self.linked.add((facts.st_dev, facts.st_ino))
                number += facts.st_blocks * 512
        return number, files, True
