"""Heartbeats of trainings, and the table of them."""

import contextlib
import errno
import json
import logging
import os
import time
from pathlib import Path

import pytest

from scripts.common import heartbeat, spent, status
from scripts.common.heartbeat import Heartbeat
from scripts.common.locks import is_taken, writer_lock


@pytest.fixture
def clock(monkeypatch):
    """The time in seconds, which a test may move on."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "time", lambda: now[0])
    return now


def read(folder: Path) -> dict:
    return json.loads((folder / heartbeat.NAME).read_text())


def test_it_tells_all_that_the_table_needs(tmp_path, clock, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURMD_NODENAME", "node3")
    one = Heartbeat(tmp_path, 10, 50)
    one.write()
    assert read(tmp_path)["steps_per_second"] is None and read(tmp_path)["eta_seconds"] is None
    clock[0] += 20
    one.beat(20, 0.25)
    told = read(tmp_path)
    assert {k: told[k] for k in ("step", "steps", "loss", "steps_per_second", "eta_seconds", "last_save")} == {
        "step": 20, "steps": 50, "loss": 0.25, "steps_per_second": 0.5, "eta_seconds": 60.0, "last_save": None,
    }  # fmt: skip
    assert (told["job"], told["host"], told["pid"]) == ("12", "node3", os.getpid())
    assert (told["started"], told["updated"]) == (1000.0, 1020.0)
    one.saved(20)
    assert read(tmp_path)["last_save"] == {"step": 20, "time": 1020.0}


def test_it_is_written_every_few_seconds_alone(tmp_path, clock):
    one = Heartbeat(tmp_path, 0, None)
    written = []
    for step in range(1, 101):
        clock[0] += 0.5
        one.beat(step)
        written.append(read(tmp_path)["step"])
    assert len(set(written)) == 10  # 50 seconds
    assert read(tmp_path)["eta_seconds"] is None
    assert [path.name for path in tmp_path.iterdir()] == [heartbeat.NAME]


def test_a_full_disk_is_said_once_and_ends_nothing(tmp_path, clock, monkeypatch, caplog):
    one = Heartbeat(tmp_path, 0, 9)

    def refuse(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", refuse)
        with caplog.at_level(logging.WARNING, "kiln"):
            for step in (1, 2, 3):
                clock[0] += 10
                one.beat(step)
    assert caplog.text.count("no longer written") == 1
    clock[0] += 10
    one.beat(4)  # there is room again
    assert read(tmp_path)["step"] == 4


def test_a_loss_that_is_no_number_is_still_json(tmp_path, clock):
    one = Heartbeat(tmp_path, 0, 9)
    one.beat(1, float("nan"))
    assert read(tmp_path)["loss"] is None


def training(root: Path, name: str, step: int = 30, phase: str = "training") -> Path:
    folder = root / name / "f00d"
    folder.mkdir(parents=True)
    one = Heartbeat(folder, 0, 120)
    one.loss, one.last_save = 0.5, {"step": 20, "time": time.time() - 65}
    one.points.append((time.monotonic() + 10, step))
    one.step, one.phase = step, phase
    one.write()
    return folder


def lines(root: Path, capsys) -> list[list[str]]:
    status.main(["--state", str(root)])
    return [line.split("  ") for line in capsys.readouterr().out.splitlines()]


def test_the_table_has_a_line_for_each_training(tmp_path, clock, capsys, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setenv("SLURMD_NODENAME", "node3")
    with contextlib.ExitStack() as held:
        for name, phase in (("rae/train/dinov2", "training"), ("coca/train/main", "evaluating")):
            held.enter_context(writer_lock(training(tmp_path, name, phase=phase), "training"))
        training(tmp_path, "biomedica/train", phase="stalled")
        (tmp_path / "rae/other/state/step-000000001").mkdir(parents=True)
        found = [[cell.strip() for cell in line if cell.strip()] for line in lines(tmp_path, capsys)]
        assert found[0] == list(status.HEAD)
        assert found[1][:2] == ["biomedica/train", "stopped 0s ago (stalled)"]
        assert found[2][:2] == ["coca/train/main", "evaluating"]
        assert found[3] == [
            "rae/train/dinov2", "training", "30/120", "0.5000", "3", "30s", "1m 05s ago", f"pid {os.getpid()}", "node3",
        ]  # fmt: skip
        clock[0] += 4000
        found = [[cell.strip() for cell in line if cell.strip()] for line in lines(tmp_path, capsys)]
        assert [line[1] for line in found[1:]] == [
            "stopped 1h 06m ago (stalled)", "evaluating", "no step for 1h 06m",
        ]  # fmt: skip


def test_one_whose_results_are_not_yet_sure_is_done(tmp_path, capsys):
    folder = training(tmp_path, "rae/train_autoencoder/main/dinov2")
    (folder.parent / spent.MARK).touch()
    assert lines(tmp_path, capsys)[-1][1] == "done"


def test_a_look_takes_no_lock(tmp_path):
    assert not is_taken(tmp_path)
    with writer_lock(tmp_path, "training"):
        assert is_taken(tmp_path) and is_taken(tmp_path)
    assert not is_taken(tmp_path)
    with writer_lock(tmp_path, "training"):
        pass


def test_what_is_no_heartbeat_is_named(tmp_path, capsys):
    (tmp_path / "a/f").mkdir(parents=True)
    (tmp_path / "a/f" / heartbeat.NAME).write_text("[]")
    assert "not ours" in "".join(lines(tmp_path, capsys)[1])


def test_nothing_runs(tmp_path, capsys):
    assert "no training runs" in lines(tmp_path, capsys)[0][0]
    status.main(["--state", str(tmp_path / "none")])
    assert "no such folder, so nothing was trained there" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("seconds", "text"), [(-3, "0s"), (59.9, "59s"), (60, "1m 00s"), (3725, "1h 02m"), (90061, "1d 01h")]
)
def test_durations(seconds, text):
    assert status.duration(seconds) == text
