"""What a running training tells of itself in a small file of its state folder, for `make status`.

A side channel: rank 0 writes it, whole or not at all, every few seconds. A disk that is full ends no training.
"""

import collections
import json
import logging
import math
import os
import socket
import sys
import time
from pathlib import Path

log = logging.getLogger("kiln")
NAME = "heartbeat.json"
SECONDS = 5.0
WINDOW = 24  # writes over which the speed is a mean: two minutes and more


def seconds_so_far(folder: Path) -> float:
    """Seconds that a training has taken in all attempts that wrote to this state folder; 0 where none did."""
    try:
        return float(json.loads((folder / NAME).read_text(encoding="utf-8"))["seconds"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0.0  # none, or cut off: only the cost would be wrong, and a training does not fail for that


class Heartbeat:
    """The file of one training.

    Args:
        folder: its state folder.
        step: optimiser steps that are done already.
        steps: how many there will be, or None.
    """

    def __init__(self, folder: Path, step: int, steps: int | None):
        self.path = folder / NAME
        self.before = seconds_so_far(folder)
        self.begun = time.monotonic()
        self.step, self.steps = step, steps
        self.loss: float | None = None
        self.phase = "training"
        self.last_save: dict[str, float] | None = None
        self.started = time.time()
        self.points = collections.deque([(time.monotonic(), step)], maxlen=WINDOW)
        self.written = -math.inf
        self.broken = False

    def beat(self, step: int, loss: float | None = None) -> None:
        """Tell that `step` steps are done; `loss` is a number that the training has at hand anyway."""
        self.step = step
        self.loss = self.loss if loss is None else float(loss)
        if time.monotonic() - self.written >= SECONDS:
            self.write()

    def saved(self, step: int) -> None:
        """Tell that the state of `step` is on disk."""
        self.last_save = {"step": step, "time": time.time()}
        self.write()

    def turn(self, phase: str) -> None:
        """Tell what the training does now: "training", "evaluating", "ending" or "stalled"."""
        self.phase = phase
        self.write()

    def write(self) -> None:
        """Write the file now."""
        self.written = time.monotonic()
        if self.step > self.points[-1][1]:
            self.points.append((self.written, self.step))
        temporary = self.path.with_name(f".{NAME}.tmp")  # this rank alone writes here, under the folder's lock
        try:
            temporary.write_text(json.dumps(self.facts(), indent=2) + "\n", encoding="utf-8")
            os.replace(temporary, self.path)
        except OSError as error:
            if not self.broken:
                log.warning("%s is no longer written: %s", self.path, error)
            self.broken = True

    def facts(self) -> dict:
        """What the file holds: times in seconds since 1970, speed in optimiser steps per second.

        `seconds` is how long the training took until now, earlier attempts included.
        """
        (first, before), (last, after) = self.points[0], self.points[-1]
        speed = (after - before) / (last - first) if last > first else None
        left = None if self.steps is None else max(0, self.steps - self.step)
        return {
            "step": self.step,
            "steps": self.steps,
            "loss": self.loss if self.loss is not None and math.isfinite(self.loss) else None,
            "steps_per_second": speed,
            "eta_seconds": left / speed if speed and left is not None else None,
            "last_save": self.last_save,
            "phase": self.phase,
            "job": os.environ.get("SLURM_JOB_ID"),
            "host": os.environ.get("SLURMD_NODENAME") or socket.gethostname(),
            "pid": os.getpid(),
            "owner": getattr(sys.modules["__main__"].__spec__, "name", None) or Path(sys.argv[0]).name,
            "started": self.started,
            "seconds": round(self.before + time.monotonic() - self.begun, 3),
            "updated": time.time(),
        }
