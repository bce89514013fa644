"""Thumbnails that need not be in memory: in a file, or some of others."""

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import numpy as np

from scripts.common import artefacts, disk


class Thumbnails(Protocol):
    """What is asked of thumbnails; an array uint8 [n,v] has it."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: np.ndarray) -> np.ndarray: ...


class Stored:
    """Thumbnails in a file without a name, which goes with it; only those that are asked for are in memory."""

    def __init__(self, folder: Path, made: Iterable[np.ndarray], count: int, values: int):
        """Write `count` thumbnails of `values` bytes, as they are made, to the disk of `folder`, which need not exist.

        Raises:
            KilnError: the disk has no room for them.
        """
        while not folder.is_dir():  # it may come to be when all went well; its disk is what counts
            folder = folder.parent
        disk.require_disk(folder, count * values, "thumbnails")
        self._count, self._values = count, values
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        try:
            for one in made:
                self._file.write(one.tobytes())
            self._file.flush()
        except OSError as error:
            raise artefacts.explain_os_error(error, folder) from error

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        """uint8 [len(rows),values]; not of a file that is mapped, whose pages would count as memory."""
        made = np.empty((len(rows), self._values), np.uint8)
        for one, row in zip(made, rows.tolist(), strict=True):
            os.preadv(self._file.fileno(), [one], row * self._values)
        return made


class Subset:
    """Some of the thumbnails, by their numbers int64 [m], looked up when they are asked for."""

    def __init__(self, whole: Thumbnails, rows: np.ndarray):
        self._whole, self._rows = whole, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        return self._whole[self._rows[rows]]
