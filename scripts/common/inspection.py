"""Decode and hash listed files in parallel: what each is, or why it cannot be used."""

from collections.abc import Sequence
from pathlib import Path

import joblib

from scripts.common import images, progress
from scripts.common.errors import KilnError


def inspect_files(folder: Path, paths: Sequence[str], max_pixels: int, processes: int) -> list[dict]:
    """One row of `images.inspect` per path (relative to `folder`), in order.

    Raises:
        KilnError: a file is gone since the folder was scanned, or may not be read.
    """

    def one(path: str) -> dict:
        try:
            return {"path": path, **images.inspect(folder / path, max_pixels)}
        except FileNotFoundError:
            raise KilnError(
                f"{folder / path}: the file is gone since the folder was scanned",
                "run again: the folder is scanned anew, and what is done stays done",
            ) from None
        except OSError as error:
            raise KilnError(
                f"{folder / path}: cannot be read ({error.strerror})",
                "make it readable, or move it out of the folder of images",
            ) from None

    work = (joblib.delayed(one)(path) for path in progress.bar(paths, "inspect"))
    # threads, not processes: Pillow and hashlib release the GIL while they work
    return joblib.Parallel(n_jobs=processes, prefer="threads")(work)
