"""Whole checkpoints of the Trainer: which are resumed from, and which are kept."""

import contextlib
import dataclasses
import json
import os
import signal
from pathlib import Path

import pytest
from transformers import TrainerControl

from scripts.common import heartbeat, trainer_checkpoints
from scripts.common.supervision import Interrupted
from scripts.common.trainer_checkpoints import MARK, WholeCheckpoints, complete, newest_complete
from scripts.common.training_state import OutOfTime


def checkpoint(folder: Path, step: int, whole: bool) -> Path:
    made = folder / f"checkpoint-{step}"
    made.mkdir(parents=True)
    (made / "adapter_model.safetensors").write_bytes(b"weights")
    if whole:
        (made / MARK).touch()
    return made


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_no_folder_means_a_fresh_start(tmp_path):
    assert newest_complete(tmp_path / "none") is None


def test_the_newest_whole_checkpoint_counts_steps_and_not_letters(tmp_path):
    for step in (9, 10, 100):
        checkpoint(tmp_path, step, True)
    assert newest_complete(tmp_path).name == "checkpoint-100"


def test_one_that_a_kill_cut_short_is_moved_aside(tmp_path):
    checkpoint(tmp_path, 5, True)
    checkpoint(tmp_path, 7, False)
    assert newest_complete(tmp_path).name == "checkpoint-5"
    assert names(tmp_path) == ["checkpoint-5", "incomplete-checkpoint-7"]
    checkpoint(tmp_path, 7, False)  # cut short again at the same step
    assert newest_complete(tmp_path).name == "checkpoint-5"


def test_older_ones_go_only_when_a_newer_one_is_whole(tmp_path, monkeypatch):
    checkpoint(tmp_path, 5, True)
    newer = checkpoint(tmp_path, 7, False)

    def die(folder):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(trainer_checkpoints, "sync_folder", die)
        with pytest.raises(KeyboardInterrupt):
            complete(newer, keep=1)
    assert newest_complete(tmp_path).name == "checkpoint-5"
    again = checkpoint(tmp_path, 7, False)
    complete(again, keep=1)
    assert names(tmp_path) == ["checkpoint-7"]
    assert (again / MARK).is_file()


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_as_many_are_kept_as_asked(tmp_path, keep):
    for step in (1, 2, 3, 10):
        complete(checkpoint(tmp_path, step, False), keep)
    assert names(tmp_path) == sorted(f"checkpoint-{step}" for step in (1, 2, 3, 10)[-keep:])


@dataclasses.dataclass
class State:
    global_step: int = 1
    max_steps: int = 10
    epoch: float = 0.5
    is_world_process_zero: bool = True


@dataclasses.dataclass
class Arguments:
    output_dir: str


@pytest.fixture
def start(tmp_path):
    """A maker of callbacks whose training has begun, into `tmp_path`; all are stopped in the end."""
    made = []

    def make(**options) -> WholeCheckpoints:
        made.append(WholeCheckpoints(keep=1, **options))
        made[-1].on_train_begin(Arguments(str(tmp_path)), State(global_step=0), TrainerControl())
        return made[-1]

    yield make
    for one in made:
        one.on_train_end(None, State(), TrainerControl())


def test_a_save_is_due_by_the_clock_and_waits_for_the_validation_at_an_epochs_end(start):
    keeper = start(save_minutes=0, budget_minutes=None)
    control = keeper.on_step_end(None, State(), TrainerControl())
    assert control.should_save and not control.should_training_stop
    assert not keeper.on_step_end(None, State(epoch=1.0), TrainerControl()).should_save
    assert keeper.on_epoch_end(None, State(epoch=1.0), TrainerControl()).should_save


def test_the_last_step_is_not_saved_for_the_output_follows(start):
    keeper = start(save_minutes=0, budget_minutes=None)
    assert not keeper.on_step_end(None, State(global_step=10), TrainerControl()).should_save


def test_nothing_is_saved_before_its_time(start):
    keeper = start(save_minutes=60, budget_minutes=60)
    assert not keeper.on_step_end(None, State(), TrainerControl()).should_save


def test_out_of_time_saves_first_and_stops_after(start, tmp_path):
    keeper = start(save_minutes=60, budget_minutes=0)
    control = keeper.on_step_end(None, State(), TrainerControl())
    assert control.should_save and not control.should_training_stop  # else the stored state would stop a resumed run
    checkpoint(tmp_path, 1, False)
    control = keeper.on_save(Arguments(str(tmp_path)), State(), control)
    assert control.should_training_stop
    assert newest_complete(tmp_path).name == "checkpoint-1"
    with pytest.raises(OutOfTime, match="saved at step 1"), keeper.running(tmp_path):
        pass


@pytest.mark.parametrize("job", [None, "7"])
def test_a_signal_saves_and_stops_but_in_a_slurm_job(start, tmp_path, monkeypatch, job):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    if job:
        monkeypatch.setenv("SLURM_JOB_ID", job)
    keeper = start(save_minutes=60, budget_minutes=60)
    os.kill(os.getpid(), signal.SIGTERM)
    control = keeper.on_step_end(None, State(), TrainerControl())
    assert control.should_save and not control.should_training_stop
    checkpoint(tmp_path, 1, False)
    control = keeper.on_save(Arguments(str(tmp_path)), State(), control)
    assert newest_complete(tmp_path).name == "checkpoint-1"
    assert control.should_training_stop == (job is None)
    ends = contextlib.nullcontext() if job else pytest.raises(Interrupted, match="SIGTERM: saved at step 1")
    with ends, keeper.running(tmp_path):
        pass
    if job:  # it is answered
        assert not keeper.on_step_end(None, State(global_step=2), TrainerControl()).should_save


def test_the_heartbeat_tells_step_loss_and_save(start, tmp_path, monkeypatch):
    monkeypatch.setattr(heartbeat, "SECONDS", 0)
    keeper = start(save_minutes=60, budget_minutes=None)
    keeper.on_step_end(None, State(global_step=3), TrainerControl())
    keeper.on_log(None, State(global_step=3), TrainerControl(), {"loss": 0.5, "epoch": 1})
    checkpoint(tmp_path, 3, False)
    keeper.on_save(Arguments(str(tmp_path)), State(global_step=3), TrainerControl())
    told = json.loads((tmp_path / heartbeat.NAME).read_text())
    assert (told["step"], told["steps"], told["loss"], told["last_save"]["step"]) == (3, 10, 0.5, 3)


def test_the_best_checkpoint_stays_beside_the_newest(tmp_path):
    for number in (1, 2, 3, 4):
        checkpoint(tmp_path, number, False)
        complete(tmp_path / f"checkpoint-{number}", keep=1, best=2 if number >= 2 else 1)
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    assert newest_complete(tmp_path).name == "checkpoint-4"
