"""What befalls jobs on a cluster, each fault for real: the training carries on, and its results are the same bytes."""

import subprocess
from pathlib import Path

import cluster
import pytest
from cluster_training import (
    FOLDER,
    MINUTES,
    SECONDS,
    STATE,
    TARGET,
    check,
    complete,
    controlled,
    copy,
    end,
    facts,
    fill,
    log,
    made,
    prepare,
    saved,
    text_of_training,
)
from workflow import edit

pytestmark = [pytest.mark.cluster, pytest.mark.slow]
BALLAST = """time.sleep(0.2)
        if step == 20:
            global _ballast
            _ballast = b"x" * 2_000_000_000"""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return prepare(tmp_path_factory)


def slow_first_run(place: Path, seconds: float) -> None:
    """Let each step of the first process that trains, not of later ones, take so long."""
    later = "len({line.split()[2] for line in open('steps.txt')}) > 1"
    edit(place / "scripts/common/training_state.py", "time.sleep(0.2)", f"time.sleep(0.2 if {later} else {seconds})")


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


def test_a_full_disk_is_named_and_once_there_is_room_the_same_command_carries_on(prepared, tmp_path):
    place = copy(prepared, tmp_path)
    (place / "results").rename(place / "copied")
    (place / "results").mkdir()
    cluster.ask("mount", "-t", "tmpfs", "-o", "size=30m", "tmpfs", str(place / "results"))
    try:
        cluster.ask("cp", "--archive", f"{place}/copied/.", str(place / "results"))
        with controlled(place, "--retries", "0") as snakemake:
            job = saved(place)
            filler = fill(place / "results")
            assert end(place, snakemake) != 0
        messages = [p.read_text() for p in (place / ".snakemake/slurm_logs").rglob(f"{job.id}.log")]
        assert any("the disk is full (0 MB free)" in text and "Hint: free space" in text for text in messages), messages
        assert not list((place / FOLDER).glob("*")) and not list((place / STATE).rglob("*.partial"))
        assert len(list((place / STATE).glob("*/step-*"))) in (1, 2)
        filler.unlink()
        with controlled(place) as snakemake:
            complete(place, snakemake)
        first, second = check(prepared, place)
        assert first == job.id != second
    finally:
        cluster.ask("umount", "--lazy", str(place / "results"))


def show_late(place: Path, view: Path) -> None:
    """Let `view` hold what `place` holds, as links."""
    cluster.ask("cp", "--archive", "--link", "--no-clobber", f"{place}/.", str(view))


def seen(view: Path, path: str) -> Path:
    """Where a file below results lies in the view of results."""
    return view / Path(path).relative_to("results")


def test_files_that_the_login_node_sees_late_are_waited_for(prepared, tmp_path):
    """Snakemake has a view of the results that lags, as a network disk's does; the jobs have the disk itself."""
    place = copy(prepared, tmp_path)
    edit(place / "slurm/config.yaml", "latency-wait: 5", "latency-wait: 30")
    view = tmp_path / "view"
    show_late(place / "results", view)
    before = ("unshare", "--mount", "sh", "-c", 'mount --bind "$1" "$2" && shift 2 && cd . && exec "$@"', "sh")
    with controlled(place, before=(*before, str(view), str(place / "results"))) as snakemake:
        cluster.until(lambda: "Waiting at most 30 seconds for missing files" in log(place), SECONDS, "a missing file")
        assert (place / TARGET).exists() and not seen(view, FOLDER).exists()
        with pytest.raises(subprocess.TimeoutExpired):
            snakemake.wait(5)
        show_late(place / "results", view)
        complete(place, snakemake)
    (job,) = check(prepared, place, runs=1, redone=0)
    assert facts(job, "%T") == "COMPLETED"
    assert seen(view, TARGET).samefile(place / TARGET)
