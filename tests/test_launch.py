"""The launcher as a user meets it: as processes that start, wait, die and pass signals on."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import workflow

from scripts.common import launch, locks
from scripts.common.errors import KilnError

ROOT = Path(__file__).resolve().parents[1]

# Says who it is in the file argv[1], then lives until the file argv[1].end holds its exit status; not for ever,
# so that a failing test leaves nothing behind.
TOY = """
import json, os, pathlib, signal, sys, time
place, end = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[1] + ".end")
if "TOY_HAS_NO_HANDLER" not in os.environ:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(5))
variables = {"gpus": "CUDA_VISIBLE_DEVICES", "deadline": "KILN_DEADLINE"}
facts = {"pid": os.getpid(), "argv": sys.argv[2:], **{key: os.environ.get(name) for key, name in variables.items()}}
place.with_suffix(".part").write_text(json.dumps(facts))
place.with_suffix(".part").rename(place)
for _ in range(6000):
    if end.exists():
        break
    time.sleep(0.02)
status = int(end.read_text())
os.kill(os.getpid(), -status) if status < 0 else sys.exit(status)
"""

# Sums the ranks over the group; the sum is right only if all processes are in it. SIGTERM is noted, and ends none.
GROUP = """
import os, pathlib, signal, sys, time, torch, torch.distributed as dist
dist.init_process_group("gloo")
rank = dist.get_rank()
total = torch.tensor([rank + 1.0])
dist.all_reduce(total)
place = pathlib.Path(f"{sys.argv[1]}.rank{rank}")
if sys.argv[3:] == ["notes"]:
    signal.signal(signal.SIGTERM, lambda *_: pathlib.Path(f"{place}.asked").touch())
else:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
part = pathlib.Path(f"{place}.part")
part.write_text(f"{os.getpid()} {dist.get_world_size()} {total.item()}")
part.rename(place)
end = time.monotonic() + float(sys.argv[2])
while time.monotonic() < end:
    time.sleep(0.05)
    if sys.argv[3:] == ["dies"] and rank == 3:
        os._exit(9)
if sys.argv[3:] != ["notes"]:
    dist.destroy_process_group()
"""

# What the launcher needs of srun: a task per node, all killed when one fails, the highest status; SIGTERM kills, too.
SRUN = """#!{python}
import os, signal, subprocess, sys, time
options = dict(one[2:].split("=") for one in sys.argv[1:] if one.startswith("--") and "=" in one)
command = sys.argv[next(i for i, one in enumerate(sys.argv) if i and not one.startswith("--")):]
nodes = range(int(options["nodes"]))
assert options["ntasks"] == options["nodes"] and options["ntasks-per-node"] == "1"
names = [{{"SLURM_NODEID": str(n), "SLURMD_NODENAME": f"node{{n}}"}} for n in nodes]
tasks = [subprocess.Popen(command, env=os.environ | one) for one in names]
signal.signal(signal.SIGTERM, lambda *_: [task.kill() for task in tasks])
while any(task.poll() is None for task in tasks):
    time.sleep(0.05)
    if any(task.poll() for task in tasks) and options["kill-on-bad-exit"] == "1":
        for task in tasks:
            task.kill()
sys.exit(max(task.returncode % 256 for task in tasks))
"""
SCONTROL = """#!/bin/sh
[ "$*" = "show node $SLURMD_NODENAME" ] && echo "NodeName=$3 Arch=x86_64 NodeAddr=127.0.0.1 NodeHostName=nowhere"
"""
JOB = {"SLURM_JOB_ID": "17", "SLURMD_NODENAME": "node0", "CUDA_VISIBLE_DEVICES": "4,5"}


@pytest.fixture
def start(tmp_path):
    """Start a launcher with `arguments` before `--` and a toy step after it; all end with the test."""
    (tmp_path / "toy_step.py").write_text(TOY)
    (tmp_path / "toy_group.py").write_text(GROUP)
    started: list[subprocess.Popen] = []
    # a shell's background jobs start with it ignored, and a launcher keeps what is ignored
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def run(*arguments: str, step: tuple[str, ...], **variables: str) -> subprocess.Popen:
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "CUDA_", "KILN_"))}
        environment |= {"PYTHONPATH": str(tmp_path), "KILN_LOCK_DIR": str(tmp_path / "locks"), **variables}
        command = [sys.executable, "-m", "scripts.common.launch", *arguments, "--", *step]
        with (tmp_path / f"log{len(started)}").open("w") as log:
            started.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log))
        started[-1].log = tmp_path / f"log{len(started) - 1}"
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.wait()
    signal.signal(signal.SIGINT, before)


def until(condition, seconds: float = 30):
    """The first true value of `condition()`."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        value = condition()
        if value:
            return value
        time.sleep(0.02)
    raise AssertionError("did not happen in time")


def facts(place: Path) -> dict:
    """What a toy step wrote about itself."""
    until(place.exists)
    return json.loads(place.read_text())


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def end(place: Path, status: int = 0) -> None:
    """Let the toy step that wrote `place` end."""
    part = Path(f"{place}.end.part")
    part.write_text(str(status))
    part.rename(f"{place}.end")


@pytest.mark.parametrize(("status", "seen"), [(0, 0), (7, 7), (-9, 137)])
def test_status_is_the_steps(start, tmp_path, status, seen):
    launcher = start(step=("toy_step", str(tmp_path / "a"), "--gpus", "--", "x y"))
    assert facts(tmp_path / "a")["argv"] == ["--gpus", "--", "x y"]
    assert facts(tmp_path / "a")["gpus"] == ""
    end(tmp_path / "a", status)
    assert launcher.wait(30) == seen


def test_no_gpu_is_shared_and_the_third_waits(start, tmp_path):
    launchers = [start("--gpus=1", "--visible=left,right", step=("toy_step", str(tmp_path / n))) for n in "ab"]
    assert {facts(tmp_path / n)["gpus"] for n in "ab"} == {"left", "right"}

    third = start("--gpus=1", "--visible=left,right", step=("toy_step", str(tmp_path / "c")))
    said = until(lambda: "right" in third.log.read_text() and third.log.read_text())
    assert "waiting for 1 free GPU(s) of 2" in said
    for launcher in launchers:
        assert f"toy_step, pid {launcher.pid} of" in said
    time.sleep(1.5)  # longer than it waits between two looks
    assert not (tmp_path / "c").exists()
    assert third.log.read_text() == said  # said once, not at every look

    end(tmp_path / "b")
    assert launchers[1].wait(30) == 0
    assert facts(tmp_path / "c")["gpus"] == facts(tmp_path / "b")["gpus"]


def test_killed_launcher_frees_its_gpu_and_takes_the_step_along(start, tmp_path):
    first = start("--gpus=1", "--visible=only", step=("toy_step", str(tmp_path / "a")))
    pid = facts(tmp_path / "a")["pid"]
    second = start("--gpus=1", "--visible=only", step=("toy_step", str(tmp_path / "b")))
    until(lambda: "waiting" in second.log.read_text())
    first.kill()
    until(lambda: not alive(pid), seconds=5)
    assert facts(tmp_path / "b")["gpus"] == "only"


def test_killed_step_ends_the_launcher(start, tmp_path):
    launcher = start("--gpus=1", "--visible=only", step=("toy_step", str(tmp_path / "a")))
    os.kill(facts(tmp_path / "a")["pid"], signal.SIGKILL)
    assert launcher.wait(30) == 137


@pytest.mark.parametrize(("number", "seen"), [(signal.SIGTERM, 5), (signal.SIGINT, 130)])
def test_signals_reach_the_step(start, tmp_path, number, seen):
    launcher = start(step=("toy_step", str(tmp_path / "a")))
    facts(tmp_path / "a")
    launcher.send_signal(number)
    assert launcher.wait(30) == seen  # the toy ends with 5 when it is asked to, and of an interrupt as Python does


def test_sigterm_ends_the_wait(start, tmp_path):
    start("--gpus=1", "--visible=only", step=("toy_step", str(tmp_path / "a")))
    facts(tmp_path / "a")
    second = start("--gpus=1", "--visible=only", step=("toy_step", str(tmp_path / "b")))
    until(lambda: "waiting" in second.log.read_text())
    second.terminate()
    assert second.wait(30) == 143
    assert not (tmp_path / "b").exists()


def test_gpus_of_a_slurm_job_are_used_as_they_are(start, tmp_path):
    start("--gpus=2", "--processes=1", step=("toy_step", str(tmp_path / "a")), **JOB)
    start("--gpus=1", step=("toy_step", str(tmp_path / "b")), **JOB)
    assert facts(tmp_path / "a")["gpus"] == "4,5"
    assert facts(tmp_path / "b")["gpus"] == "4"
    assert not (tmp_path / "locks").exists()
    refused = start("--gpus=3", step=("toy_step", str(tmp_path / "c")), **JOB)
    assert refused.wait(30) == 1
    assert "asks for 3 GPU(s); Slurm handed out 2" in refused.log.read_text()
    assert "Hint: " in refused.log.read_text()


def test_a_users_own_choice_of_gpus_is_kept_and_locked(start, tmp_path):
    start("--gpus=1", step=("toy_step", str(tmp_path / "a")), CUDA_VISIBLE_DEVICES="mine")
    assert facts(tmp_path / "a")["gpus"] == "mine"
    assert (tmp_path / "locks" / "gpu-mine.lock").exists()


def test_more_gpus_than_there_are(start, tmp_path):
    launcher = start("--gpus=3", "--visible=left,right", step=("toy_step", str(tmp_path / "a")))
    assert launcher.wait(30) == 1
    assert "asks for 3 GPU(s); it may choose from 2" in launcher.log.read_text()


def test_several_gpus_are_taken_together_or_not_at_all(tmp_path, monkeypatch):
    monkeypatch.setenv("KILN_LOCK_DIR", str(tmp_path / "locks"))
    one, _ = locks.take_gpus(["a", "b", "c"], 2, "first")
    assert list(one) == ["a", "b"]
    two, holders = locks.take_gpus(["a", "b", "c"], 2, "second")
    assert not two
    assert set(holders) == {"a", "b"}
    assert holders["a"].startswith("first, pid")
    three, _ = locks.take_gpus(["c"], 1, "third")  # the one in vain kept nothing
    assert list(three) == ["c"]
    for lock in [*one.values(), *three.values()]:
        lock.release()
    again, _ = locks.take_gpus(["a", "b", "c"], 3, "fourth")
    assert len(again) == 3
    for lock in again.values():
        lock.release()


def test_lock_folder_serves_several_users(tmp_path, monkeypatch):
    monkeypatch.setenv("KILN_LOCK_DIR", str(tmp_path / "locks"))
    old = os.umask(0o077)
    try:
        held, _ = locks.take_gpus(["a"], 1, "first")
    finally:
        os.umask(old)
    held["a"].release()
    assert (tmp_path / "locks").stat().st_mode & 0o7777 == 0o1777
    assert {p.stat().st_mode & 0o777 for p in (tmp_path / "locks").iterdir()} == {0o666}


def test_one_gpu_has_one_lock_whatever_it_is_called(monkeypatch):
    monkeypatch.setattr(launch, "_uuids", lambda: ["GPU-aa1", "GPU-bb2"])
    both = [launch.Gpu("0", "GPU-aa1"), launch.Gpu("1", "GPU-bb2")]
    assert launch.find_gpus(None) == both
    assert launch.find_gpus("0,1") == both
    assert launch.find_gpus("GPU-aa1, GPU-bb, 1") == both
    assert launch.find_gpus("MIG-x") == [launch.Gpu("MIG-x", "MIG-x")]
    assert launch.find_gpus("") == launch.find_gpus("NoDevFiles") == []
    for bad in ("2", "GPU-cc", "GPU-"):
        with pytest.raises(KilnError, match="is not one of this machine's 2"):
            launch.find_gpus(bad)


def test_child_of_a_launcher_that_has_gone_does_not_start(tmp_path):
    command = launch.tied(["/usr/bin/touch", str(tmp_path / "made")])
    ran = subprocess.run(command, cwd=ROOT, env={**os.environ, launch.PARENT: "1"}, capture_output=True, text=True)
    assert ran.returncode == 1
    assert not (tmp_path / "made").exists()


def test_a_steps_deadline_is_that_of_its_slurm_job(start, tmp_path):
    before = int(time.time())
    start("--minutes=100", step=("toy_step", str(tmp_path / "a")), **JOB)
    start("--minutes=100", step=("toy_step", str(tmp_path / "b")))
    assert before + 5700 <= int(facts(tmp_path / "a")["deadline"]) <= time.time() + 5701  # 5 % earlier
    assert facts(tmp_path / "b")["deadline"] is None


@pytest.mark.parametrize(("minutes", "seconds"), [(1, 40), (10, 540), (20, 1140), (100, 5700)])
def test_a_deadline_leaves_time_to_save(minutes, seconds, monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 1000.0)
    assert launch.deadline(minutes, JOB) == {"KILN_DEADLINE": str(1000 + seconds)}
    assert launch.deadline(minutes, {}) == launch.deadline(None, JOB) == {}


def test_in_a_slurm_job_sigterm_reaches_the_step_and_ends_none_that_has_no_answer(start, tmp_path):
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as a rule's shell starts it there
    first = start(step=("toy_step", str(tmp_path / "a")), **JOB)
    signal.signal(signal.SIGTERM, before)
    second = start(step=("toy_step", str(tmp_path / "b")), TOY_HAS_NO_HANDLER="1", **JOB)
    facts(tmp_path / "a"), facts(tmp_path / "b")
    for launcher in (first, second):
        launcher.terminate()
    assert first.wait(30) == 5
    os.kill(facts(tmp_path / "b")["pid"], signal.SIGTERM)  # Slurm may signal all processes of a job
    time.sleep(0.3)
    end(tmp_path / "b", 3)
    assert second.wait(30) == 3


def test_a_class_of_several_nodes_wants_all_gpus_here_without_slurm(start, tmp_path):
    refused = start("--nodes=2", "--gpus=2", "--visible=a,b", step=("toy_step", str(tmp_path / "a")))
    assert refused.wait(30) == 1
    assert "asks for 4 GPU(s); it may choose from 2" in refused.log.read_text()
    assert "--profile slurm" in refused.log.read_text()
    start("--nodes=2", "--gpus=1", "--visible=a,b", "--processes=1", step=("toy_step", str(tmp_path / "b")))
    assert facts(tmp_path / "b")["gpus"] == "a,b"


def test_without_srun_several_nodes_are_refused(start, tmp_path):
    (tmp_path / "scontrol").write_text(SCONTROL)
    (tmp_path / "scontrol").chmod(0o755)
    refused = start("--nodes=2", step=("toy_step", str(tmp_path / "a")), PATH=str(tmp_path), **JOB)
    assert refused.wait(30) == 1
    assert "srun is not on PATH" in refused.log.read_text()


def test_jobs_meet_at_ports_of_their_own():
    first = launch.free_port("17")
    with socket.socket() as taken:
        taken.bind(("", first))
        assert launch.free_port("17") == first + 1
    assert launch.free_port("18") == first + 1
    assert launch.FIRST_PORT <= launch.free_port("4294967294") < 32768  # below the kernel's own


@pytest.mark.parametrize(
    "arguments", [[], ["--gpus", "1"], *([option, "--", "m"] for option in ("--gpus=-1", "--processes=0", "--nodes=0"))]
)
def test_wrong_command_lines(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        launch.main(arguments)
    assert stopped.value.code == 2
    assert "usage:" in capsys.readouterr().err


@pytest.mark.slow
def test_two_launches_at_once_form_a_group_of_two_each(start, tmp_path):
    launchers = [start("--processes=2", step=("toy_group", str(tmp_path / n), "0")) for n in "ab"]
    for launcher in launchers:
        assert launcher.wait(120) == 0, launcher.log.read_text()
    for place in [tmp_path / f"{n}.rank{rank}" for n in "ab" for rank in (0, 1)]:
        assert place.read_text().split()[1:] == ["2", "3.0"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_no_process_of_a_group_outlives_its_launcher(start, tmp_path, number):
    launcher = start("--gpus=2", "--visible=a,b", step=("toy_group", str(tmp_path / "a"), "300"))
    places = [tmp_path / f"a.rank{rank}" for rank in (0, 1)]
    until(lambda: all(p.exists() for p in places), seconds=120)
    group = psutil.Process(launcher.pid).children(recursive=True)
    assert {int(p.read_text().split()[0]) for p in places} < {p.pid for p in group}
    launcher.send_signal(number)
    assert launcher.wait(60) != 0
    until(lambda: not any(alive(p.pid) for p in group), seconds=20)


@pytest.fixture
def slurm(tmp_path) -> dict[str, str]:
    """Variables of a job on two nodes, with an srun that starts its tasks on this machine."""
    for name, text in (("srun", SRUN.format(python=sys.executable)), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    return JOB | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}


def group_of(launcher: subprocess.Popen, places: list[Path]) -> list[psutil.Process]:
    """All processes of a launcher, once its ranks have written `places`."""
    until(lambda: all(p.exists() for p in places) or launcher.poll() is not None, seconds=120)
    assert launcher.poll() is None, launcher.log.read_text()
    return psutil.Process(launcher.pid).children(recursive=True)


@pytest.mark.slow
def test_two_nodes_form_one_group_which_a_dead_process_ends(start, tmp_path, slurm):
    places = [tmp_path / f"a.rank{rank}" for rank in range(4)]
    launcher = start("--nodes=2", "--gpus=2", step=("toy_group", str(tmp_path / "a"), "300", "dies"), **slurm)
    group = psutil.Process(launcher.pid)
    seen: list[psutil.Process] = []
    while launcher.poll() is None:
        seen = group.children(recursive=True) or seen
        time.sleep(0.1)
    assert launcher.returncode not in (0, None)
    for place in places:
        assert place.read_text().split()[1:] == ["4", "10.0"], launcher.log.read_text()
    until(lambda: not any(alive(p.pid) for p in seen), seconds=20)


@pytest.mark.slow
def test_sigterm_on_two_nodes_is_left_to_slurm(start, tmp_path, slurm):
    """srun would kill the tasks; Slurm signals them itself, here each node's launcher."""
    places = [tmp_path / f"a.rank{rank}" for rank in range(4)]
    launcher = start("--nodes=2", "--gpus=2", step=("toy_group", str(tmp_path / "a"), "6", "notes"), **slurm)
    group = group_of(launcher, places)
    launcher.terminate()
    for process in group:
        if "--rendezvous" in process.cmdline() and "srun" not in " ".join(process.cmdline()[:3]):
            process.terminate()
    until(lambda: all(Path(f"{p}.asked").exists() for p in places))
    assert launcher.wait(60) == 0, launcher.log.read_text()
    assert "SIGTERM is left to Slurm" in launcher.log.read_text()


@pytest.mark.slow
def test_torchrun_in_a_slurm_job_does_not_hear_sigterm(start, tmp_path):
    places = [tmp_path / f"a.rank{rank}" for rank in range(2)]
    launcher = start("--gpus=2", step=("toy_group", str(tmp_path / "a"), "3", "notes"), **JOB)
    for process in [psutil.Process(launcher.pid), *group_of(launcher, places)]:  # as Slurm may do
        process.terminate()
    assert launcher.wait(60) == 0, launcher.log.read_text()
    assert all(Path(f"{p}.asked").exists() for p in places)


def test_classes_become_resources_of_slurm(tmp_path):
    """Memory with Snakemake's own; GPUs by node, never as gres; several nodes by srun."""
    one = {"threads": 2, "mem_mb": 1000, "runtime": 9, "gpu": 2, "gpu_model": "h200", "constraint": "ib"}
    (tmp_path / "c.json").write_text(json.dumps({"resources": {"gpu_node": one, "multi_node": one | {"nodes": 3}}}))

    def planned(name: str) -> tuple[set[str], str]:
        """Resources and launcher's options that a rule of the class gets; what stopped the plan."""
        (tmp_path / "Snakefile").write_text(
            f"""include: "{ROOT}/rules/common.smk"\nrule made:\n    output: "made.txt"\n"""
            f"""    threads: class_threads("{name}")\n    resources: **class_resources("{name}")\n"""
            f"""    params: launcher=launcher("{name}")\n    shell: "launch {{params.launcher}} {{output}}"\n"""
        )
        command = [sys.executable, "-m", "snakemake", "--cores", "2", "-n", "-p", "--configfile", "c.json"]
        ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        said = ran.stdout + ran.stderr
        found = re.search(r"resources: (.*)", said)
        return set(found[1].split(", ")) if found else set(), said

    of_all = {"mem_mb=1300", "runtime=9", "constraint=ib"}
    resources, said = planned("gpu_node")
    assert {r for r in resources if not r.startswith(("mem=", "mem_mib=", "tmpdir="))} == of_all | {
        "gpu=2",
        "gpu_model=h200",
    }
    assert "launch --gpus 2 --or-cpu --minutes 9 made.txt" in said
    resources, said = planned("multi_node")
    spread = {"mpi=srun", "nodes=3", "tasks=3", "slurm_extra=--gpus-per-node=h200:2"}
    assert {r for r in resources if not r.startswith(("mem=", "mem_mib=", "tmpdir="))} == of_all | spread
    assert "launch --nodes 3 --gpus 2 --or-cpu --minutes 9 made.txt" in said
    _, said = planned("gpu_nodes")
    assert "'gpu_nodes' is no resource class" in said
    assert "Hint: give one of light, cpu, gpu_single, gpu_node, multi_node, network" in said


@pytest.mark.parametrize(("repo", "gpus"), [("some/repo", 3), ("null", 2)])
def test_both_arms_of_biomedica_are_of_class_network_while_one_streams(tmp_path, repo, gpus):
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards/a.tar").touch()
    values = f"biomedica.shards=shards biomedica.remote.repo={repo} biomedica.resources=gpu_node"
    values += " resources.network.gpu=3 resources.gpu_node.gpu=2"
    targets = [f"results/biomedica/train_clip/main/{arm}-42/model.safetensors" for arm in ("hybrid", "local")]
    ran = workflow.run(ROOT, tmp_path, "--dry-run", "--printshellcmds", "--config", f"set={values}", "--", *targets)
    asked = re.findall(r"launch --gpus (\d+) .*scripts.biomedica.train_clip", ran.stdout + ran.stderr)
    assert asked == [str(gpus)] * 2


@pytest.mark.slow
def test_slurm_profile_is_understood_and_finds_partitions(tmp_path):
    from snakemake_executor_plugin_slurm.partitions import read_partition_file

    partitions = {p.name: p.limits.max_gpu for p in read_partition_file(ROOT / "slurm" / "config.yaml")}
    assert partitions == {"cpu": 0, "gpu": 8}
    shutil.copytree(ROOT / "slurm", tmp_path / "slurm")
    rule = 'rule made:\n    output: "made.txt"\n    resources: gpu=1, mem_mb=lambda wildcards, attempt: 300 * attempt\n'
    (tmp_path / "Snakefile").write_text(rule + '    shell: "touch {output}"\n')
    command = [sys.executable, "-m", "snakemake", "--profile", "slurm", "-n"]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    for resource in ("slurm_account=ml", "mem_mb=300", "runtime=240", "gpu=1"):
        assert resource in ran.stdout + ran.stderr
