"""What a training with transformers' Trainer says while it runs, and its curves afterwards."""

import math

from transformers import TrainerCallback

from scripts.common.errors import KilnError
from scripts.common.step import log
from scripts.common.trackers import Tracker

_CLOCK = ("runtime", "per_second", "time", "speed", "memory", "max_steps", "flos")


class Log(TrainerCallback):
    """Curves for the tracker, periodic lines for the log, and a stop when the loss is no number.

    Let the Trainer log each step: what it averages over several is forgotten when it resumes between two lines.

    Args:
        writer: takes every number but times.
        every: optimiser steps between two lines.
        hint: what helps when the loss is no number.
    """

    def __init__(self, writer: Tracker, every: int, hint: str):
        self.writer, self.every, self.hint = writer, every, hint

    def on_log(self, args, state, control, logs, **_):
        for name, value in _numbers(logs).items():
            self.writer.scalar(name, value, state.global_step)
        loss = logs.get("loss", logs.get("eval_loss"))
        if loss is None or not state.is_world_process_zero:
            return
        if "eval_loss" in logs:
            log.info("epoch %.2f: validation loss %.4f", state.epoch, loss)
        elif state.global_step % self.every == 0 or state.global_step == state.max_steps:
            reward = f", reward {logs['reward']:.4f}" if "reward" in logs else ""
            rate = logs.get("learning_rate", math.nan)
            log.info("step %d/%d: loss %.4f%s, lr %.3g", state.global_step, state.max_steps, loss, reward, rate)
        if not math.isfinite(loss):
            raise KilnError(f"loss is {loss} at step {state.global_step}", self.hint)


def history(log_history: list[dict]) -> dict[str, list[dict]]:
    """Training and validation rows of a Trainer's state, without what depends on the clock."""
    found = {"train": [], "validation": []}
    for row in log_history:
        side = "train" if "loss" in row else "validation" if "eval_loss" in row else None
        if side:
            # in order of names: a state that was read back has another order than one that grew
            found[side].append({"step": row["step"], **dict(sorted(_numbers(row).items()))})
    return found


def _numbers(row: dict) -> dict[str, float]:
    return {
        name: value
        for name, value in row.items()
        if isinstance(value, int | float) and name != "step" and not any(word in name for word in _CLOCK)
    }
