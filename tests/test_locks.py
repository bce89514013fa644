"""The writer lock between real processes."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.common import locks
from scripts.common.errors import KilnError

ROOT = Path(__file__).resolve().parents[1]

WRITER = """
import pathlib, sys, time
from scripts.common import locks
with locks.writer_lock(pathlib.Path(sys.argv[1]), "scripts.vase.train"):
    print("writing", flush=True)
    time.sleep(60)
"""

# Its forked child, like a data loader's worker, lives on for a while. It is the child that says when to go on:
# until it runs, it holds all that its parent held.
FORKING = WRITER.replace("print(", "import os; os.fork() or print(").replace("time.sleep(60)", "time.sleep(3)")


@pytest.fixture
def writer(tmp_path):
    """A process that holds the writer lock of `state`; a program may be given, and variables."""
    started = []

    def run(program: str = WRITER, **variables: str) -> subprocess.Popen:
        command = [sys.executable, "-c", program, str(tmp_path / "state")]
        environment = {**os.environ, **variables}
        started.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True))
        assert started[-1].stdout.readline() == "writing\n"
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def test_second_writer_is_told_who_the_first_is(tmp_path, writer):
    first = writer(SLURM_JOB_ID="4711")
    with pytest.raises(KilnError) as refused, locks.writer_lock(tmp_path / "state", "second"):
        pass
    for part in (
        str(tmp_path / "state"),
        "scripts.vase.train",
        f"pid {first.pid}",
        "Slurm job 4711",
        os.uname().nodename,
    ):
        assert part in refused.value.message
    assert "scancel" in refused.value.hint


@pytest.mark.parametrize("program", [WRITER, FORKING])
def test_killed_writer_leaves_no_lock(tmp_path, writer, program):
    first = writer(program)
    first.send_signal(signal.SIGKILL)
    first.wait()
    with locks.writer_lock(tmp_path / "state", "second"):
        assert "second" in locks.holder(tmp_path / "state" / locks.WRITER_LOCK)


def test_waiting_writer_gets_the_lock(tmp_path, writer):
    writer(WRITER.replace("60", "0.5"))
    with locks.writer_lock(tmp_path / "state", "second", wait_seconds=20):
        pass


def test_lock_ends_with_its_block_even_on_an_error(tmp_path):
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), locks.writer_lock(tmp_path / "new" / "state", "one"):
            raise ZeroDivisionError


def test_same_process_cannot_write_twice(tmp_path):
    with locks.writer_lock(tmp_path, "one"), pytest.raises(KilnError), locks.writer_lock(tmp_path, "two"):
        pass


def test_file_system_without_locks_is_refused(tmp_path, monkeypatch):
    def broken(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", broken)
    with pytest.raises(KilnError, match="has no file locks"), locks.writer_lock(tmp_path, "one"):
        pass


def test_holder_of_an_unreadable_lock(tmp_path):
    for text in ("", "[]", "{", '{"pid": 1}'):
        (tmp_path / "x.lock").write_text(text)
        assert "not yet said" in locks.holder(tmp_path / "x.lock")
