"""Facts of slide files, from one pass over their tiles, in processes; what is known is not read again."""

import hashlib
import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path

import joblib
import numpy as np
import pandas as pd

from scripts.coca.slides import SlideError, SlideFile, iterate_tiles, open_slide
from scripts.common import progress, tables, workers
from scripts.common.errors import KilnError
from scripts.common.shards import Item

FACTS = ("reason", "tiles", "dim", "dtype", "key", "finite_share", "norm", "sha256")
SAMPLE = 64  # tiles of a slide that its sha256 and norm are of
SAVE_SECONDS = 60
log = logging.getLogger("kiln")


def inspect(path: Path, keys: Sequence[str], dim: int, max_tiles: int) -> dict:
    """{name in `FACTS`: value} of one slide; `reason` is None, or says why it cannot be used, and the others are None.

    norm is the mean L2 norm of the sampled tiles: the first, the last, and 62 between them in equal steps. sha256 is
    over the header (tiles, dim, type) and the values of the sample, so that a copy in another layout has the same.
    """
    facts = dict.fromkeys(FACTS)
    try:
        slide = open_slide(path, keys)
        if slide.dim != dim:
            raise SlideError(path, f"dim: {slide.dim} features per tile, expected {dim}")
        if slide.tiles > max_tiles:
            raise SlideError(path, f"too many tiles: {slide.tiles}, more than {max_tiles}")
        finite, sample = _pass(slide)
        if finite < slide.tiles:
            raise SlideError(path, f"not finite: {slide.tiles - finite} of {slide.tiles} tiles hold NaN or infinity")
    except SlideError as error:
        return {**facts, "reason": error.reason}
    header = json.dumps([slide.tiles, slide.dim, slide.dtype]).encode()
    return {
        "reason": None,
        "tiles": slide.tiles,
        "dim": slide.dim,
        "dtype": slide.dtype,
        "key": slide.key,
        "finite_share": finite / slide.tiles,
        "norm": float(np.linalg.norm(sample.astype(np.float64), axis=1).mean()),
        "sha256": hashlib.sha256(header + b"\0" + sample.astype(sample.dtype.newbyteorder("<")).tobytes()).hexdigest(),
    }


def _pass(slide: SlideFile) -> tuple[int, np.ndarray]:
    """(how many tiles are finite, the sampled tiles) from one pass."""
    wanted = np.unique(np.linspace(0, slide.tiles - 1, SAMPLE).round().astype(np.int64))
    finite, start, sample = 0, 0, []
    for slab in iterate_tiles(slide):
        finite += int(np.isfinite(slab).all(axis=1).sum())
        own = wanted[(wanted >= start) & (wanted < start + len(slab))]
        sample.append(slab[own - start])
        start += len(slab)
    return finite, np.concatenate(sample)


def inspect_all(
    folder: Path,
    items: Sequence[Item],
    known: Path | None,
    *,
    keys: Sequence[str],
    dim: int,
    max_tiles: int,
    processes: int,
) -> pd.DataFrame:
    """A row for each of `items`: path and `FACTS`.

    Args:
        known: table of what was read before, by path, size and time of change; kept up to date, at least each minute.
            Its place must say what it depends on beside the files: the settings and this code. None: nothing is kept.

    Raises:
        KilnError: a file is gone since it was listed, or may not be read.
    """
    before = _read_known(known)
    rows = {item: before[item] for item in items if item in before}
    todo = [item for item in items if item not in rows]
    log.info("%d of %d slides to read, %d processes", len(todo), len(items), processes)
    work = workers.pool(processes, return_as="generator")(
        joblib.delayed(inspect)(folder / item.path, keys, dim, max_tiles) for item in todo
    )
    saved = time.monotonic()
    for item, facts in zip(todo, progress.bar(work, "read slides", len(todo)), strict=True):
        rows[item] = facts
        if time.monotonic() - saved > SAVE_SECONDS:
            _write_known(known, rows)
            saved = time.monotonic()
    _write_known(known, rows)
    return pd.DataFrame([{"path": item.path, **rows[item]} for item in items], columns=["path", *FACTS])


def _write_known(known: Path | None, rows: dict[Item, dict]) -> None:
    if known is None or not rows:
        return
    frame = pd.DataFrame([{**item._asdict(), "facts": json.dumps(facts)} for item, facts in rows.items()])
    tables.write_table(known, frame, ["path"])


def _read_known(known: Path | None) -> dict[Item, dict]:
    if known is None or not known.exists():
        return {}
    try:
        frame = tables.read_table(known, [*Item._fields, "facts"])
        return {Item(*row[:-1]): json.loads(row[-1]) for row in frame.itertuples(index=False)}
    except (KilnError, ValueError):
        log.warning("%s: unreadable, every slide is read anew", known)
        return {}
