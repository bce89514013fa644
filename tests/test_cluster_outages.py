"""Faults that every job of a cluster feels: to be run on a cluster of their own."""

import os
import signal
import subprocess
import time
from pathlib import Path

import cluster
import pytest
from cluster_training import check, complete, controlled, copy, made, saved

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


def kill_daemon(name: str) -> None:
    """Kill one of the cluster's own daemons, and see it gone."""
    pid = int((Path(os.environ["KILN_CLUSTER"]) / f"{name}.pid").read_text())
    os.kill(pid, signal.SIGKILL)
    cluster.until(lambda: not Path(f"/proc/{pid}/exe").exists(), what=f"the end of {name}")


def answers(*command: str) -> bool:
    """Whether a Slurm command succeeds."""
    return subprocess.run(command, capture_output=True, check=False, timeout=60).returncode == 0


def test_a_job_whose_node_goes_down_carries_on_on_another(prepared, tmp_path):
    place = copy(prepared, tmp_path)
    with controlled(place) as snakemake:
        job = saved(place)
        node = ("scontrol", "update", f"nodename={job.node}", "reason=test")
        cluster.ask(*node, "state=down")
        cluster.ask(*node, "state=drain")  # its daemon lives, and would bring it back
        try:
            other = cluster.until(lambda: [j for j in cluster.jobs(place) if j.node and j.node != job.node], 120)
            complete(place, snakemake)
        finally:
            cluster.ask(*node, "state=resume")
    assert check(prepared, place) == [job.id, job.id] and other[0].id == job.id


@pytest.mark.parametrize("daemons", [("slurmctld",), ("slurmctld", "slurmdbd")])
def test_a_controller_of_slurm_that_dies_and_comes_back_costs_nothing(prepared, tmp_path, daemons):
    """Without slurmdbd, nothing that Snakemake could ask knows its jobs until slurmctld is back."""
    place = copy(prepared, tmp_path)
    with controlled(place) as snakemake:
        job = saved(place)
        for name in daemons:
            kill_daemon(name)
        before = len(made(place))
        time.sleep(15)  # long enough for Snakemake to ask in vain
        assert len(made(place)) > before, "the job did not go on"
        for name in reversed(daemons):  # slurmctld does not start before slurmdbd answers
            cluster.ask(name)
            if name == "slurmdbd":
                cluster.until(lambda: answers("sacctmgr", "--noheader", "list", "cluster"), what="slurmdbd")
        complete(place, snakemake)
    assert check(prepared, place, runs=1, redone=0) == [job.id]
