"""Work on rows in parts of them: each whole or absent, so that a killed run carries on, for any processes."""

import contextlib
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from scripts.common import progress
from scripts.common.locks import writer_lock

T = TypeVar("T")


@contextlib.contextmanager
def built(
    state: Path,
    key: str,
    items: int,
    per_part: int,
    read: Callable[[list[range]], Iterable[T]],
    build: Callable[[range, T, Path], None],
    accelerator,
    name: str,
    groups: int = 1,
    suffix: str = ".safetensors",
) -> Iterator[list[Path]]:
    """The parts' files, in the order of parts, once all processes have built theirs; removed after the block.

    Args:
        state: folder of this step's states; parts lie below it in `key`, which must name all that decides them.
        items, per_part: rows in all and of each part; the last ones may have fewer.
        read: (rows of each part that is still to be built) -> what to build each of, in turn; called once, so that
            reading goes on from part to part.
        build: (rows, what was read, file) writes `file` whole or not at all, and last.
        groups: rows are dealt to so many groups, row r to group r modulo `groups`, and part p is of group p modulo
            `groups`; with one group, a part's rows are consecutive.
        suffix: ending of the parts' files.
    """
    folder, first = state / key, accelerator.is_main_process
    dealt = [range(group, items, groups) for group in range(groups)]
    rows = [own[start : start + per_part] for start in range(0, len(dealt[0]), per_part) for own in dealt]
    rows = [own for own in rows if own]  # the last groups may lack a last part
    files = [folder / f"part-{number:05d}{suffix}" for number in range(len(rows))]
    with writer_lock(folder, owner=name) if first else contextlib.nullcontext():
        accelerator.wait_for_everyone()
        own = range(accelerator.process_index, len(rows), accelerator.num_processes)
        missing = [number for number in own if not files[number].is_file()]
        given = read([rows[number] for number in missing])
        found = zip(missing, given, strict=True)
        for number, one in progress.bar(found, f"parts of {name}", total=len(missing)):
            build(rows[number], one, files[number])
        accelerator.wait_for_everyone()
        yield files
    if first:
        shutil.rmtree(state, ignore_errors=True)
