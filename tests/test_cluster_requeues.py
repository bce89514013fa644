"""Jobs that Slurm starts again itself: the training carries on, and its results are the same bytes."""

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


def test_a_preempted_job_is_requeued_and_carries_on(prepared, tmp_path):
    place = copy(prepared, tmp_path)
    slow_first_run(place, 1.2)
    with controlled(place, "--set-resources", "rae_train_autoencoder:slurm_partition=preempt") as snakemake:
        job = saved(place)
        taken = cluster.ask("squeue", "--noheader", "--nodelist", job.node, "--states", "running", "--format", "%C")
        others = sum(map(int, taken.split())) - 1
        cluster.ask("sbatch", "--partition=cpu", f"--nodelist={job.node}", f"--cpus-per-task={8 - others}", "--mem=10",
                    "--output=/dev/null", "--wrap=sleep 3")  # fmt: skip
        complete(place, snakemake)
    assert check(prepared, place) == [job.id, job.id]
