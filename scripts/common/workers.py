"""Worker processes that end with the process they work for."""

import os
import threading
import time
from typing import Any

import joblib

WATCHED_EVERY = 0.5  # seconds


def pool(processes: int, **options: Any) -> joblib.Parallel:
    """joblib's pool of so many processes; `options` are those of `joblib.Parallel`.

    joblib's own outlive a parent that was killed, for want of memory say, and keep its standard output open, so that
    whatever reads that, such as the `tee` of a rule, and with it the job, would never end.
    """
    return joblib.Parallel(n_jobs=processes, initializer=_end_with, initargs=(os.getpid(),), **options)


def _end_with(parent: int) -> None:
    # Not the kernel's signal at a parent's death: that comes when the thread dies that started the worker.
    threading.Thread(target=_watch, args=(parent,), daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(WATCHED_EVERY)
    os._exit(1)
