"""The report of what failed: from records of Snakemake's logger, logs of steps, and answers of Slurm."""

import logging
import os
import re
import resource
import shlex
import socket
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import workflow
from hypothesis import given, settings
from hypothesis import strategies as st

from scripts.common import failures, log_text, slurm

CHAINED = """\
12:00:00 begun
Traceback (most recent call last):
  File "a.py", line 1, in <module>
KeyError: 'first'

During handling of the above exception, another exception occurred:

Traceback (most recent call last):
  File "b.py", line 2, in <module>
    raise ValueError("second")
ValueError: second
\tits own further line
12:00:01 ended
"""
TORCHRUN = """\
[rank1]: Traceback (most recent call last):
[rank1]:   File "b.py", line 2, in main
[rank1]: ValueError: of rank 1
E1122 12:00:00 failed (exitcode: 1) local_rank: 1
Traceback (most recent call last):
  File "run.py", line 9, in <module>
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
=====
"""


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("", []),
        ("x\nFailed on here: peak memory 3 MB (largest process)\n", ["x"]),
        ("a\nError: old\nHint: old\nb\nError: x\nmore\nHint: y\n", ["Error: x", "more", "Hint: y"]),
        (f"{CHAINED}Error: z\nHint: w\nFailed on here: peak memory 3 MB (largest process)\n", ["Error: z", "Hint: w"]),
        (CHAINED, [*CHAINED.splitlines()[7:12]]),
        (f"Error: z\nHint: w\n{CHAINED}", [*CHAINED.splitlines()[7:12]]),
        (TORCHRUN, TORCHRUN.splitlines()[:3]),
        (" 10%|#   |\r 20%|##  |\r\x1b[31mgone\x1b[0m\n", [" 10%|#   |", " 20%|##  |", "gone"]),
        ("\n".join(map(str, range(99))), [str(n) for n in range(89, 99)]),
    ],
)
def test_the_last_thing_said_is_shown(text, wanted):
    assert log_text.excerpt(text) == wanted


def test_a_long_traceback_is_bounded_and_keeps_its_ends():
    frames = [f'  File "a.py", line {n}, in f' for n in range(500)]
    shown = log_text.excerpt("\n".join(["Traceback (most recent call last):", *frames, "E: " + "x" * 10_000]))
    assert len(shown) == log_text.LINES + 1 and max(map(len, shown)) < log_text.WIDTH + 10
    assert shown[0].startswith("Traceback") and shown[-1].startswith("E: xx") and "472 lines" in shown[1]


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        (("OUT_OF_MEMORY", None, 5.0, 100.0, None), "out of memory: give"),
        (("TIMEOUT", 15, 5.0, 100.0, "01:00:00"), "out of time (01:00:00)"),
        (("CANCELLED", 15, None, None, None), "cancelled"),
        (("NODE_FAIL", None, None, None, None), "ended by Slurm (NODE_FAIL)"),
        (("FAILED", 9, 95.0, 100.0, None), "probably out of memory"),
        (("FAILED", 9, None, 100.0, None), "probably out of memory"),
        (("FAILED", 9, 40.0, 100.0, None), "below its request"),
        ((None, 11, 40.0, 100.0, None), "signal 11 (SIGSEGV)"),
        (("FAILED", None, 99.0, 100.0, None), ""),
        ((None, 999, None, None, None), ""),
    ],
)
def test_reasons(facts, said):
    assert said in failures.reason(*facts)
    assert bool(said) == bool(failures.reason(*facts))


# what Slurm 22.05 wrote of a job that took more memory than it had asked for
SCONTROL = (
    "JobId=7 JobName=4c0bd1ad UserId=root(0) GroupId=root(0) MCS_label=N/A Priority=1 Nice=0 Account=ml QOS=normal "
    "JobState=FAILED Reason=NonZeroExitCode Dependency=(null) Requeue=1 Restarts=0 BatchFlag=1 Reboot=0 ExitCode=0:9 "
    "RunTime=00:00:06 TimeLimit=04:00:00 TimeMin=N/A Partition=cpu AllocNode:Sid=vm:1 ReqNodeList=(null) "
    "ExcNodeList=(null) NodeList=node2 BatchHost=node2 NumNodes=1 NumCPUs=2 NumTasks=1 CPUs/Task=2 "
    "TRES=cpu=2,mem=700M,node=1,billing=2 MinCPUsNode=2 MinMemoryNode=700M MinTmpDiskNode=0 Features=(null) "
    "Comment=rule_demo_draw_slides Command=(null) WorkDir=/a b/c StdErr=/a b/c/7.log Power=\n"
)
SACCT = """\
7|FAILED|0:9|node2|cpu|ml|normal|00:00:06|04:00:00|700M|
7.batch|FAILED|0:9|node2|||||||135.50M
7.0|CANCELLED by 0|0:9|node2|||||||1.20G
"""


def test_what_slurm_says_is_read():
    told = {"state": "FAILED", "signal": 9, "node": "node2", "partition": "cpu", "account": "ml", "limit": "04:00:00"}
    assert slurm.parse_scontrol(SCONTROL) == told | {"asked_mb": 700.0}
    assert slurm.parse_sacct(SACCT, "7") == told | {"asked_mb": 700.0, "peak_mb": 135.5 + 1.2 * 1024}
    assert slurm.parse_sacct("", "7") == slurm.parse_scontrol("slurm_load_jobs error") == {}
    assert slurm.parse_sacct("7|CANCELLED by 1000|0:0|None assigned||||||1Tn|", "7")["state"] == "CANCELLED"


def info(number: int, rule: str, **more) -> dict:
    """A JOB_INFO record's facts, as Snakemake gives them."""
    return {"event": "job_info", "jobid": number, "rule_name": rule, "wildcards": {}, "threads": 2,
            "resources": {"mem_mb": 600, "runtime": 60}} | more  # fmt: skip


def error(number: int, rule: str, **more) -> dict:
    """A JOB_ERROR record's facts."""
    return {"event": "job_error", "jobid": number, "rule_name": rule, "rule_msg": None, "input": [], "output": [],
            "log": [], "conda_env": None, "container_img": None, "aux": {},
            "shellcmd": f"env A=1 {rule}"} | more  # fmt: skip


def watch(*records: dict | str) -> failures.Watch:
    """A watch that saw these records (texts: plain errors) on a logger."""
    seen = failures.Watch()
    logger = logging.Logger("of this test", logging.INFO)
    logger.addHandler(seen)
    for facts in records:
        if isinstance(facts, str):
            logger.error(facts)
        else:
            logger.error("message", extra=facts)
    return seen


@pytest.fixture(autouse=True)
def no_slurm(monkeypatch, tmp_path):
    """Slurm's commands are not asked by these tests, but where they put their own in this folder."""
    commands = tmp_path / "commands"
    commands.mkdir()
    monkeypatch.setenv("PATH", f"{commands}:/bin:/usr/bin")
    for name in ("scontrol", "sacct"):
        (commands / name).write_text("#!/bin/sh\nexit 1\n")
        (commands / name).chmod(0o755)
    return commands


def test_what_succeeds_at_a_later_attempt_is_not_told(tmp_path):
    seen = watch(info(1, "a"), error(1, "a"), info(1, "a"), {"event": "job_finished", "job_id": 1}, info(2, "b"))
    assert not seen.failed and seen.report(tmp_path) == ""


def test_the_last_attempt_is_told_with_its_own_request(tmp_path):
    more = {"resources": {"mem_mb": 1200, "runtime": 60}, "wildcards": {"shard": "s1"}}
    text = watch(info(1, "a"), error(1, "a"), info(1, "a", **more), error(1, "a")).report(tmp_path)
    assert text.startswith("1 job failed:\n\na (shard=s1), attempt 2\n") and "of 1200 MB asked for" in text


def test_beyond_five_each_has_a_line(tmp_path):
    log = tmp_path / "log"
    log.write_text("Error: seven\nHint: none\n")
    text = watch(*(error(n, f"rule_{n}", log=[str(log)]) for n in range(7))).report(tmp_path)
    assert text.startswith("7 jobs failed; the first 5:") and text.count("by hand:") == failures.IN_FULL
    assert text.endswith("The others:\n  rule_5: Error: seven\n  rule_6: Error: seven")


def test_a_kill_is_told_from_the_exit_status(tmp_path):
    said = "CalledProcessError in file x, line 1:\nCommand 'x' returned non-zero exit status 137."
    text = watch(info(1, "a"), said, error(1, "a")).report(tmp_path)
    assert "killed by signal 9: probably out of memory" in text and "its log says nothing" in text


def test_a_job_of_slurms_is_told_even_when_it_is_forgotten(tmp_path, no_slurm):
    log = tmp_path / "log"
    log.write_text("Failed on n3, Slurm job 7: peak memory 555 MB (largest process)\nError: x\nHint: y\n")
    failed = error(1, "a", log=[str(log)], aux={"external_jobid": "7"})
    text = watch(info(1, "a"), failed).report(tmp_path)
    assert "ran on n3, Slurm job 7\n  memory: peak 555 MB of 600 MB asked for\n" in text
    assert "  its log was last written to before this attempt began:\n    Error: x\n    Hint: y\n" in text
    os.utime(log, (time.time() + 9, time.time() + 9))
    text = watch(info(1, "a"), failed).report(tmp_path)
    assert "asked for\n    Error: x\n    Hint: y\n" in text

    (no_slurm / "scontrol").write_text(f"#!/bin/sh\ncat <<'END'\n{SCONTROL}\nEND\n")
    text = watch(info(1, "a"), failed).report(tmp_path)
    assert "ran on node2, Slurm job 7: FAILED\n  memory: peak 555 MB of 700 MB" in text
    assert "cause" not in text  # it had an error of its own
    text = watch(info(1, "a"), {**failed, "log": []}).report(tmp_path)
    assert "memory: peak unknown of 700 MB" in text and "cause: killed by signal 9: probably out of memory" in text
    (no_slurm / "sacct").write_text(f"#!/bin/sh\ncat <<'END'\n{SACCT}\nEND\n")
    text = watch(info(1, "a"), failed).report(tmp_path)
    assert "memory: peak 1364 MB of 700 MB" in text and "probably out of memory" in text


def test_slurm_may_say_itself_that_memory_was_exceeded(tmp_path, no_slurm):
    log, said = tmp_path / "7.log", "slurmstepd-node1: error: StepId=7.0 exceeded memory limit (2 > 1), being killed"
    log.write_text(f"Finished\n{said}\n{said}\nShutting down, this might take some time.\n")
    (no_slurm / "scontrol").write_text("#!/bin/sh\necho JobState=FAILED ExitCode=1:0\n")
    failed = error(1, "a", log=[str(tmp_path / "none"), str(log)], aux={"external_jobid": "7"})
    text = watch(info(1, "a"), failed).report(tmp_path)
    assert "Slurm job 7: FAILED\n  memory: peak unknown of 600 MB asked for\n  cause: out of memory" in text
    assert f"\n    {said}\n  log:" in text
    log.write_text("srun: error: node1: task 0: Exited with exit code 1\n")
    assert "cause" not in watch(info(1, "a"), failed).report(tmp_path)


def test_torchrun_tells_of_a_killed_process(tmp_path):
    log = tmp_path / "log"
    log.write_text("x\n  traceback : Signal 9 (SIGKILL) received by PID 77\n=====\n")
    assert "killed by signal 9" in watch(error(1, "a", log=[str(log)])).report(tmp_path)


def test_of_a_group_who_failed_is_told(tmp_path):
    log = tmp_path / "7.log"
    log.write_text("Error in rule b:\n    jobid: 0\n    output: b/2\n")
    members = [("a", "a/1"), ("b", "b/1"), ("b", "b/2")]
    group = {"event": "group_error", "groupid": "g", "external_jobid": "7", "aux_logs": [str(log)],
             "job_error_info": [{"jobid": n} for n in range(3)]}  # fmt: skip
    records = [group, *(error(n, rule, output=[out], shellcmd=f"env {out}") for n, (rule, out) in enumerate(members))]
    text = watch(*records).report(tmp_path)
    assert text.startswith("1 job failed:\n\nb of group g\n") and "Slurm job 7" in text and "env b/2" in text

    log.write_text("srun: error: Killed")
    own = [tmp_path / name for name in "abc"]
    own[1].write_text("running")
    for record, path in zip(records[1:], own, strict=True):
        record["log"] = [str(path)]
    assert "env b/1" in watch(*records).report(tmp_path)


STEP = 'env A=1 python -m scripts.x --settings \'{"a": "b | c"}\' --name x'


@pytest.mark.parametrize(
    ("command", "asked", "conda", "job", "wanted"),
    [
        (f"{STEP} 2>&1 | tee 'a b.log'", {}, None, None, STEP),
        (f"{STEP} 2>&1 | tee a b", {}, None, None, f"{STEP} 2>&1 | tee a b"),
        (STEP, {}, "/e/1 2", None, f"source \"$(conda info --base)/bin/activate\" '/e/1 2' && {STEP}"),
        (STEP, {}, None, "7", f"srun --nodes=1 --ntasks=1 --cpus-per-task=3 {STEP}"),
        (
            STEP,
            {"mem_mb": 9, "runtime": 8, "gpu": 2, "gpu_model": "h200", "slurm_account": "ml", "constraint": "a&b"},
            None,
            "7",
            "srun --account=ml '--constraint=a&b' --nodes=1 --ntasks=1 --cpus-per-task=3 --mem=9 --time=8"
            f" --gpus=h200:2 {STEP}",
        ),
        (
            STEP,
            {"nodes": 2, "tasks": 2, "mpi": "srun", "slurm_extra": "--gpus-per-node=2"},
            None,
            "7",
            f"salloc --nodes=2 --ntasks=2 --cpus-per-task=3 --gpus-per-node=2 {STEP}",
        ),
        ("env A=$(cat u) x", {}, None, "7", "srun --nodes=1 --ntasks=1 --cpus-per-task=3 bash -c 'env A=$(cat u) x'"),
        (
            "cp a b && env x",
            {},
            None,
            "7",
            "srun --nodes=1 --ntasks=1 --cpus-per-task=3 bash -c 'cp a b && env x'",
        ),
    ],
)
def test_the_command_by_hand(command, asked, conda, job, wanted):
    known = failures.Failure("r", {}, 1, 0.0, asked, 3, command, conda, [], None, job=job)
    made = failures.by_hand(known, {}, Path("/a b"))
    assert shlex.split(made) == shlex.split(f"cd '/a b' && {wanted}")


def test_secrets_are_not_shown(tmp_path, monkeypatch):
    log = tmp_path / "log"
    monkeypatch.setenv("WANDB_API_KEY", "abcdef123456")
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path))
    tokens = ("hf_" + "Q" * 30, "abcdef123456", "ann:secret")
    log.write_text(f"Error: {tokens[0]} {tokens[1]} https://{tokens[2]}@host/x\nHint: none\n")
    text = watch(error(1, "a", log=[str(log)])).report(tmp_path)
    assert not any(token in text for token in tokens)
    assert "Error: *** *** https://***@host/x" in text and str(tmp_path) in text


def test_a_report_that_goes_wrong_hides_nothing(tmp_path):
    seen = watch(error(1, "a"))
    seen.failed[1].logs = [types.SimpleNamespace()]
    assert "no report" in seen.report(tmp_path) and "see the messages above" in seen.report(tmp_path)


@settings(max_examples=300, deadline=None)
@given(text=st.text() | st.binary().map(lambda b: b.decode("latin1")), number=st.text(max_size=3))
def test_any_text_is_read(text, number):
    for given_ in (text, f"{CHAINED}{text}", f"Error: {text}", f"[rank0]: {text}Traceback (most recent call last):"):
        assert all(len(line) < log_text.WIDTH + 10 for line in log_text.excerpt(given_))
    slurm.parse_scontrol(text)
    slurm.parse_scontrol(f"ExitCode={text} MinMemoryNode={text}")
    slurm.parse_sacct(text, number)
    slurm.parse_sacct(f"{number}|{text}|{text}\n{number}.0||||||||||{text}", number)
    log_text.hide_secrets(text, {"HF_TOKEN": number, "A_SECRET": text})
    known = failures.Failure("r", {}, 1, 0.0, {}, 1, text, text, [], None, job="7")
    failures.by_hand(known, {}, Path("/"))


def test_a_step_and_the_launcher_of_one_say_where_and_how_much(tmp_path):
    code = "import os, signal, sys\nheld = b'x' * 300_000_000\n"
    (tmp_path / "killed.py").write_text(f"{code}os.kill(os.getpid(), signal.SIGKILL)\n")
    (tmp_path / "stops.py").write_text(f"from scripts.common import step\n{code}step.run(lambda argv: 1 / 0)\n")
    own = {"PYTHONPATH": f"{workflow.ROOT}:{tmp_path}", "PATH": os.environ["PATH"]}
    launch = [sys.executable, "-m", "scripts.common.launch", "--", "killed"]
    # Linux counts what a process was before its exec: a copy of this one.
    most = max(700, 50 + resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    for command, status, job in [(launch, 137, "7"), ([sys.executable, "-m", "stops"], 1, None)]:
        where = {"SLURM_JOB_ID": job, "SLURMD_NODENAME": "n1"} if job else {}
        done = subprocess.run(command, cwd=tmp_path, env=own | where, capture_output=True, text=True, timeout=60)
        assert done.returncode == status, done.stderr
        log = tmp_path / "log"
        log.write_text(done.stderr)
        text = watch(error(1, "a", log=[str(log)], aux={"external_jobid": job} if job else {})).report(tmp_path)
        found = re.search(r"ran on (\S+)\n  memory: peak (\d+) MB", text.replace(", Slurm job 7", ""))
        assert found[1] == ("n1" if job else socket.gethostname()) and 280 < int(found[2]) < most, text
    assert "ZeroDivisionError" in text


MAIN = "def main(argv: Sequence[str] | None = None) -> None:\n"
PLANTED = {
    "digits": '    raise ValueError("planted")\n',
    "slides": '    from scripts.common.errors import KilnError\n\n    raise KilnError("planted: bad", "mend it")\n',
    "ultrasound": "    import os\n\n    os.kill(os.getpid(), 9)\n",
    "figures": '    if not Path("tried").exists():\n        Path("tried").touch()\n        raise OSError("once")\n',
}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[str, Path]:
    """What a real run says of which three rules fail for good and one fails at first; and its folder."""
    base = tmp_path_factory.mktemp("failures")
    checkout, folder = workflow.copy_checkout(base / "checkout"), base / "a run"
    for name, code in PLANTED.items():
        workflow.edit(checkout / f"scripts/demo/draw_{name}.py", MAIN, MAIN + code)
    folder.mkdir()
    demo = workflow.ROOT / "config/demo.yaml"
    done = workflow.run(
        checkout, folder, *(f"demo_draw_{name}" for name in PLANTED), "--configfile", str(demo), "--keep-going",
        "--retries", "1", "--set-resources", "demo_draw_digits:mem_mb=777", check=False,
    )  # fmt: skip
    text = done.stdout + done.stderr
    assert done.returncode and "At least one job did not complete successfully" in text, text
    return text.partition("\n3 jobs failed:\n\n")[2], folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "status", "said"),
    [
        ("digits", 1, ["ran on ", "MB of 777 MB", 'raise ValueError("planted")', "    ValueError: planted\n"]),
        ("slides", 1, ["    Error: planted: bad\n    Hint: mend it\n"]),
        ("ultrasound", -9, ["memory: peak unknown of ", "cause: killed by signal 9", "its log says nothing"]),
    ],
)
def test_a_real_run_tells_what_failed_and_how_to_see_it_again(run, name, status, said):
    report, folder = run
    [part] = [part for part in report.split("\n\n") if part.startswith(f"demo_draw_{name}, attempt 2\n")]
    assert all(text in part for text in said), part
    assert name == "ultrasound" or re.search(r"memory: peak \d\d+ MB of", part)
    command = part.split("by hand:\n")[1].splitlines()[0]
    assert command.startswith(f"cd {shlex.quote(str(folder))} && ") and "tee" not in command
    again = subprocess.run(["bash", "-c", f"{command}; exit $?"], cwd="/", capture_output=True, text=True, timeout=120)
    assert again.returncode in (status, 128 - status), again.stderr
    assert name == "ultrasound" or "planted" in again.stderr


@pytest.mark.slow
def test_a_real_run_tells_nothing_of_what_a_retry_mended(run):
    report, folder = run
    assert report and "demo_draw_figures" not in report and (folder / "tried").exists()
