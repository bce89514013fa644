"""On the test cluster, two nodes with two stand-ins for GPUs each: trainings over both, and what a job sees of them."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import biomedica_fixtures
import cluster
import psutil
import pytest
import rae_fixtures

ROOT = Path(__file__).resolve().parents[1]
pytestmark = [pytest.mark.cluster, pytest.mark.slow(minutes=5)]
CLASS = {"threads": 1, "mem_mb": 4000, "runtime": 30}
RESOURCES = dict.fromkeys(("light", "cpu", "gpu_single"), CLASS) | {"multi_node": CLASS | {"nodes": 2, "gpu": 2}}
BOTH_NODES = {(node, str(local), "4", "0,1") for node in ("node1", "node2") for local in (0, 1)}


def ranks(module: str) -> set[tuple[str, ...]]:
    """(node, local rank, processes in all, GPUs) of the processes that run `module` in a group now."""
    names = ("SLURMD_NODENAME", "LOCAL_RANK", "WORLD_SIZE", "CUDA_VISIBLE_DEVICES")
    found = set()
    for process in psutil.process_iter():
        try:
            if ["-m", module] == process.cmdline()[2:4]:  # python -u -m module
                variables = process.environ()
                found.add(tuple(variables[name] for name in names))
        except (psutil.Error, KeyError):  # it has ended meanwhile, or is no rank
            continue
    return found


def train_on_both_nodes(place: Path, target: str, module: str, classes: str) -> None:
    """Train `target` by the profile, in one job of two nodes, which is seen to be one."""
    process = cluster.start(place, "--configfile", "tiny.json", "--config", f"set={classes}", "--", target)
    try:
        cluster.until(lambda: ranks(module) == BOTH_NODES or process.poll() is not None, 240, "a group of four")
        assert process.poll() is None, (place / "snakemake.log").read_text()[-6000:]
        (job,) = cluster.jobs(place)
        shown = cluster.ask("scontrol", "show", "job", job.id)
        for fact in ("Partition=gpu", "NumNodes=2", "NumTasks=2", "MinMemoryNode=4300M", "gres/gpu=4"):
            assert fact in shown, shown
        assert process.wait(300) == 0, (place / "snakemake.log").read_text()[-6000:]
    finally:
        process.kill()


def train_here(place: Path, target: str) -> None:
    """Train `target`, and make all that it needs, without Slurm and in one process."""
    command = [sys.executable, "-m", "snakemake", "--cores", "2", "--configfile", "tiny.json", "--", target]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]


def both_ways(place: Path, target: str, module: str, classes: str) -> tuple[Path, Path]:
    """Folders of `target` trained by one process here, and by four on two nodes."""
    folder = (place / target).parent
    train_here(place, target)
    one = shutil.move(folder, place / "one process")
    train_on_both_nodes(place, target, module, classes)
    return one, folder


def test_rae_on_two_nodes_follows_the_curve_of_one_process(tmp_path):
    place = cluster.checkout(tmp_path / "checkout")
    rae_fixtures.build_data(tmp_path / "data")
    encoder = {"model": str(tmp_path / "data/siglip2"), "input_size": rae_fixtures.INPUT["siglip2"]}
    rae = {
        **rae_fixtures.TRAIN, "autoencoder": rae_fixtures.TRAIN["autoencoder"] | rae_fixtures.CALM,
        "images": str(tmp_path / "data/images"), "use": ["siglip2"], "encoders": {"siglip2": encoder},
        "dataset": {"images_per_shard": 30}, "latent_stats": {"batch_size": 16, "workers": 0},
        "evaluate": rae_fixtures.EVALUATE, "resources": "gpu_single",
    }  # fmt: skip
    (place / "tiny.json").write_text(json.dumps({"resources": RESOURCES, "rae": rae}))
    target = "results/rae/train_autoencoder/siglip2/autoencoder.safetensors"
    one, four = both_ways(place, target, "scripts.rae.train_autoencoder", "rae.resources=multi_node")
    rae_fixtures.check_curve(four, json.loads((one / "metrics.json").read_text())["history"])


def test_biomedica_on_two_nodes_follows_the_curve_of_one_process(tmp_path):
    place = cluster.checkout(tmp_path / "checkout")
    biomedica_fixtures.write_shards(tmp_path / "shards", count=8, per_shard=24)
    biomedica = {
        "shards": str(tmp_path / "shards"),
        "index": {"processes": 1},
        "remote": {"repo": None},
        "held_out": {"validation": 0.2, "test": 0.3},
        "plan": {"samples": 64, "epochs": 3, "batch_size": 16, "lanes": 4, "shuffle_buffer": 16},
        "model": {"config": {
            "embed_dim": 16,
            "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "patch_size": 16, "head_width": 16},
            "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
        }},
        "train": {"lr": 1e-3, "warmup_steps": 2, "seed": 0, "precision": "fp32", "workers": 0},
    }  # fmt: skip
    (place / "tiny.json").write_text(json.dumps({"resources": RESOURCES, "biomedica": biomedica}))
    target = "results/biomedica/train_clip/main/local-0/model.safetensors"
    one, four = both_ways(place, target, "scripts.biomedica.train_clip", "biomedica.resources=multi_node")
    curves = [json.loads((folder / "metrics.json").read_text())["history"] for folder in (one, four)]
    for ours, other in zip(*curves, strict=True):
        for name in ("loss", "val_loss"):
            assert ours[name] == pytest.approx(other[name], rel=5e-4), name
    assert curves[0][0]["loss"] != pytest.approx(curves[0][-1]["loss"], rel=5e-4)  # equal, but not for standing still


RULE = """
include: "rules/common.smk"
rule toy:
    output: "toy.txt"
    log: "toy.log"
    resources: **class_resources("light")
    params: step=outside(STEP), launcher=launcher("light")
    shell: "{params.step} scripts.common.launch {params.launcher} -- toy 2>&1 | tee {log}; touch {output}"
"""


def test_sigterm_leaves_a_job_running_so_that_slurm_can_requeue_it(tmp_path):
    """At preemption Slurm sends it to all processes, waits, kills, requeues; a job that ends by itself failed."""
    place = cluster.checkout(tmp_path / "checkout")
    (place / "Snakefile").write_text(RULE)
    (place / "toy.py").write_text(
        "import time\nfor second in range(300):\n    print(second, flush=True)\n    time.sleep(1)\n"
    )
    (place / "tiny.json").write_text(json.dumps({"resources": {"light": CLASS}}))
    process = cluster.start(place, "--configfile", "tiny.json", "--retries", "0", "--", "toy")
    try:
        log = place / "toy.log"
        cluster.until(lambda: log.exists() and "3" in log.read_text(), 120, "a step that runs")
        (job,) = cluster.jobs(place)
        cluster.ask("scancel", "--signal=TERM", job.id)
        said = len(log.read_text())
        cluster.until(lambda: len(log.read_text()) > said + 8, 30, "a step that goes on")
        assert [one.state for one in cluster.jobs(place)] == ["RUNNING"]
        cluster.ask("scancel", job.id)
    finally:
        process.kill()


SEEN = """
import os, pathlib, sys, time
place = pathlib.Path(sys.argv[1])
place.with_suffix(".part").write_text(f"{os.environ['SLURMD_NODENAME']} {os.environ['CUDA_VISIBLE_DEVICES']}")
place.with_suffix(".part").rename(place)
while not pathlib.Path(sys.argv[2]).exists():
    time.sleep(0.1)
"""


def test_jobs_see_the_gpus_that_slurm_gave_them_and_share_none(tmp_path):
    (tmp_path / "seen.py").write_text(SEEN)

    def submit(name: str, *options: str) -> Path:
        launch = f"{sys.executable} -m scripts.common.launch --gpus 1 -- seen {tmp_path / name} {tmp_path / 'end'}"
        common = ["--parsable", "--account=ml", "--partition=gpu", "--mem=300", "--time=5", f"--output={tmp_path}/log"]
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path}"}
        subprocess.run(
            ["sbatch", *common, *options, "--wrap", launch], cwd=ROOT, env=environment, check=True, timeout=60
        )
        return tmp_path / name

    single = [submit(name, "--gpus=1", "--nodelist=node1") for name in ("a", "b")]
    other = submit("c", "--gpus=h200:1", "--nodelist=node2")
    made = [*single, other]
    cluster.until(lambda: all(path.exists() for path in made), 60, "three jobs at once")
    waiting = submit("d", "--gpus=1", "--nodelist=node1")
    assert {path.read_text() for path in single} == {"node1 0", "node1 1"}
    assert other.read_text().split()[0] == "node2"
    cluster.until(lambda: "PENDING" in cluster.ask("squeue", "--noheader", "--format", "%T"), what="a job that waits")
    assert not waiting.exists()
    (tmp_path / "end").touch()
    cluster.until(waiting.exists, what="the fourth job")
    assert waiting.read_text() in {"node1 0", "node1 1"}
