"""One real training to disturb on the test cluster: prepared once by hand, copied by each test, compared at its end."""

import contextlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import cluster
import filelock
import rae_fixtures
import workflow

ENCODER = "dinov2"
STEPS = 60
MINUTES = 4  # of a job's first attempt
FOLDER = f"results/rae/train_autoencoder/main/{ENCODER}"
TARGET = f"{FOLDER}/meta.json"
STATE = f"results/state/rae/train_autoencoder/main/{ENCODER}"
SECONDS = 240  # how long a test waits for anything that must come

# What a job on the cluster does beside training: it takes its time, and notes each step that it really made.
SLOWED = """

_checkpoint = TrainingState.checkpoint


def _slowed(self, step, *arguments, **named):
    if "SLURM_JOB_ID" in os.environ:
        with open("steps.txt", "a") as handle:
            print(step, os.environ["SLURM_JOB_ID"], os.getpid(), file=handle)
        time.sleep(0.2)
    _checkpoint(self, step, *arguments, **named)


TrainingState.checkpoint = _slowed
"""


class Prepared(NamedTuple):
    """A checkout in which only the training is left to do, and the training's folder as it should come out."""

    place: Path
    expected: Path


class Step(NamedTuple):
    """A training step that was made: its number, and in which job and process."""

    number: int
    job: str
    pid: int


def prepare(tmp_path_factory) -> Prepared:
    """What `build` makes, once for all of pytest's processes."""
    base = tmp_path_factory.getbasetemp()
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "prepared"
    with filelock.FileLock(f"{root}.lock"):
        if not (root / "whole").exists():
            build(root)
            (root / "whole").touch()
    return Prepared(root / "place", root / "undisturbed" / FOLDER)


def build(root: Path) -> None:
    """All that precedes the training, and the training itself in a copy, both without Slurm and undisturbed."""
    root.mkdir(exist_ok=True)
    data = rae_fixtures.build_data(root / "data")
    place = cluster.checkout(root / "place")
    state = place / "scripts/common/training_state.py"
    state.write_text(state.read_text() + SLOWED)
    one = {"threads": 1, "mem_mb": 2400, "runtime": MINUTES}
    autoencoder = rae_fixtures.TRAIN["autoencoder"] | {"epochs": 15, "save_minutes": 0.01, "sample_every": 0}
    rae = {
        **rae_fixtures.TRAIN, "autoencoder": autoencoder | {"rfid": {"every_n_steps": 0, "every_epoch": False}},
        "images": str(data / "images"), "use": [ENCODER], "dataset": {"images_per_shard": 30},
        "encoders": {ENCODER: {"model": str(data / ENCODER), "input_size": rae_fixtures.INPUT[ENCODER]}},
        "latent_stats": {"batch_size": 16, "workers": 0}, "resources": "gpu_single",
        "evaluate": {"extractor": "kiln-random", "inception": None},
    }  # fmt: skip
    classes = dict.fromkeys(("light", "cpu", "gpu_single"), one)
    (place / "config/config.yaml").write_text(json.dumps({"device": "cpu", "resources": classes, "rae": rae}))
    workflow.run(place, place, f"results/rae/compute_latent_stats/{ENCODER}/meta.json")
    shutil.copytree(place, root / "undisturbed", symlinks=True)
    workflow.run(root / "undisturbed", root / "undisturbed", TARGET)


@contextlib.contextmanager
def controlled(place: Path, *arguments: str, before: tuple[str, ...] = ()) -> Iterator[subprocess.Popen]:
    """Snakemake that makes the training by the profile in `place`; neither it nor its jobs outlive the block."""
    process = cluster.start(place, TARGET, *arguments, before=before)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        for job in cluster.jobs(place):
            subprocess.run(["scancel", "--signal=KILL", "--full", job.id], check=False)
            subprocess.run(["scancel", job.id], check=False)


def log(place: Path) -> str:
    """What Snakemake wrote so far."""
    return (place / "snakemake.log").read_text()


def end(place: Path, process: subprocess.Popen) -> int:
    """Snakemake's exit status."""
    try:
        return process.wait(SECONDS)
    except subprocess.TimeoutExpired:
        raise AssertionError(f"Snakemake does not end:\n{log(place)[-6000:]}") from None


def complete(place: Path, process: subprocess.Popen) -> None:
    """Wait for Snakemake's good end."""
    assert end(place, process) == 0, log(place)[-8000:]


def saved(place: Path, number: int = 8) -> cluster.Job:
    """The running job, once it has saved a state of `number` steps or more."""

    def found():
        states = [int(p.name.split("-")[1]) for p in (place / STATE).glob("*/step-*") if p.suffix != ".partial"]
        return states and max(states) >= number

    cluster.until(found, SECONDS, "a saved state")
    (job,) = cluster.jobs(place)
    return job


def made(place: Path) -> list[Step]:
    """Every step that was made, in order."""
    lines = (place / "steps.txt").read_text().splitlines()
    return [Step(int(number), job, int(pid)) for number, job, pid in map(str.split, lines)]


def facts(job: str, what: str) -> str:
    """What squeue's format `what` gives for a job, also one that is over."""
    return cluster.ask("squeue", "--noheader", "--states", "all", "--jobs", job, "--format", what).strip()


def text_of_training(place: Path) -> str:
    """The training's log."""
    return (place / f"results/logs/rae/train_autoencoder/main/{ENCODER}.log").read_text()


def check(prepared: Prepared, place: Path, runs: int | None = 2, redone: int = 12) -> list[str]:
    """The training came out as if nothing had been: same bytes, nothing left behind, at most `redone` steps twice.

    Args:
        runs: in how many processes steps were made; None: one or two.

    Returns:
        The job of each.
    """
    out = place / FOLDER
    expected = json.loads((prepared.expected / "meta.json").read_text())["outputs"]
    assert json.loads((out / "meta.json").read_text())["outputs"] == expected
    for name in expected:
        assert (out / name).read_bytes() == (prepared.expected / name).read_bytes(), name
    assert {p.name for p in out.iterdir()} == {p.name for p in prepared.expected.iterdir()}
    assert not (place / STATE).exists()
    steps = made(place)
    processes = list(dict.fromkeys((step.job, step.pid) for step in steps))
    assert len(processes) == runs or (runs is None and len(processes) < 3), processes
    assert {step.number for step in steps} == set(range(1, STEPS + 1))
    assert len(steps) - STEPS <= redone, steps
    if runs:
        resumed = re.findall(r"resumed from \S+/step-(\d+)", text_of_training(place))
        assert [int(one) > 0 for one in resumed] == ([True] if runs > 1 else [])
    return [job for job, _ in processes]


def copy(prepared: Prepared, folder: Path) -> Path:
    """A copy of the prepared checkout, for one test."""
    return Path(shutil.copytree(prepared.place, folder / "place", symlinks=True))


def slow_first_run(place: Path, seconds: float) -> None:
    """Let each step of the first process that trains, not of later ones, take so long."""
    later = "len({line.split()[2] for line in open('steps.txt')}) > 1"
    workflow.edit(
        place / "scripts/common/training_state.py", "time.sleep(0.2)", f"time.sleep(0.2 if {later} else {seconds})"
    )


def fill(folder: Path) -> Path:
    """Fill the disk of `folder` to its last byte; the file that does so."""
    path = folder / "filler"
    with path.open("wb", buffering=0) as handle, contextlib.suppress(OSError):
        while True:
            handle.write(os.urandom(1 << 16))
    return path
