"""States of trainings that are done: gone, or in a Slurm job marked, and swept once their results stand."""

from pathlib import Path

import pytest

from scripts.common import spent


@pytest.fixture
def state(tmp_path) -> Path:
    """A training's folder of states below `tmp_path/state`, with one state."""
    folder = tmp_path / "state/rae/train/dinov2"
    (folder / "f00d/step-000000060").mkdir(parents=True)
    return folder


def test_it_goes_at_once_where_no_scheduler_can_end_the_job(state, tmp_path, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    spent.let_go(state, tmp_path / "meta.json")
    assert not state.exists()


def test_a_job_keeps_it_until_its_results_are_sure(state, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.chdir(tmp_path)
    meta = Path("results/meta.json")
    spent.let_go(state, meta)
    monkeypatch.chdir("/")
    spent.sweep(tmp_path / "state")  # the job was ended after all, and its results deleted
    assert (state / "f00d/step-000000060").is_dir()
    (tmp_path / meta).parent.mkdir()
    (tmp_path / meta).touch()
    other = state.parent / "siglip2/beef"
    other.mkdir(parents=True)  # of a training that is not done
    spent.sweep(tmp_path / "state")
    assert not state.exists() and other.is_dir()


def test_without_states_there_is_nothing_to_sweep(tmp_path):
    spent.sweep(tmp_path / "state")
