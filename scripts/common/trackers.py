"""Where training writes its curves while it runs: TensorBoard, W&B or nowhere.

A tracker is a side channel: it is no output, only rank 0 has one, and a tracker that cannot write says so
once and then holds its peace, for a full log disk must not end a training.
"""

import logging
import os
from pathlib import Path

import numpy as np
from PIL import Image

from scripts.common.errors import KilnError

log = logging.getLogger("kiln")
KINDS = ("tensorboard", "wandb", "none")


class Tracker:
    """Takes numbers and pictures and keeps none; other kinds inherit from it. A context manager, or `close` it."""

    _broken = False

    def scalar(self, tag: str, value: float, step: int) -> None:
        """Record one number; `step` counts optimiser steps from 0 and does not go backwards."""
        if not self._broken:
            self._guarded(lambda: self._write(tag, float(value), int(step)))

    def image(self, tag: str, file: Path, step: int) -> None:
        """Record a picture from its file; `step` as in `scalar`."""
        if not self._broken:
            self._guarded(lambda: self._write_image(tag, file, int(step)))

    def flush(self) -> None:
        """Write what is still in memory now: a process that is killed later takes nothing of it with it."""
        if not self._broken:
            self._guarded(self._flush)

    def close(self) -> None:
        """Write what is still in memory, and end."""
        self._guarded(self._end)

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _guarded(self, write) -> None:
        try:
            write()
        except OSError as error:
            if not self._broken:
                log.warning("curves are no longer recorded: %s", error)
            self._broken = True

    def _write(self, tag: str, value: float, step: int) -> None:
        pass

    def _write_image(self, tag: str, file: Path, step: int) -> None:
        pass

    def _flush(self) -> None:
        pass

    def _end(self) -> None:
        pass


def tracker(folder: Path, kind: str = "tensorboard", first_step: int = 0) -> Tracker:
    """A tracker that writes below `folder`.

    Args:
        kind: one of `KINDS`. W&B stays offline (`wandb sync` sends it) unless WANDB_MODE says otherwise.
        first_step: the first step that this process will record. What an earlier process wrote into the
            same folder at this step or after it, past its last save, no longer counts, so that no step is
            there twice. W&B cannot take steps back: each process is a run of its own, in a group named
            after the folder.

    Raises:
        KilnError: an unknown kind, a package that is not installed, or a folder that cannot be written.
    """
    if kind == "none":
        return Tracker()
    made = {"tensorboard": _TensorBoard, "wandb": _WeightsAndBiases}.get(kind)
    if made is None:
        raise KilnError(f"unknown tracker {kind!r}", f"choose one of {', '.join(KINDS)}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return made(folder, first_step)
    except ImportError as error:
        raise KilnError(
            f"tracker {kind!r} needs a package that is not installed ({error})",
            f"pip install {kind}, or choose another tracker: {', '.join(KINDS)}",
        ) from None
    except OSError as error:
        raise KilnError(f"{folder}: curves cannot be written ({error.strerror})", "or choose tracker 'none'") from None


class _TensorBoard(Tracker):
    def __init__(self, folder: Path, first_step: int):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=first_step, flush_secs=20)

    def _write(self, tag: str, value: float, step: int) -> None:
        self._writer.add_scalar(tag, value, step)

    def _write_image(self, tag: str, file: Path, step: int) -> None:
        with Image.open(file) as picture:
            self._writer.add_image(tag, np.asarray(picture), step, dataformats="HWC")

    def _flush(self) -> None:
        self._writer.flush()

    def _end(self) -> None:
        self._writer.close()


class _WeightsAndBiases(Tracker):
    def __init__(self, folder: Path, first_step: int):
        os.environ.setdefault("WANDB_MODE", "offline")
        import wandb

        # Neither code, git remote nor console go into the run: they may hold what is nobody's business.
        private = wandb.Settings(console="off", disable_git=True, save_code=False)
        name = f"{folder.name}-from-{first_step}"
        self._run = wandb.init(project="kiln", group=folder.name, name=name, dir=str(folder), settings=private)

    def _write(self, tag: str, value: float, step: int) -> None:
        self._run.log({tag: value}, step=step)

    def _write_image(self, tag: str, file: Path, step: int) -> None:
        import wandb

        self._run.log({tag: wandb.Image(str(file))}, step=step)

    def _end(self) -> None:
        self._run.finish()
