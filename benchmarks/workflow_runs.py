"""Snakemake and DVC as programs: how long they take, and what their main process holds."""

import contextlib
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import yaml

ROOT = Path(__file__).resolve().parents[1]


class Run(NamedTuple):
    """One run of a program: seconds on the wall, of the CPU in all its processes, peak RSS of its main process."""

    seconds: float
    cpu_seconds: float
    peak_mb: float
    text: str

    def facts(self) -> dict[str, float]:
        """The figures, rounded."""
        return {"seconds": round(self.seconds, 2), "cpu_seconds": round(self.cpu_seconds, 2), "peak_mb": self.peak_mb}


def program(command: Sequence[str], directory: Path) -> Run:
    """Run `command` in `directory`; a failure ends the benchmark with the end of what it said."""
    os.sync()
    with tempfile.TemporaryFile() as said:
        before, start, peak = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter(), 0.0
        process = subprocess.Popen(command, cwd=directory, stdout=said, stderr=subprocess.STDOUT)
        while process.poll() is None:
            peak = max(peak, _peak_mb(process.pid))
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.05)
        seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
        said.seek(0)
        text = said.read().decode(errors="replace")
    if process.returncode:
        sys.exit(f"{' '.join(command)}\nfailed with status {process.returncode}:\n{text[-3000:]}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Run(seconds, cpu, round(peak, 1), text)


def _peak_mb(pid: int) -> float:
    with contextlib.suppress(OSError, psutil.NoSuchProcess):
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return sum(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024
    return 0.0


def snakemake(directory: Path, *arguments: str) -> Run:
    """Run this checkout's workflow in `directory`, on all cores; its text has the job table."""
    cores = str(len(os.sched_getaffinity(0)))
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile"), "--cores", cores]
    return program([*command, "--printshellcmds", *arguments], directory)


def configure(directory: Path, settings: dict[str, Any]) -> None:
    """Write the user's config.yaml of a run folder."""
    (directory / "config").mkdir(parents=True)
    (directory / "config/config.yaml").write_text(yaml.safe_dump(settings))


def jobs(text: str) -> dict[str, int]:
    """{rule: jobs} of the first job table in Snakemake's output; targets count too."""
    _, _, table = text.partition("Job stats:")
    rows = (re.fullmatch(r"(\w+)\s+(\d+)", line.strip()) for line in table.partition("\ntotal")[0].splitlines())
    return {row[1]: int(row[2]) for row in rows if row}
