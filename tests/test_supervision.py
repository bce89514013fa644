"""What watches over a training: signals, deadline, stalls; what is saved then carries on to the same bytes."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scripts.common import supervision
from scripts.common.errors import KilnError

ROOT = Path(__file__).resolve().parents[1]
STALL = {"stall_minutes": 0.02, "save_minutes": 60}


@pytest.fixture(autouse=True)
def interruptible():
    """A shell's background jobs start with SIGINT ignored, and what is ignored stays so."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def start(folder: Path, ranks: int = 1, env: dict | None = None, **told) -> list[subprocess.Popen]:
    """The processes of a training in `folder`."""
    told |= {"state": str(folder / "state"), "out": str(folder / "out")}
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    facts = [{"RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
             for rank in range(ranks)]  # fmt: skip
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "KILN_"))} | {"PYTHONPATH": str(ROOT)}
    return [
        subprocess.Popen(
            [sys.executable, ROOT / "tests/supervised_training.py", json.dumps(told)],
            cwd=ROOT, env={**plain, **{k: str(v) for k, v in own.items()}, **(env or {})},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for own in facts
    ]  # fmt: skip


def end(processes: list[subprocess.Popen]) -> list[tuple[int, str]]:
    """(status, what it said) of each; that its pipes close says that no reader outlives it."""
    found = [process.communicate(timeout=60) for process in processes]
    return [(process.returncode, out + err) for process, (out, err) in zip(processes, found, strict=True)]


def train(folder: Path, **told) -> tuple[int, str]:
    folder.mkdir(exist_ok=True)
    return end(start(folder, **told))[0]


def saves(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "state/f").glob("step-*"))


def result(folder: Path, rank: int = 0) -> bytes:
    return (folder / f"out/{rank}.bin").read_bytes()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> bytes:
    folder = tmp_path_factory.mktemp("undisturbed")
    status, said = train(folder)
    assert status == 0, said
    return result(folder)


def carries_on(folder: Path, undisturbed: bytes) -> None:
    assert not (folder / "out").exists()
    status, said = train(folder)
    assert status == 0, said
    assert "resumed from" in said
    assert result(folder) == undisturbed


@pytest.mark.parametrize("workers", [0, 1])
def test_a_signal_saves_after_the_step_and_ends(tmp_path, undisturbed, workers):
    status, said = train(tmp_path, does="term", at=4, workers=workers)
    assert status == 1
    assert f"SIGTERM: saved at step 5 in {tmp_path}/state/f" in said and "Hint: run the same command again" in said
    assert "Traceback" not in said
    assert saves(tmp_path) == ["step-000000005"]
    carries_on(tmp_path, undisturbed)


def test_in_a_slurm_job_a_signal_saves_and_the_training_goes_on(tmp_path, undisturbed):
    """Readers get the signal too, and the launcher's comes after Slurm's: one save, and all data still arrive."""
    status, said = train(tmp_path, does="like slurm", at=4, workers=2, env={"SLURM_JOB_ID": "7"})
    assert status == 0, said
    assert said.count("saved at step 5") == 1 and "goes on until Slurm ends this job" in said
    assert saves(tmp_path) == ["step-000000005"]
    assert result(tmp_path) == undisturbed


def test_a_second_signal_ends_at_once(tmp_path):
    started = time.monotonic()
    status, said = train(tmp_path, does="int twice", at=4)
    assert status not in (0, 1) or "KeyboardInterrupt" in said
    assert "goes on" in said
    assert time.monotonic() - started < 45
    assert saves(tmp_path) == []


def test_rank_0_saves_for_all_when_it_is_asked(tmp_path):
    (tmp_path / "whole").mkdir()
    assert [status for status, _ in end(start(tmp_path / "whole", ranks=2))] == [0, 0]
    (tmp_path / "asked").mkdir()
    processes = start(tmp_path / "asked", ranks=2, does="term", at=4)
    assert [status for status, _ in end(processes)] == [1, 1]
    assert saves(tmp_path / "asked") == ["step-000000005"]
    assert [status for status, _ in end(start(tmp_path / "asked", ranks=2))] == [0, 0]
    for rank in (0, 1):
        assert result(tmp_path / "asked", rank) == result(tmp_path / "whole", rank)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_training_that_waits_for_data_for_ever_is_saved_and_ended(tmp_path, undisturbed, workers):
    status, said = train(tmp_path, does="no data", at=7, workers=workers, options=STALL)
    assert status == 1
    assert "no step in 0.02 minutes: waiting for data; saved at step 7" in said and "Hint: " in said
    assert "tests/supervised_training.py" in said and "dataloader.py" in said  # the stacks
    assert saves(tmp_path) == ["step-000000007"]
    assert json.loads((tmp_path / "state/f/heartbeat.json").read_text())["phase"] == "stalled"
    carries_on(tmp_path, undisturbed)


@pytest.mark.parametrize("does", ["hang", "deep hang"])
def test_a_step_that_hangs_is_ended_and_the_earlier_save_stands(tmp_path, undisturbed, does):
    assert train(tmp_path, does="term", at=4)[0] == 1
    status, said = train(tmp_path, does=does, at=7, options=STALL)
    assert status == 1
    assert "in the midst of a step, whose state cannot be saved; the last save stands" in said
    assert "in disturb" in said
    assert saves(tmp_path) == ["step-000000005"]
    carries_on(tmp_path, undisturbed)


def test_one_of_several_processes_does_not_save_alone(tmp_path):
    processes = start(tmp_path, ranks=2, does="no data", at=7, options=STALL)
    found = end(processes)
    assert [status for status, _ in found] == [1, 1]
    assert any("one of 2 processes cannot save alone" in said for _, said in found)
    assert saves(tmp_path) == []


def test_a_long_validation_is_no_stall(tmp_path, undisturbed):
    status, said = train(tmp_path, does="validation", at=4, options=STALL)
    assert status == 0, said
    assert result(tmp_path) == undisturbed


def test_a_deadline_saves_and_ends(tmp_path, undisturbed):
    status, said = train(tmp_path, env={"KILN_DEADLINE": str(time.time())}, options={"budget_minutes": 60})
    assert status == 1
    assert "the time budget is used up; saved at step 1 in" in said
    carries_on(tmp_path, undisturbed)


def test_the_earlier_of_deadline_and_budget_counts(monkeypatch):
    monkeypatch.delenv("KILN_DEADLINE", raising=False)
    assert supervision.deadline(None) is None
    now = time.monotonic()
    assert supervision.deadline(2) == pytest.approx(now + 120, abs=5)
    monkeypatch.setenv("KILN_DEADLINE", str(time.time() + 1000))
    assert supervision.deadline(None) == pytest.approx(now + 1000, abs=5)
    assert supervision.deadline(2) == pytest.approx(now + 120, abs=5)
    assert supervision.deadline(60) == pytest.approx(now + 1000, abs=5)
    monkeypatch.setenv("KILN_DEADLINE", "tomorrow")
    with pytest.raises(KilnError, match="tomorrow"):
        supervision.deadline(None)


def test_signals_do_afterwards_what_they_did_before(tmp_path):
    before = {number: signal.getsignal(number) for number in (*supervision.SIGNALS, signal.SIGUSR2)}
    one = supervision.Supervision(tmp_path, True, 30)
    one.start(0, None, lambda frame: "")
    assert all(signal.getsignal(number) != handler for number, handler in before.items())
    one.stop()
    assert {number: signal.getsignal(number) for number in before} == before


def test_a_signal_that_is_ignored_stays_so(tmp_path):
    """As under nohup."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        one = supervision.Supervision(tmp_path, True, None)
        one.start(0, None, lambda frame: "")
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        one.stop()
    finally:
        signal.signal(signal.SIGINT, before)
