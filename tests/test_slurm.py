"""What we ask Slurm, and what stops a controller, with stand-ins for Slurm's commands on PATH."""

import os
import sys
from pathlib import Path

import pytest

from scripts.common import adopt, cluster_guard, slurm
from scripts.common.errors import KilnError

QUEUE = (
    "11|RUNNING|None|node1|/home/me|/work/a/.snakemake/slurm_logs/rule_rae_train/dinov2/%j.log|"
    "rule_rae_train_wildcards_dinov2|\n"
    "12|PENDING|Resources||/home/me|/work/b/.snakemake/slurm_logs/rule_x/%j.log|rule_x|\n"
    "13|PENDING|Priority||/work/a|/logs/14.log|group_ev|with a bar|\n"
    "14|RUNNING|None|node2|/work/a|/work/a/slurm-14.out|(null)|\n"
)


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """Put a stand-in on PATH: a name, what it prints, what it says on stderr, its exit status; others are absent."""
    monkeypatch.setenv("PATH", str(tmp_path))

    def add(name: str, prints: str = "", says: str = "", status: int = 0) -> Path:
        calls = tmp_path / f"{name}.calls"
        (tmp_path / name).write_text(
            f"#!{sys.executable}\nimport sys\n"
            f"open({str(calls)!r}, 'a').write(' '.join(sys.argv[1:]) + '\\n')\n"
            f"sys.stdout.write({prints!r})\nsys.stderr.write({says!r})\nsys.exit({status})\n"
        )
        (tmp_path / name).chmod(0o755)
        return calls

    return add


def test_jobs_are_told_apart_by_their_logs_and_else_by_where_snakemake_started(commands):
    asked = commands("squeue", QUEUE)
    assert [job.id for job in slurm.jobs_of(Path("/work/a"), Path("/home/me"))] == ["11"]
    assert [job.id for job in slurm.jobs_of(Path("/work/b"), Path("/work/b"))] == ["12"]
    assert [job.id for job in slurm.jobs_of(Path("/work/c"), Path("/work/a"))] == ["13"]
    assert f"--user {os.getuid()}" in asked.read_text()


def test_job_in_words(commands):
    commands("squeue", QUEUE)
    (job,) = slurm.jobs_of(Path("/work/a"), Path("/home/me"))
    assert str(job) == "11  rae_train dinov2  RUNNING  node1"
    (job,) = slurm.jobs_of(Path("/work/c"), Path("/work/a"))
    assert job.comment == "group_ev|with a bar"
    assert "Priority" in str(job)


def test_silent_slurm_is_no_empty_queue(commands):
    with pytest.raises(KilnError, match="there is no squeue here"):
        slurm.jobs_of(Path("/work/a"), Path("/work/a"))
    commands("squeue", says="slurm_load_jobs error: Unable to contact slurm controller", status=1)
    with pytest.raises(KilnError, match="Unable to contact"):
        slurm.jobs_of(Path("/work/a"), Path("/work/a"))


@pytest.mark.parametrize(
    ("says", "wrong"),
    [
        ("sbatch: error: invalid partition specified: x\nallocation failure: Invalid partition name", "partition"),
        ("allocation failure: Invalid account or account/partition combination specified", "account"),
        ("allocation failure: Job violates accounting/QOS policy", None),
    ],
)
def test_only_a_wrong_name_is_a_refusal(commands, says, wrong):
    asked = commands("sbatch", says=says, status=1)
    assert slurm.refused("ml", "x") == wrong
    assert "--test-only --account=ml --partition=x" in asked.read_text()
    commands("sbatch", says="sbatch: Job 4 to start at 2026-11-22 in partition invalid account", status=0)
    assert slurm.refused("ml", "x") is None


def test_leftover_jobs_are_named_with_what_to_type(commands):
    commands("squeue", QUEUE)
    with pytest.raises(KilnError) as stopped:
        cluster_guard.refuse_leftovers(Path("/work/a"), Path("/work/a"))
    for part in ("2 Slurm job(s)", "11  rae_train dinov2  RUNNING  node1", "13  group_ev", "(Priority)"):
        assert part.strip("()") in stopped.value.message
    assert "make adopt" in stopped.value.hint
    assert "scancel 11 13" in stopped.value.hint
    cluster_guard.refuse_leftovers(Path("/work/c"), Path("/work/c"))


def test_account_is_checked_where_accounts_are_kept(commands):
    commands("sbatch")
    commands("sacctmgr", "ml\nml\nvision\n")
    cluster_guard.check_profile("ML", ["cpu"])
    cluster_guard.check_profile("ml, vision", [])
    with pytest.raises(KilnError) as stopped:
        cluster_guard.check_profile("lm", [])
    assert "slurm_account = lm" in stopped.value.message
    assert "your accounts: ml, vision" in stopped.value.hint
    assert "slurm/config.yaml" in stopped.value.hint


def test_account_is_left_to_sbatch_where_none_are_kept(commands):
    commands("sbatch")
    cluster_guard.check_profile("anything", ["cpu"])
    commands("sbatch", says="Invalid account or account/partition combination specified", status=1)
    with pytest.raises(KilnError, match="slurm_account = anything"):
        cluster_guard.check_profile("anything", [])


def test_partitions_are_checked_each(commands):
    commands("sacctmgr", "ml\n")
    commands("sinfo", "cpu\ngpu\ncpu\n")
    commands("sbatch", says="Invalid partition name specified", status=1)
    with pytest.raises(KilnError, match="partition fast: Slurm knows no such") as stopped:
        cluster_guard.check_profile("ml", ["fast"])
    assert "your partitions: cpu, gpu" in stopped.value.hint
    commands("sbatch", says="Invalid account or account/partition combination specified", status=1)
    with pytest.raises(KilnError, match="partition fast: not open to the account ml"):
        cluster_guard.check_profile("ml", ["fast"])
    asked = commands("sbatch")
    cluster_guard.check_profile(None, ["cpu", "gpu"])
    assert "--partition=gpu" in asked.read_text().splitlines()[-1]


@pytest.mark.parametrize(("age", "said"), [(119, True), (120, False)])
def test_min_job_age_is_compared_with_the_first_look(commands, age, said):
    commands("scontrol", f"Configuration data\nMinJobAge               = {age} sec\nMinMemory = 0\n")
    heard = []
    cluster_guard.advise_on_job_age(40, heard.append)
    assert bool(heard) == said
    if said:
        assert "MinJobAge of this cluster is 119 s" in heard[0]
        assert "status-checks` to 39" in heard[0]


def test_unknown_min_job_age_is_no_matter(commands):
    heard = []
    cluster_guard.advise_on_job_age(40, heard.append)
    assert heard == []


def test_a_second_controller_is_told_who_the_first_is(tmp_path):
    with (
        cluster_guard.only_controller(tmp_path, "snakemake"),
        pytest.raises(KilnError, match=f"snakemake, pid {os.getpid()}"),
        cluster_guard.only_controller(tmp_path, "another"),
    ):
        pass


def test_adopting_waits_until_the_queue_is_empty_and_says_so_once(tmp_path, monkeypatch, capsys):
    job = slurm.Job("11", "RUNNING", "None", "node1", "", "", "rule_rae_train")
    answers = [[job], [job], []]
    monkeypatch.setattr(slurm, "jobs_of", lambda *_: answers.pop(0))
    adopt.main(["--directory", str(tmp_path), "--every", "0"])
    assert capsys.readouterr().out.splitlines() == [
        "Waiting for 1 job(s):",
        "    11  rae_train  RUNNING  node1",
        "No job of an earlier Snakemake is left; the same `snakemake --profile slurm ...` now carries on.",
    ]
    assert not answers
