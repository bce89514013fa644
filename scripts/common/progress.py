"""Progress of long work: a bar on a terminal, a calm line now and then in a log."""

import logging
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")
LOG_SECONDS = 30
LINE = re.compile(rb"\S[^\n:]*: (?:\d+ of (?:\d+|\?), [\d.]+/s|[\d.]+ GB of (?:[\d.]+ GB|\?))$", re.MULTILINE)
log = logging.getLogger("kiln")


def bar(items: Iterable[T], name: str, total: int | None = None) -> Iterator[T]:
    """`items`, with their progress shown on stderr under `name`."""
    if sys.stderr.isatty():
        yield from tqdm(items, desc=name, total=total, dynamic_ncols=True)
        return
    total = len(items) if total is None and hasattr(items, "__len__") else total
    start = last = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if now - last > LOG_SECONDS:
            log.info("%s: %d of %s, %.1f/s", name, done, total or "?", done / (now - start))
            last = now
        yield item


def last(path: Path, tail: int = 4096) -> str:
    """The newest line that `bar` or a download left in a log's last `tail` bytes; empty if there is none, or no log."""
    try:
        with path.open("rb") as handle:
            handle.seek(max(0, os.fstat(handle.fileno()).st_size - tail))
            found = LINE.findall(handle.read())
    except OSError:
        return ""
    return re.sub(r"^[\d:]+ ", "", found[-1].decode(errors="replace")) if found else ""
