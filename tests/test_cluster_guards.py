"""Controllers that die, meet or are set up wrongly, on the test cluster."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import cluster
import pytest
import workflow
import yaml

pytestmark = pytest.mark.cluster

DRAWN = "results/demo/draw_vases/files.json"
LISTED = "results/vase/list_labelled/labelled.parquet"
COMPARED = (DRAWN, LISTED, "results/vase/list_labelled/quarantine.tsv", "results/vase/list_labelled/summary.json")
SETTINGS = {
    "device": "cpu",
    "results": "results",
    "resources": {name: {"threads": 1, "mem_mb": 1000} for name in ("light", "cpu")},
    "demo": {"draw": {"vases": 8, "shared_vases": 2, "labelled_vases": 16, "clip_vases": 8, "image_size": 64}},
    "vase": {"images": "results/demo/draw_vases/images", "labelled": "results/demo/draw_vases/labelled"},
}


@pytest.fixture
def place(tmp_path) -> Path:
    """A checkout whose drawing waits for the file `go`."""
    place = cluster.checkout(tmp_path / "place")
    wait = "    import time\n\n    while not Path('go').exists():\n        time.sleep(0.1)\n"
    workflow.edit(place / "scripts/demo/draw_vases.py", "    args = made", f"{wait}    args = made")
    (place / "config/config.yaml").write_text(yaml.safe_dump(SETTINGS))
    return place


def running(place: Path) -> list[cluster.Job]:
    """The jobs of `place`, once one of them draws."""
    log = place / "results/logs/demo/draw_vases.log"
    cluster.until(log.exists, 90, "a drawing job")
    return cluster.jobs(place)


def kill(controller: subprocess.Popen) -> None:
    """SIGKILL, as by a login node that ends whatever runs for long."""
    os.killpg(controller.pid, signal.SIGKILL)
    controller.wait()


def submitted(place: Path) -> list[str]:
    """Rules of all jobs that were ever submitted from `place`, by Slurm's accounting."""
    lines = cluster.ask("sacct", "-XnP", "--starttime=now-1days", "--format=WorkDir,Comment,SubmitLine").splitlines()
    lines = [line for line in lines if line.startswith(f"{place}|")]
    return sorted(re.search(r"--comment '?rule_(\w+?)(_wildcards_.*)?'? ", line)[1] for line in lines)


def adopt(place: Path, *arguments: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "scripts.common.adopt", "--every", "0.5", *arguments]
    return subprocess.Popen(command, cwd=place, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_jobs_of_a_killed_controller_are_adopted(place, tmp_path):
    controller = cluster.start(place, LISTED)
    (job,) = running(place)
    kill(controller)

    locked = cluster.run(place, LISTED, check=False)
    assert locked.returncode != 0
    assert "LockException" in locked.stdout
    cluster.run(place, "--unlock")
    stopped = cluster.run(place, LISTED, check=False)
    assert stopped.returncode != 0
    for part in (job.id, "demo_draw_vases", job.node, "Hint: `make adopt`", f"scancel {job.id}"):
        assert part in stopped.stdout
    assert [one.id for one in cluster.jobs(place)] == [job.id]

    adopting = adopt(place)
    assert adopting.stdout.readline() == "Waiting for 1 job(s):\n"
    assert job.id in adopting.stdout.readline()
    meeting = cluster.run(place, LISTED, check=False)
    assert meeting.returncode != 0
    assert f"scripts.common.adopt, pid {adopting.pid}" in meeting.stdout
    assert adopting.poll() is None
    (place / "go").touch()
    said, _ = adopting.communicate(timeout=90)
    assert adopting.returncode == 0, said
    assert "now carries on" in said

    cluster.run(place, LISTED)
    assert submitted(place) == ["demo_draw_vases", "vase_labelled_vase_list_labelled"]  # the latter in its group

    (tmp_path / "other.yaml").write_text(yaml.safe_dump({"demo": {"draw": {"seed": 1}}}))
    changed = workflow.planned(place, place, LISTED, "--configfile", str(tmp_path / "other.yaml"))
    assert changed["demo_draw_vases"] == 1  # Snakemake knows by which settings the adopted results were made

    undisturbed = tmp_path / "undisturbed"
    (undisturbed / "config").mkdir(parents=True)
    (undisturbed / "go").touch()
    (undisturbed / "config/config.yaml").write_text(yaml.safe_dump(SETTINGS))
    workflow.run(place, undisturbed, LISTED)
    for name in COMPARED:
        assert (place / name).read_bytes() == (undisturbed / name).read_bytes(), name


def test_adopting_unlocks_what_a_killed_controller_locked(place):
    controller = cluster.start(place, DRAWN)
    running(place)
    kill(controller)
    (place / "go").touch()
    adopting = adopt(place)
    said, _ = adopting.communicate(timeout=120)
    assert adopting.returncode == 0, said
    assert not list((place / ".snakemake").glob("locks/*"))
    assert "Nothing to be done" in cluster.run(place, DRAWN).stdout
    assert submitted(place) == ["demo_draw_vases"]


def test_two_controllers_at_once(place):
    first = cluster.start(place, DRAWN)
    running(place)
    second = cluster.run(place, DRAWN, check=False)
    assert second.returncode != 0
    assert "LockException" in second.stdout
    cluster.run(place, "--unlock")  # which the message offers, though the first lives
    third = cluster.run(place, DRAWN, check=False)
    assert third.returncode != 0
    assert f"another process writes here: snakemake, pid {first.pid} of " in third.stdout
    waiting = adopt(place)
    said, _ = waiting.communicate(timeout=60)
    assert waiting.returncode == 1
    assert f"pid {first.pid} of " in said
    (place / "go").touch()
    assert first.wait(300) == 0, (place / "snakemake.log").read_text()[-4000:]
    assert submitted(place) == ["demo_draw_vases"]


def test_jobs_of_another_working_directory_are_none_of_ours(place, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        (folder / "config").mkdir(parents=True)
        (folder / "config/config.yaml").write_text(yaml.safe_dump(SETTINGS))
    (two / "go").touch()
    table = ("--slurm-partition-config", str(place / "slurm/config.yaml"))  # relative, it would be sought in there
    first = cluster.start(place, "--directory", str(one), *table, DRAWN)
    cluster.until(lambda: (one / "results/logs/demo/draw_vases.log").exists(), 90, "a drawing job")
    cluster.run(place, "--directory", str(two), *table, DRAWN)
    assert first.poll() is None
    (one / "go").touch()
    assert first.wait(300) == 0


@pytest.mark.parametrize(
    ("old", "new", "parts"),
    [
        ("slurm_account: ml", "slurm_account: lm", ("slurm_account = lm", "slurm/config.yaml", "your accounts: ml")),
        ("  cpu: {", "  cpus: {", ("partition cpus", "slurm/config.yaml", "your partitions: cpu, gpu")),
    ],
)
def test_wrong_profile_stops_before_anything_is_submitted(place, old, new, parts):
    workflow.edit(place / "slurm/config.yaml", old, new)
    started = time.monotonic()
    done = cluster.run(place, DRAWN, check=False)
    assert done.returncode != 0
    for part in parts:
        assert part in done.stdout
    assert "submitted with SLURM jobid" not in done.stdout
    assert submitted(place) == []
    assert time.monotonic() - started < 60
