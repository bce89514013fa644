import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import joblib
import pytest

from scripts.common import workers

ROOT = Path(__file__).resolve().parents[1]
SLEEPERS = """
import os, time
import joblib
from scripts.common import workers

def sleep(_):
    print("worker", os.getpid(), flush=True)
    time.sleep(600)

if __name__ == "__main__":
    print("parent", os.getpid(), flush=True)
    list(workers.pool(2)(joblib.delayed(sleep)(number) for number in range(2)))
"""


@pytest.mark.parametrize("processes", [1, 2])
def test_a_pool_gives_what_joblibs_own_gives(processes):
    work = workers.pool(processes, return_as="generator")(joblib.delayed(pow)(number, 2) for number in range(7))
    assert list(work) == [number**2 for number in range(7)]


def test_workers_of_a_killed_parent_end_and_with_them_the_rules_pipe(tmp_path):
    script, log = tmp_path / "sleepers.py", tmp_path / "log"
    script.write_text(SLEEPERS)
    piped = f"{sys.executable} {script} 2>&1 | tee {log}"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    pipe = subprocess.Popen(["bash", "-c", piped], env=environment, stdout=subprocess.PIPE, start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while len(started := dict(re.findall(r"(parent|worker) (\d+)", _text(log)))) < 2 or _text(log).count("wor") < 2:
            assert time.monotonic() < deadline, _text(log)
            time.sleep(0.05)
        os.kill(int(started["parent"]), signal.SIGKILL)
        pipe.communicate(timeout=60)  # ends only when no worker holds the pipe
    finally:
        if pipe.poll() is None:
            os.killpg(pipe.pid, signal.SIGKILL)


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def test_every_step_takes_its_processes_from_the_pool():
    own = [
        path.name
        for path in (ROOT / "scripts").rglob("*.py")
        if path.name != "workers.py"
        for call in re.findall(r"joblib\.Parallel\((.*)", path.read_text())
        if 'prefer="threads"' not in call
    ]
    assert own == []
