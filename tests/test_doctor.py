"""What is said of a machine, and what a step makes sure of before it works."""

import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

from scripts.common import disk, doctor, preflight
from scripts.common.errors import KilnError

ROOT = Path(__file__).resolve().parents[1]


def run_doctor(tmp_path, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
    bare = {k: v for k, v in os.environ.items() if "proxy" not in k.lower() and not k.startswith("HF_")}
    environment = {**bare, "HF_ENDPOINT": "http://127.0.0.1:9", "PATH": str(tmp_path), **variables}
    command = [sys.executable, "-m", "scripts.common.doctor", "--results", str(tmp_path / "results"), *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


def test_every_line_is_there_without_network_gpu_conda_or_slurm(tmp_path):
    ran = run_doctor(tmp_path, HF_TOKEN="hf_secret", HF_HOME=str(tmp_path / "models"))
    assert ran.returncode == 0, ran.stdout + ran.stderr
    lines = [line.split(maxsplit=1) for line in ran.stdout.splitlines()]
    assert {mark for mark, _ in lines} <= {"ok", "warn"}
    said = "\n".join(text for _, text in lines)
    subjects = ("python", *doctor.MAIN_PACKAGES, "other packages", "NVIDIA driver", "GPU", "CPU cores", "RAM")
    for about in (*subjects, "disk for results", "disk for models", "conda", "Slurm", "model hub"):
        assert f"\n{about} " in f"\n{said}", about
    assert f"free at {tmp_path / 'models'}" in said
    assert "http://127.0.0.1:9 cannot be reached" in said
    assert "hf_secret" not in ran.stdout + ran.stderr
    assert all(line[37] == " " != line[38] for line in ran.stdout.splitlines())  # aligned


def test_missing_and_differing_packages_fail(tmp_path):
    lock = tmp_path / "requirements.lock"
    lock.write_text("# locked\nnumpy==0.0.1\ntorch==99.0 ; python_version > '3'\nno-such-thing==1.0\n")
    ran = run_doctor(tmp_path, "--lock", str(lock))
    assert ran.returncode == 1
    assert "differs; locked is 0.0.1" in ran.stdout
    assert "differs; locked is 99.0" in ran.stdout
    assert "1 of 1 are missing or differ: no-such-thing" in ran.stdout
    assert run_doctor(tmp_path, "--lock", str(tmp_path / "none")).returncode == 1


def test_package_versions(monkeypatch):
    monkeypatch.setattr(doctor.importlib.metadata, "version", lambda name: "2.1.0+cu130")
    assert doctor.package("torch", "2.1.0").mark == "ok"
    assert doctor.package("torch", "2.1.1").mark == "FAIL"
    assert doctor.package("torch", None).mark == "warn"
    monkeypatch.undo()
    assert doctor.package("no-such-thing", "1.0") == ("FAIL", "no-such-thing", "missing; locked is 1.0")


def fake_nvml(driver: str, names: list[str]) -> types.SimpleNamespace:
    return types.SimpleNamespace(
        NVMLError=RuntimeError,
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: None,
        nvmlSystemGetDriverVersion=lambda: driver,
        nvmlDeviceGetCount=lambda: len(names),
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetName=lambda handle: names[handle],
        nvmlDeviceGetMemoryInfo=lambda handle: types.SimpleNamespace(free=20e9, total=24e9),
    )


def test_gpus_and_drivers(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml("580.65.06", ["NVIDIA A", "NVIDIA B"]))
    assert list(doctor.gpus()) == [
        ("ok", "NVIDIA driver", "580.65.06"),
        ("ok", "GPU 0", "NVIDIA A, 20.0 of 24.0 GB free"),
        ("ok", "GPU 1", "NVIDIA B, 20.0 of 24.0 GB free"),
    ]
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml("570.172.08", []))
    old, none = doctor.gpus()
    assert old.mark == "warn"
    assert "570.172.08 is too old for torch's CUDA 13 wheels: install R580 or newer" in old.found
    assert none.found.startswith("none")


@pytest.mark.parametrize(("version", "mark"), [("conda 24.7.1", "ok"), ("conda 23.11.0", "warn"), (None, "ok")])
def test_conda(monkeypatch, version, mark):
    monkeypatch.setattr(doctor, "_version", lambda command: version)
    monkeypatch.setattr(doctor.shutil, "which", lambda command: None)  # no Slurm, which needs it
    assert doctor.conda().mark == mark


def test_hub_address_is_shown_without_its_password(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://me:hunter2@127.0.0.1:9")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    line = doctor.hub()
    assert line.mark == "warn"
    assert "hunter2" not in line.found
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert doctor.hub().mark == "ok"
    monkeypatch.delenv("HF_HUB_OFFLINE")
    for broken in ("hub.example", "http://[", "file:///nowhere"):
        monkeypatch.setenv("HF_ENDPOINT", broken)
        assert doctor.hub().mark == "warn"


def test_disk_has_room_or_says_how_much_is_missing(tmp_path):
    disk.require_disk(tmp_path / "not" / "yet", 1, "the shards")
    with pytest.raises(KilnError) as refused:
        disk.require_disk(tmp_path / "not" / "yet", 10**18, "the shards")
    assert "the shards need 1000000 TB" in refused.value.message
    assert "are free" in refused.value.message
    assert "results" in refused.value.hint


def test_memory_formula():
    assert preflight.estimate_training_memory(1_000, 1_000) == 16_000  # float32 Adam: 4 + 4 + 8
    assert preflight.estimate_training_memory(1_000, 1_000, optimiser_states=3, dtype_bytes=2) == 16_000  # mixed
    assert preflight.estimate_training_memory(1_000, 0, dtype_bytes=2, activation_bytes=7) == 2_007  # all frozen
    assert preflight.estimate_training_memory(1_000, 10, dtype_bytes=2) == 2_000 + 20 + 80  # adapters
    assert preflight.estimate_training_memory(1_010, 10, dtype_bytes=0.5, trainable_bytes=4) == 500 + 40 + 40 + 80


def test_gpu_memory(monkeypatch, caplog):
    with caplog.at_level("INFO", logger="kiln"):
        preflight.require_vram(3 * 10**9, "cpu")
    assert "training needs about 3.0 GB" in caplog.text
    cuda = types.SimpleNamespace(mem_get_info=lambda device: (2 * 10**9, 24 * 10**9))
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(cuda=cuda))
    preflight.require_vram(10**9, "cuda:0")
    with pytest.raises(KilnError) as refused:
        preflight.require_vram(3 * 10**9, "cuda:0", reduced_by=("busi.train.batch_size", "busi.train.rank"))
    assert refused.value.message == "cuda:0: training needs about 3.0 GB; 2.0 GB of 24.0 GB are free"
    assert "busi.train.batch_size or busi.train.rank" in refused.value.hint
