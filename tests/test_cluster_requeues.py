"""Jobs that Slurm starts again itself: the training carries on, and its results are the same bytes."""

import time

import cluster
import pytest
from cluster_training import (
    SECONDS,
    TARGET,
    check,
    complete,
    controlled,
    copy,
    saved,
    slow_first_run,
    text_of_training,
)
from workflow import edit

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


def test_a_requeued_job_carries_on(prepared, tmp_path):
    place = copy(prepared, tmp_path)
    with controlled(place) as snakemake:
        job = saved(place)
        cluster.ask("scontrol", "requeue", job.id)
        complete(place, snakemake)
    assert check(prepared, place) == [job.id, job.id]


def test_a_job_that_ends_after_its_training_and_before_its_time_trains_no_more(prepared, tmp_path):
    """Slurm may end a job between the step's last act and its own: what the job made is then deleted."""
    place = copy(prepared, tmp_path)
    step = place / "scripts/rae/train_autoencoder.py"
    edit(step, "state.remove(args.meta)", "state.remove(args.meta); __import__('time').sleep(15)")
    with controlled(place) as snakemake:
        job = saved(place)
        cluster.until((place / TARGET).exists, SECONDS, "the end of the training")
        cluster.ask("scontrol", "requeue", job.id)
        cluster.until(lambda: not (place / TARGET).exists(), SECONDS, "the end of what the job made")
        complete(place, snakemake)
    assert set(check(prepared, place, runs=None)) == {job.id}
    assert text_of_training(place).count("resumed from") == 1


def preempt(job: cluster.Job) -> None:
    """Have others want the CPU of `job` until Slurm takes it from it: jobs of other tests come and go on its node."""
    running = ("squeue", "--noheader", "--nodelist", job.node, "--states", "running", "--format", "%C")
    until = time.monotonic() + SECONDS
    while "Restarts=0" in cluster.ask("scontrol", "show", "job", job.id):
        assert time.monotonic() < until, f"job {job.id} was not preempted"
        others = sum(map(int, cluster.ask(*running).split())) - 1
        wanted = cluster.ask("sbatch", "--parsable", "--partition=cpu", f"--nodelist={job.node}", "--mem=10",
                             f"--cpus-per-task={8 - others}", "--output=/dev/null", "--wrap=sleep 3")  # fmt: skip
        time.sleep(5)
        cluster.ask("scancel", wanted.strip())


def test_a_preempted_job_is_requeued_and_carries_on(prepared, tmp_path):
    place = copy(prepared, tmp_path)
    slow_first_run(place, 1.2)
    with controlled(place, "--set-resources", "rae_train_autoencoder:slurm_partition=preempt") as snakemake:
        job = saved(place)
        preempt(job)
        complete(place, snakemake)
    assert check(prepared, place) == [job.id, job.id]
