"""Work on a split in parts of its rows: each whole or absent, so that a killed run carries on, for any processes."""

from collections.abc import Callable, Sequence
from pathlib import Path

from scripts.common import progress


def rows_of_parts(items: int, per_part: int) -> list[range]:
    """Rows of each part, in order; the last may be smaller."""
    return [range(start, min(start + per_part, items)) for start in range(0, items, per_part)]


def make(parts: Sequence[range], files: Sequence[Path], build: Callable[[range, Path], None], accelerator, name: str):
    """Let this process `build(rows, file)` its share of the parts that are not there; returns when all have theirs.

    `build` must write `file` whole or not at all, and last.
    """
    accelerator.wait_for_everyone()
    own = range(accelerator.process_index, len(parts), accelerator.num_processes)
    for number in progress.bar([n for n in own if not files[n].is_file()], name):
        build(parts[number], files[number])
    accelerator.wait_for_everyone()
