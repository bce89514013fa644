"""Whole checkpoints of transformers' Trainer (and of trainers built on it): found, kept, rotated, in time.

The Trainer writes a checkpoint in place: one that a kill cut short looks like a whole one. Here each gets an
empty file COMPLETE, written and flushed after everything else; only checkpoints with it are ever resumed from,
and older ones go only when a newer one has it (the Trainer's own rotation would delete first).
"""

import contextlib
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import torch
from transformers import TrainerCallback

from scripts.common.step import log
from scripts.common.supervision import CARRY_ON, Supervision, deadline
from scripts.common.training_state import OutOfTime

MARK = "COMPLETE"


def step_of(checkpoint: Path) -> int:
    """Optimiser steps done at a checkpoint folder."""
    return int(checkpoint.name.rpartition("-")[2])


def checkpoints(folder: Path) -> list[Path]:
    """All checkpoint folders, whole or not, by step."""
    found = folder.glob("checkpoint-*") if folder.is_dir() else ()
    return sorted((p for p in found if re.fullmatch(r"checkpoint-\d+", p.name)), key=step_of)


def newest_complete(folder: Path) -> Path | None:
    """The newest whole checkpoint; those that a kill cut short are moved aside, so that nothing finds them."""
    whole = []
    for checkpoint in checkpoints(folder):
        if (checkpoint / MARK).is_file():
            whole.append(checkpoint)
            continue
        aside = checkpoint.with_name(f"incomplete-{checkpoint.name}")
        shutil.rmtree(aside, ignore_errors=True)
        checkpoint.rename(aside)
        log.info("%s was not finished: moved to %s", checkpoint.name, aside.name)
    return whole[-1] if whole else None


def sync_folder(folder: Path) -> None:
    """Flush every file of a folder to disk, and its listing."""
    for path in [p for p in folder.rglob("*") if p.is_file()] + [folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def complete(checkpoint: Path, keep: int, best: int | None = None) -> None:
    """Mark a finished checkpoint, then remove all but the newest `keep` whole ones, and what kills left.

    The checkpoint of step `best` stays beside them.
    """
    sync_folder(checkpoint)
    (checkpoint / MARK).touch()
    sync_folder(checkpoint)
    whole = [p for p in checkpoints(checkpoint.parent) if (p / MARK).is_file() and step_of(p) != best]
    for old in [*whole[:-keep], *checkpoint.parent.glob("incomplete-checkpoint-*")]:
        shutil.rmtree(old)


class WholeCheckpoints(TrainerCallback):
    """Saves by the clock and on signals, marks what is whole, and stops when the time budget is used up.

    Give the Trainer `save_strategy="no"` or its own strategy, and no `save_total_limit`: rotation is done here, and
    spares the checkpoint that the Trainer knows as the best. From `train` on it has a heartbeat, and a stall ends the
    process; the last save stands.

    Args:
        keep: whole checkpoints that stay.
        save_minutes: time between saves; None leaves them to the Trainer's strategy.
        budget_minutes: after this time, or at KILN_DEADLINE, training saves and stops, and `running` raises.
        stall_minutes: without a step or a batch of a validation in this time the process ends; None: never.
    """

    def __init__(
        self,
        keep: int,
        save_minutes: float | None,
        budget_minutes: float | None,
        stall_minutes: float | None = None,
    ):
        self.keep, self.save_seconds = keep, float("inf") if save_minutes is None else save_minutes * 60
        self.deadline, self.stall_minutes = deadline(budget_minutes), stall_minutes
        self.last_save = time.monotonic()
        self.saved_step = 0
        self.out_of_time = False
        self.interrupted: int | None = None
        self.supervision: Supervision | None = None

    @contextlib.contextmanager
    def running(self, folder: Path) -> Iterator[None]:
        """The block trains with this callback, into `folder`.

        Raises:
            OutOfTime: the time budget is used up; the state is saved.
            Interrupted: a signal asked for the end; the state is saved.
        """
        try:
            yield
        finally:
            if self.supervision is not None:
                self.supervision.stop()
        if self.out_of_time:
            raise OutOfTime(f"the time budget is used up; saved at step {self.saved_step} in {folder}", CARRY_ON)
        if self.interrupted:
            self.supervision.answer(self.interrupted, self.saved_step)

    def on_train_begin(self, args, state, control, **_):
        self.supervision = Supervision(Path(args.output_dir), state.is_world_process_zero, self.stall_minutes)
        self.supervision.start(state.global_step, state.max_steps, self._rescue)

    def on_train_end(self, args, state, control, **_):
        self.supervision.stop()

    def on_substep_end(self, args, state, control, **_):
        self.supervision.beat(state.global_step)

    def on_prediction_step(self, args, state, control, **_):
        self.supervision.beat(state.global_step)

    def on_log(self, args, state, control, logs, **_):
        self.supervision.beat(state.global_step, logs.get("loss"))

    def on_step_end(self, args, state, control, **_):
        self.supervision.beat(state.global_step)
        # an epoch's last step waits for the validation after it, which a resumed run would leave out
        return control if float(state.epoch).is_integer() else self._save_if_due(state, control)

    def on_epoch_end(self, args, state, control, **_):
        return self._save_if_due(state, control)

    def _save_if_due(self, state, control):
        if self.out_of_time or self.interrupted:
            return control  # saved; what the Trainer still does before it ends is not to be resumed from
        now = time.monotonic()
        late = self.deadline is not None and now > self.deadline
        # rank 0's word decides for all, so that no process saves or stops alone
        late, due, asked = from_rank_0((late, now - self.last_save >= self.save_seconds, self.supervision.asked))
        if (late or due or asked) and state.global_step < state.max_steps:
            control.should_save = True
            self.out_of_time, self.interrupted = late, asked
        return control

    def on_save(self, args, state, control, **_):
        if torch.distributed.is_initialized():
            torch.distributed.barrier()  # every rank has written its generators
        if state.is_world_process_zero:
            best = getattr(state, "best_global_step", None)  # older transformers do not know it
            complete(Path(args.output_dir, f"checkpoint-{state.global_step}"), self.keep, best)
        self.last_save, self.saved_step = time.monotonic(), state.global_step
        self.supervision.saved(state.global_step)
        if self.interrupted and not self.out_of_time and self.supervision.in_job:
            self.supervision.answer(self.interrupted, state.global_step)
            self.interrupted = None
        if self.out_of_time or self.interrupted:
            # not before the save: the Trainer would store it, and a resumed run would stop at once
            control.should_training_stop = True
        return control

    def _rescue(self, frame: FrameType | None) -> str:
        return "the last save stands"  # only the Trainer can make one, between two steps


def from_rank_0(value):
    """What rank 0 gave, on every rank of a running group of processes; else `value` itself."""
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        box = [value]
        torch.distributed.broadcast_object_list(box, src=0)
        return box[0]
    return value
