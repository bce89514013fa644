"""The test cluster (tests/slurm/with_cluster.sh), and the real workflow on it by the repository's own profile."""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

from workflow import copy_checkout, edit

T = TypeVar("T")
SNAKEMAKE = Path(__file__).parent / "slurm/snakemake_asking_often.py"


class Job(NamedTuple):
    """A Slurm job: its id, state, rule with wildcards (its comment), node and working directory."""

    id: str
    state: str
    comment: str
    node: str
    folder: Path


def checkout(folder: Path) -> Path:
    """A copy of the checkout whose profile is the repository's, but for conda and for how often Slurm is asked."""
    copy_checkout(folder)
    profile = folder / "slurm/config.yaml"
    edit(profile, "software-deployment-method: conda\n", "")
    edit(profile, "slurm-init-seconds-before-status-checks: 40", "slurm-init-seconds-before-status-checks: 1")
    edit(profile, "latency-wait: 60", "latency-wait: 5")
    return folder


def start(place: Path, *arguments: str, log: Path | None = None, before: tuple[str, ...] = ()) -> subprocess.Popen:
    """Start `snakemake --profile slurm` in a checkout; its output goes to `log` (default: snakemake.log there).

    `before` is a command that takes this one as its last arguments, and runs it.
    """
    command = [*before, sys.executable, str(SNAKEMAKE), "--profile", "slurm", *arguments]
    with (log or place / "snakemake.log").open("a") as handle:
        return subprocess.Popen(
            command, cwd=place, stdout=handle, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, process_group=0
        )


def run(place: Path, *arguments: str, check: bool = True, seconds: float = 600) -> subprocess.CompletedProcess:
    """Run it to its end; `stdout` holds all that it wrote."""
    log = place / f"snakemake-{time.monotonic_ns()}.log"
    process = start(place, *arguments, log=log)
    try:
        status = process.wait(seconds)
    finally:
        process.kill()
    text = log.read_text()
    if check and status:
        raise AssertionError(f"snakemake failed ({status}):\n{text[-8000:]}")
    return subprocess.CompletedProcess(process.args, status, text, "")


def ask(*command: str) -> str:
    """What a Slurm command prints."""
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


def jobs(place: Path) -> list[Job]:
    """Slurm's jobs that are not over and were submitted from `place`."""
    lines = ask("squeue", "--noheader", "--format", "%i|%T|%k|%N|%Z").splitlines()
    found = [Job(*line.split("|")[:4], Path(line.split("|")[4])) for line in lines]
    return [job for job in found if job.folder == place]


def until(condition: Callable[[], T], seconds: float = 60, what: str = "it") -> T:
    """The first true value of `condition()`."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.2)
    raise AssertionError(f"{what} did not come true within {seconds} s")
