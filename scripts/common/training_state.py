"""Training that survives anything: states that are whole or absent, found again by a fingerprint.

A state lies outside every rule's output, in a folder named by what decides the numbers, so that a
changed setting, input or code starts afresh and never from a stale state. A save is a folder written
under another name, flushed to disk, and renamed: a kill at any instant leaves the last whole one.

Written by hand because `accelerate.save_state` writes in place and loads custom states unpickled.
"""

import io
import os
import pickle
import random
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from scripts.common.artefacts import explain_os_error, sha256_text
from scripts.common.errors import KilnError
from scripts.common.locks import writer_lock
from scripts.common.settings import to_json
from scripts.common.step import log

KEEP = 2


def fingerprint(numerics: Mapping[str, Any], inputs: Mapping[str, str], code: str) -> str:
    """Name of the state folder: hex digest of settings, {input: sha256} and the code key."""
    return sha256_text(to_json(dict(numerics)), to_json(dict(inputs)), code)[:16]


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
        fingerprint: from `fingerprint`.
        rank, ranks: this process and how many there are.
        barrier: waits for all processes; needed with several.
        save_minutes: time between saves.
        budget_minutes: after this time `checkpoint` saves and raises `OutOfTime`.
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
    ):
        self.folder = root / fingerprint
        self.rank, self.ranks, self.barrier = rank, ranks, barrier
        self.save_seconds = save_minutes * 60
        self.deadline = None if budget_minutes is None else time.monotonic() + budget_minutes * 60
        self.last_save = time.monotonic()
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

    def checkpoint(self, step: int, payload: Callable[[], dict[str, Any]]) -> None:
        """Save if a save is due; to be called by every process after each step.

        Raises:
            OutOfTime: the budget is used up (after saving).
        """
        now = time.monotonic()
        out_of_time = self._agree(self.deadline is not None and now > self.deadline)
        if not out_of_time and not self._agree(now - self.last_save >= self.save_seconds):
            return
        self.save(step, payload())
        if out_of_time:
            raise OutOfTime(
                f"the time budget is used up; saved at step {step} in {self.folder}",
                "run the same command again: it carries on from there",
            )

    def _agree(self, mine: bool) -> bool:
        """Rank 0's clock decides for all, so that no process saves alone."""
        if self.ranks == 1:
            return mine
        flag = [mine]
        torch.distributed.broadcast_object_list(flag, src=0)
        return flag[0]

    def save(self, step: int, payload: dict[str, Any]) -> None:
        """Save the state after `step` steps; `payload` holds tensors and plain values (rank 0's counts)."""
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
            _save_synced(rng_state(), partial / f"rank-{self.rank}.pt")
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

    def remove(self) -> None:
        """Forget the state, once the outputs stand; states of earlier settings go too."""
        self.barrier()
        if self.rank == 0:
            self.close()
            shutil.rmtree(self.folder.parent, ignore_errors=True)

    def close(self) -> None:
        """Let go of the folder; the state stays."""
        if self.lock is not None:
            self.lock.__exit__(None, None, None)
            self.lock = None


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
