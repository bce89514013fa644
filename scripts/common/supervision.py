"""What watches over a running training: its heartbeat, its deadline, signals to it, and stalls.

A signal asks for a save after the step in hand. A Slurm job then goes on: Slurm ends it itself, and requeues one
that it preempts only if the job did not end on its own. Elsewhere the training ends. Whoever makes no step for
`stall_minutes` is ended, so that a scheduler's next attempt carries on where this one hangs.
"""

import atexit
import contextlib
import faulthandler
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

from scripts.common.errors import KilnError
from scripts.common.heartbeat import Heartbeat

SIGNALS = (signal.SIGTERM, signal.SIGINT)
ONE_SIGNAL_SECONDS = 1.0  # Slurm signals every process of a job and the launcher passes its own on: that is one
ANSWER_SECONDS = 10.0
SAVE_SECONDS = 600.0
CARRY_ON = "run the same command again: it carries on from there"


class Interrupted(KilnError):
    """A signal asked the training to end; the state is saved, and the same command carries on."""


def deadline(budget_minutes: float | None) -> float | None:
    """Time by `time.monotonic` at which a training saves and ends: its budget's or KILN_DEADLINE's, the earlier.

    KILN_DEADLINE is in seconds since 1970; the launcher sets it in Slurm jobs.

    Raises:
        KilnError: KILN_DEADLINE is no number.
    """
    now, ends = time.monotonic(), []
    if budget_minutes is not None:
        ends.append(now + budget_minutes * 60)
    if text := os.environ.get("KILN_DEADLINE"):
        try:
            ends.append(now + float(text) - time.time())
        except ValueError:
            raise KilnError(f"KILN_DEADLINE is {text!r}, expected seconds since 1970", "unset it") from None
    return min(ends, default=None)


class Supervision:
    """Watches one process of a training from `start` to `stop`, both in the main thread.

    Args:
        folder: the state folder.
        heartbeat: whether this process writes it: rank 0 does.
        stall_minutes: without a step, a save or a beat in this time the process ends; None: never.
    """

    def __init__(self, folder: Path, heartbeat: bool, stall_minutes: float | None):
        self.folder = folder
        self.rescue: Callable[[FrameType | None], str] | None = None
        self.stall_seconds = None if stall_minutes is None else stall_minutes * 60
        self.heartbeat: Heartbeat | None = None
        self.writes_heartbeat = heartbeat
        self.asked: int | None = None  # the signal that is yet to be answered
        self.asked_at = 0.0
        self.in_job = "SLURM_JOB_ID" in os.environ
        self.pid = os.getpid()
        self.before: dict[int, object] = {}
        self.beats, self.pauses = 0, 0
        self.stopped, self.answered = threading.Event(), threading.Event()

    def start(self, step: int, steps: int | None, rescue: Callable[[FrameType | None], str]) -> None:
        """The training begins.

        Args:
            step: optimiser steps that are done.
            steps: of the whole training, or None.
            rescue: called in the main thread when that hangs in Python code, with the frame where; it saves if it can,
                and says what is saved.
        """
        self.rescue = rescue
        if self.writes_heartbeat:
            self.heartbeat = Heartbeat(self.folder, step, steps)
            self.heartbeat.write()
        for number in SIGNALS:
            if self.in_job or signal.getsignal(number) is not signal.SIG_IGN:
                self.before[number] = signal.signal(number, self._ask)
        _children.spare(self.in_job)
        if self.stall_seconds is not None:
            self.before[signal.SIGUSR2] = signal.signal(signal.SIGUSR2, self._rescue)
            threading.Thread(target=self._watch, name="stall watchdog", daemon=True).start()

    def stop(self) -> None:
        """The training is over, in whatever way; signals do again what they did before."""
        self.stopped.set()
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before, self.rescue = {}, None
        _children.spare(False)
        if self.heartbeat is not None:
            self.heartbeat.turn("ending")
            self.heartbeat = None

    def beat(self, step: int, loss: float | None = None) -> None:
        """`step` optimiser steps are done."""
        self.beats += 1
        if self.heartbeat is not None:
            self.heartbeat.beat(step, loss)

    def saved(self, step: int) -> None:
        """The state of `step` is on disk."""
        self.beats += 1
        if self.heartbeat is not None:
            self.heartbeat.saved(step)

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """The block is no training: it may take as long as it likes, such as a validation."""
        self.pauses += 1
        self._turn("evaluating")
        try:
            yield
        finally:
            self.beats += 1
            self.pauses -= 1
            self._turn("training")

    def answer(self, number: int, step: int) -> None:
        """The state of `step` is saved because signal `number` asked for it.

        Raises:
            Interrupted: this is no Slurm job.
        """
        self.asked, name = None, signal.Signals(number).name
        if not self.in_job:
            raise Interrupted(f"{name}: saved at step {step} in {self.folder}", CARRY_ON)
        self._say(f"{name}: saved at step {step} in {self.folder}; goes on until Slurm ends this job")

    def _turn(self, phase: str) -> None:
        if self.heartbeat is not None:
            self.heartbeat.turn(phase)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self.pid:
            return  # a reader process, which was forked with this handler
        now = time.monotonic()
        if self.asked is None:
            self.asked, self.asked_at = number, now
            self._say(f"{signal.Signals(number).name}: saving after this step")
        elif now - self.asked_at > ONE_SIGNAL_SECONDS and not self.in_job:
            signal.signal(number, self.before[number])
            os.kill(self.pid, number)

    def _watch(self) -> None:
        """Count the time without a beat in short waits, so that a process that was suspended is not taken as stuck."""
        wait = min(5.0, self.stall_seconds / 4)
        idle, seen, before = 0.0, self.beats, time.monotonic()
        while not self.stopped.wait(wait):
            now = time.monotonic()
            idle += min(now - before, 2 * wait)
            before = now
            if self.beats != seen or self.pauses:
                idle, seen = 0.0, self.beats
            if idle >= self.stall_seconds:
                self._end_stalled()
                idle = 0.0

    def _end_stalled(self) -> None:
        seen = self.beats
        _write(f"no step in {self.stall_seconds / 60:g} minutes; this is where every thread is:")
        faulthandler.dump_traceback(file=2, all_threads=True)
        faulthandler.dump_traceback_later(SAVE_SECONDS, exit=True, file=2)  # a rescue may hang too
        signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR2)
        if self.answered.wait(ANSWER_SECONDS):
            threading.Event().wait()  # the main thread ends the process
        if self.stopped.is_set() or self.beats != seen:
            faulthandler.cancel_dump_traceback_later()
            _write("it goes on after all")
            return
        self._end("stuck in the midst of a step, whose state cannot be saved; the last save stands")

    def _rescue(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() == self.pid and not self.stopped.is_set():
            self.answered.set()
            self._end(self.rescue(frame))

    def _end(self, saved: str) -> None:
        """End the process here and now: a stuck thread cannot be unwound."""
        self._turn("stalled")
        _write(
            f"Error: no step in {self.stall_seconds / 60:g} minutes: {saved} ({self.folder})\n"
            "Hint: the stacks above say where it hung (data, network, a lost process); run the same command again: it "
            "carries on from the last save. If steps take this long, raise stall_minutes"
        )
        sys.stdout.flush()
        _children.kill()
        os._exit(1)

    def _say(self, text: str) -> None:
        if self.writes_heartbeat:
            _write(text)


class _Children:
    """Processes that were forked here to read data: Slurm signals them too, and the last step needs their data."""

    def __init__(self):
        self.spared = self.registered = False

    def spare(self, spared: bool) -> None:
        """Whether SIGTERM is kept from those that are forked from now on."""
        self.spared = spared
        if spared and not self.registered:
            os.register_at_fork(after_in_child=self._shield)
            atexit.register(self.kill)  # before multiprocessing's own, which would wait for ever for a stuck one
            self.registered = True

    def _shield(self) -> None:
        if self.spared:
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])

    def kill(self) -> None:
        """End them: a reader that hangs would keep this process, its lock and its pipes alive."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises where a reader is killed
        for process in multiprocessing.active_children():
            if process.daemon:
                process.kill()


_children = _Children()


def _write(text: str) -> None:
    os.write(2, f"{text}\n".encode())  # from signal handlers too, where a stream's buffer may be in use
