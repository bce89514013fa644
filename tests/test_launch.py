"""The launcher as a user meets it: as processes that start, wait, die and pass signals on."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from scripts.common import launch, locks
from scripts.common.errors import KilnError

ROOT = Path(__file__).resolve().parents[1]

# Says who it is in the file argv[1], then lives until the file argv[1].end holds its exit status; not for ever,
# so that a failing test leaves nothing behind.
TOY = """
import json, os, pathlib, signal, sys, time
place, end = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[1] + ".end")
signal.signal(signal.SIGTERM, lambda *_: sys.exit(5))
facts = {"pid": os.getpid(), "gpus": os.environ.get("CUDA_VISIBLE_DEVICES"), "argv": sys.argv[2:]}
place.with_suffix(".part").write_text(json.dumps(facts))
place.with_suffix(".part").rename(place)
for _ in range(6000):
    if end.exists():
        break
    time.sleep(0.02)
status = int(end.read_text())
os.kill(os.getpid(), -status) if status < 0 else sys.exit(status)
"""

# Sums the ranks over the group; the sum is right only if both processes are in it.
GROUP = """
import os, pathlib, sys, time, torch, torch.distributed as dist
dist.init_process_group("gloo")
total = torch.tensor([dist.get_rank() + 1.0])
dist.all_reduce(total)
place = pathlib.Path(f"{sys.argv[1]}.rank{dist.get_rank()}")
part = pathlib.Path(f"{place}.part")
part.write_text(f"{os.getpid()} {dist.get_world_size()} {total.item()}")
part.rename(place)
time.sleep(float(sys.argv[2]))
dist.destroy_process_group()
"""


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
    job = {"SLURM_JOB_ID": "17", "CUDA_VISIBLE_DEVICES": "4,5"}
    start("--gpus=2", "--processes=1", step=("toy_step", str(tmp_path / "a")), **job)
    start("--gpus=1", step=("toy_step", str(tmp_path / "b")), **job)
    assert facts(tmp_path / "a")["gpus"] == "4,5"
    assert facts(tmp_path / "b")["gpus"] == "4"
    assert not (tmp_path / "locks").exists()
    refused = start("--gpus=3", step=("toy_step", str(tmp_path / "c")), **job)
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


@pytest.mark.parametrize("arguments", [[], ["--gpus", "1"], ["--gpus=-1", "--", "m"], ["--processes=0", "--", "m"]])
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
