"""What is told of jobs that failed on Slurm, each in a way of its own: and the command that is told shows it again."""

import re
import subprocess
import time

import cluster
import pytest
from workflow import ROOT, edit

pytestmark = pytest.mark.cluster

MAIN = "def main(argv: Sequence[str] | None = None) -> None:\n"
PLANTED = {
    "digits": '    raise ValueError("planted")\n',
    "slides": '    import time\n    held = b"x" * 1_000_000_000\n    time.sleep(60)\n',
    "ultrasound": "    import time\n    time.sleep(300)\n",
    "vases": "    import time\n    time.sleep(300)\n",
}
MEMORY_MB = 700


def rule(name: str) -> str:
    return f"demo_draw_{name}"


@pytest.fixture(scope="module")
def told(tmp_path_factory) -> dict[str, str]:
    """{rule: its part of the report} of one run in which a job has a bug, one takes too much memory, one is
    cancelled and one takes too long."""
    place = cluster.checkout(tmp_path_factory.mktemp("failures") / "a checkout")
    for name, code in PLANTED.items():
        edit(place / f"scripts/demo/draw_{name}.py", MAIN, MAIN + code)
    (place / "config/demo.yaml").write_text((ROOT / "config/demo.yaml").read_text())
    asked = [f"{rule('slides')}:mem_mb={MEMORY_MB}"]
    asked += [f"{rule('vases')}:slurm_partition=short", f"{rule('vases')}:runtime=1"]
    process = cluster.start(
        place, *map(rule, PLANTED), "--configfile", "config/demo.yaml", "--retries", "0", "--set-resources", *asked
    )
    try:

        def sleeping() -> list[cluster.Job]:
            return [job for job in cluster.jobs(place) if rule("ultrasound") in job.comment and job.state == "RUNNING"]

        [job] = cluster.until(sleeping, 120, "the job that is to be cancelled")
        time.sleep(5)
        cluster.ask("scancel", job.id)
        assert process.wait(400)
    finally:
        process.kill()
    text = (place / "snakemake.log").read_text()
    _, found, report = text.partition("\n4 jobs failed:\n\n")
    assert found and "At least one job did not complete successfully" in report, text[-8000:]
    parts = {part.split(None, 1)[0]: part for part in report.split("\n\n")}
    return {name: parts[rule(name)] for name in PLANTED}


@pytest.fixture(scope="module")
def again(told) -> dict[str, subprocess.Popen]:
    """The commands that the report tells, all started by hand, in a shell that stands elsewhere."""
    started = {
        name: subprocess.Popen(
            ["bash", "-c", part.split("by hand:\n")[1].splitlines()[0]], cwd="/", text=True, errors="replace",
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
        )
        for name, part in told.items()
    }  # fmt: skip
    yield started
    for process in started.values():
        process.kill()


@pytest.mark.parametrize("name", PLANTED)
def test_node_job_and_memory_are_told(told, name):
    found = re.search(r"ran on (node\d), Slurm job (\d+): (\w+)\n  memory: peak (\d+) MB of (\d+) MB", told[name])
    assert found, told[name]
    node, job, state, peak, asked = found.groups()
    known = cluster.ask("sacct", "-n", "-X", "-P", "-o", "NodeList,State,ReqMem", "-j", job).split("|")
    assert node == known[0] and known[1].startswith(state) and known[2].strip() == f"{asked}M"
    assert 100 < int(peak) < 1600


def test_a_bug_is_told_and_seen_again(told, again):
    assert (
        re.search(r"Traceback .*\n(.*\n)*    ValueError: planted\n", told["digits"]) and "cause" not in told["digits"]
    )
    output, _ = again["digits"].communicate(timeout=120)
    assert again["digits"].returncode == 1 and "ValueError: planted" in output, output


def test_too_much_memory_is_told_and_seen_again(told, again):
    found = re.search(r"job \d+: FAILED\n  memory: peak (\d+) MB of (\d+) MB", told["slides"])
    assert int(found[1]) > int(found[2]) == MEMORY_MB
    assert "cause: out of memory" in told["slides"] and "exceeded memory limit" in told["slides"]
    output, _ = again["slides"].communicate(timeout=120)
    assert again["slides"].returncode and "exceeded memory limit" in output, output


def test_a_cancelled_job_is_told_and_its_step_runs_again(told, again):
    assert "CANCELLED" in told["ultrasound"] and "cause: cancelled\n" in told["ultrasound"]

    def running() -> list[str]:
        return cluster.ask("squeue", "--noheader", "--states=RUNNING", "--partition=cpu", "--format=%i %j").split("\n")

    # srun names a job after its program; of those by hand, this alone sleeps on in that partition
    again["digits"].wait(120)
    again["slides"].wait(120)
    [line] = cluster.until(lambda: [line for line in running() if line.endswith(" env")], 60, "the step by hand")
    cluster.ask("scancel", line.split()[0])
    output, _ = again["ultrasound"].communicate(timeout=60)
    assert again["ultrasound"].returncode and "CANCELLED" in output, output


def test_a_job_out_of_time_is_told_and_is_so_again(told, again):
    assert "TIMEOUT" in told["vases"] and "cause: out of time (00:01:00)" in told["vases"]
    output, _ = again["vases"].communicate(timeout=200)
    assert again["vases"].returncode and "DUE TO TIME LIMIT" in output, output
