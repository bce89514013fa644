"""Disks that fill up, and disks that show files late: nothing is lost, and the same command carries on."""

import subprocess
from pathlib import Path

import cluster
import pytest
from cluster_training import (
    FOLDER,
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
    saved,
)
from workflow import edit

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


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
    assert not seen(view, STATE).exists()
    cluster.ask("rm", "--recursive", str(place / STATE))  # what Snakemake removed in its view: here that is a copy
    (job,) = check(prepared, place, runs=1, redone=0)
    assert facts(job, "%T") == "COMPLETED"
    assert seen(view, TARGET).samefile(place / TARGET)
