"""What ends a job on a cluster, each for real: the retry carries on, and its results are the same bytes."""

import cluster
import pytest
from cluster_training import (
    MINUTES,
    SECONDS,
    check,
    complete,
    controlled,
    copy,
    facts,
    made,
    saved,
    slow_first_run,
)
from workflow import edit

pytestmark = [pytest.mark.cluster, pytest.mark.slow]
BALLAST = """time.sleep(0.2)
        if step == 20:
            global _ballast
            _ballast = b"x" * 2_000_000_000"""


def test_a_cancelled_job_carries_on(prepared, tmp_path):
    place = copy(prepared, tmp_path)
    with controlled(place) as snakemake:
        job = saved(place)
        cluster.ask("scancel", job.id)
        complete(place, snakemake)
    first, second = check(prepared, place)
    assert first == job.id != second


def test_a_job_at_its_time_limit_carries_on_and_gets_more(prepared, tmp_path):
    """The limit is lowered below what the training knows of, so that Slurm ends the job."""
    place = copy(prepared, tmp_path)
    slow_first_run(place, 2)
    with controlled(place) as snakemake:
        job = saved(place, 3)
        cluster.ask("scontrol", "update", f"jobid={job.id}", "timelimit=1")
        cluster.until(lambda: facts(job.id, "%T") == "TIMEOUT", SECONDS, "the time limit")
        complete(place, snakemake)
    first, second = check(prepared, place)
    assert first == job.id
    assert facts(second, "%l") == f"{2 * MINUTES}:00"


def test_a_training_saves_before_its_time_is_up(prepared, tmp_path):
    place = copy(prepared, tmp_path)
    slow_first_run(place, 1.2)
    classes = place / "config/config.yaml"
    classes.write_text(classes.read_text().replace(f'"runtime": {MINUTES}', '"runtime": 1'))
    edit(place / "config/config.yaml", '"save_minutes": 0.01', '"save_minutes": 10')
    with controlled(place) as snakemake:
        complete(place, snakemake)
    first, second = check(prepared, place, redone=0)
    assert facts(second, "%l") == "2:00"


def test_a_job_over_its_memory_carries_on_with_more(prepared, tmp_path):
    place = copy(prepared, tmp_path)
    edit(place / "scripts/common/training_state.py", "time.sleep(0.2)", BALLAST)
    with controlled(place) as snakemake:
        complete(place, snakemake)
    first, second = check(prepared, place)
    assert max(step.number for step in made(place) if step.job == first) in range(20, 35)
    assert facts(first, "%T") in ("FAILED", "OUT_OF_MEMORY")
    memory = [int(facts(job, "%m").removesuffix("M")) for job in (first, second)]
    assert memory[0] < 3500 < memory[1]
