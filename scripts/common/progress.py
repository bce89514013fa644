"""Progress of long work: a bar on a terminal, a calm line now and then in a log."""

import logging
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")
LOG_SECONDS = 30
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
