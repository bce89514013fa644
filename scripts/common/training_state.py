"""Training that survives anything: states that are whole or absent, found again by a fingerprint.

A state lies outside every rule's output, in a folder named by what decides the numbers, so that a
changed setting, input or code starts afresh and never from a stale state. A save is a folder written
under another name, flushed to disk, and renamed: a kill at any instant leaves the last whole one.

Written by hand because `accelerate.save_state` writes in place and loads custom states unpickled.
"""

import contextlib
import functools
import io
import os
import pickle
import random
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from scripts.common.artefacts import explain_os_error
from scripts.common.errors import KilnError
from scripts.common.locks import writer_lock
from scripts.common.spent import let_go
from scripts.common.step import log
from scripts.common.supervision import CARRY_ON, Supervision, deadline

KEEP = 2


def rng_state() -> dict[str, Any]:
    """State of every random generator of this process, as plain values and tensors."""
    kind, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Put back what `rng_state` gave."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])


class OutOfTime(KilnError):
    """The time budget is used up; the state is saved, and the same command carries on."""


class TrainingState:
    """Saves and finds the state of one training.

    Args:
        root: the rule's state folder; the state lies in `root/<fingerprint>`.
        fingerprint: from `scripts.common.fingerprint`.
        rank, ranks: this process and how many there are.
        barrier: waits for all processes; needed with several.
        save_minutes: time between saves.
        budget_minutes: after this time, or at KILN_DEADLINE, `checkpoint` saves and raises `OutOfTime`.
        stall_minutes: a training that makes no step in this time is ended; None: never. See `running`.
    """

    def __init__(
        self,
        root: Path,
        fingerprint: str,
        rank: int = 0,
        ranks: int = 1,
        barrier: Callable[[], None] = lambda: None,
        save_minutes: float = 10.0,
        budget_minutes: float | None = None,
        stall_minutes: float | None = None,
    ):
        self.folder = root / fingerprint
        self.rank, self.ranks, self.barrier = rank, ranks, barrier
        self.save_seconds = save_minutes * 60
        self.deadline = deadline(budget_minutes)
        self.last_save = time.monotonic()
        self.supervision = Supervision(self.folder, rank == 0, stall_minutes)
        self.readers: Sequence[str] = ()
        self.boundary = None  # the last completed step: (step, payload, random generators)
        self.stepped = False  # whether an optimiser went on since
        self.lock = None
        if rank == 0:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise explain_os_error(error, self.folder) from error
            self.lock = writer_lock(self.folder, owner="training")
            self.lock.__enter__()
            for stale in self.folder.glob("*.partial"):
                shutil.rmtree(stale)
        self.barrier()

    def saved(self) -> list[Path]:
        """Whole states, oldest first."""
        return sorted(p for p in self.folder.glob("step-*") if p.suffix != ".partial")

    def load(self, device: str | torch.device = "cpu") -> dict[str, Any] | None:
        """The newest whole state's payload, with the random generators put back; None on a fresh start.

        Raises:
            KilnError: it was saved by another number of processes, or is damaged.
        """
        found = self.saved()
        if not found:
            return None
        newest = found[-1]
        ranks = len(list(newest.glob("rank-*.pt")))
        if ranks != self.ranks:
            raise KilnError(
                f"{newest}: saved by {ranks} processes, but there are {self.ranks} now",
                f"run with {ranks} processes, or delete {self.folder} to start over",
            )
        payload = _load(newest / "shared.pt", device)
        set_rng_state(_load(newest / f"rank-{self.rank}.pt", "cpu"))
        log.info("resumed from %s", newest)
        return payload

    @contextlib.contextmanager
    def running(
        self, steps: int | None, readers: Sequence[str] = ("torch.utils.data.dataloader",)
    ) -> Iterator[None]:  # fmt: skip
        """The block trains: it has a heartbeat, signals save, and a stall ends the process.

        A process that trains alone and stalls while it waits for data is saved as it was after its last step, random
        generators included. With several, none can save alone, and the last save stands.

        Args:
            steps: optimiser steps of the whole training, if known.
            readers: modules in which the main thread waits for data.
        """
        self.readers = readers
        found = self.saved()
        hook = register_optimizer_step_pre_hook(self._on_optimiser_step)
        self.supervision.start(_step_of(found[-1]) if found else 0, steps, self._rescue)
        try:
            yield
        finally:
            self.supervision.stop()
            hook.remove()
            self.boundary = None

    def paused(self, function: Callable) -> Callable:
        """`function`, which may take as long as it likes: a validation, say."""

        @functools.wraps(function)
        def called(*arguments, **named):
            with self.supervision.pause():
                return function(*arguments, **named)

        return called

    def checkpoint(self, step: int, payload: Callable[[], dict[str, Any]], loss: float | None = None) -> None:
        """Save if a save is due or a signal asks for it; to be called by every process after each step.

        Args:
            step: optimiser steps that are done.
            payload: gives what a resumed run needs; tensors and plain values.
            loss: for the heartbeat, if the training has the number at hand.

        Raises:
            OutOfTime: the budget is used up (after saving).
            Interrupted: a signal asked for the end (after saving).
        """
        if self.supervision.stall_seconds is not None and self.ranks == 1:
            self.boundary, self.stepped = (step, payload, rng_state()), False
        self.supervision.beat(step, loss)
        now = time.monotonic()
        out_of_time, due, asked = self._from_rank_0(
            (
                self.deadline is not None and now > self.deadline,
                now - self.last_save >= self.save_seconds,
                self.supervision.asked,
            )
        )
        if not (out_of_time or due or asked):
            return
        self.save(step, payload())
        if out_of_time:
            raise OutOfTime(f"the time budget is used up; saved at step {step} in {self.folder}", CARRY_ON)
        if asked:
            self.supervision.answer(asked, step)

    def _from_rank_0(self, mine: tuple) -> tuple:
        """Rank 0's word decides for all, so that no process saves or ends alone."""
        if self.ranks == 1:
            return mine
        word = [mine]
        torch.distributed.broadcast_object_list(word, src=0)
        return word[0]

    def _on_optimiser_step(self, *_) -> None:
        self.stepped = True

    def _rescue(self, frame: FrameType | None) -> str:
        """Save the last completed step of a training that hangs at `frame`, if nothing has changed since."""
        stands = "the last save stands"
        if self.ranks > 1:
            return f"one of {self.ranks} processes cannot save alone; {stands}"
        if self.boundary is None:
            return f"there is nothing new to save; {stands}"
        if self.stepped or not _within(frame, self.readers):
            return f"in the midst of a step, whose state cannot be saved; {stands}"
        step, payload, generators = self.boundary
        try:
            self.save(step, payload(), generators)
        except KilnError as error:
            return f"not saved ({error.message}); {stands}"
        return f"waiting for data; saved at step {step}"

    def save(self, step: int, payload: dict[str, Any], generators: dict[str, Any] | None = None) -> None:
        """Save the state after `step` steps.

        Args:
            payload: tensors and plain values; rank 0's counts.
            generators: of `rng_state`; None: as they are now.
        """
        final = self.folder / f"step-{step:09d}"
        partial = final.with_suffix(".partial")
        earlier = [p.name for p in self.saved() if p.name.startswith(final.name)]
        if earlier:  # at this very step: that state stays until this one is whole, and sorts before it
            final = final.with_name(f"{final.name}-{int(earlier[-1][len(final.name) + 1 :] or 0) + 1:03d}")
        try:
            if self.rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir()
            self.barrier()
            _save_synced(generators or rng_state(), partial / f"rank-{self.rank}.pt")
            if self.rank == 0:
                _save_synced(payload, partial / "shared.pt")
            self.barrier()
            if self.rank == 0:
                os.rename(partial, final)
                for old in self.saved()[:-KEEP]:
                    shutil.rmtree(old)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise explain_os_error(error, self.folder) from error
        self.barrier()
        self.last_save = time.monotonic()
        self.supervision.saved(step)

    def remove(self, record: Path) -> None:
        """Forget the state, now that `record`, the training's meta.json, stands; earlier settings' states go too."""
        self.barrier()
        if self.rank == 0:
            self.close()
            let_go(self.folder.parent, record)

    def close(self) -> None:
        """Let go of the folder; the state stays."""
        if self.lock is not None:
            self.lock.__exit__(None, None, None)
            self.lock = None


def _step_of(state: Path) -> int:
    return int(state.name.split("-")[1])


def _within(frame: FrameType | None, modules: Sequence[str]) -> bool:
    while frame is not None:
        if frame.f_globals.get("__name__") in modules:
            return True
        frame = frame.f_back
    return False


def _load(path: Path, device: str | torch.device) -> Any:
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
        raise KilnError(
            f"{path}: damaged, or no state of ours ({type(error).__name__})",
            f"delete {path.parent}: the same command then goes on from the state before it",
        ) from error


def _save_synced(value: Any, path: Path) -> None:
    buffer = io.BytesIO()  # torch turns a full disk into a RuntimeError without errno; a plain write does not
    torch.save(value, buffer)
    with path.open("wb") as handle:
        handle.write(buffer.getbuffer())
        handle.flush()
        os.fsync(handle.fileno())
