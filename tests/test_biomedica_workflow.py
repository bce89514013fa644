"""The pipeline through Snakemake: from local shards and a hub that misbehaves to scores and card, and what reruns."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import workflow
import yaml
from rerun_cases import BIOMEDICA, BIOMEDICA_AFTER_TRAINING, BIOMEDICA_TRAININGS, named

pytestmark = pytest.mark.slow(minutes=5)
TOKEN = "hf_abcdefghijklmnopqrstuvwxyz0123"
SETTINGS = {
    "device": "cpu",
    "resources": {name: {"threads": 1, "mem_mb": 1000} for name in ("light", "cpu", "gpu_single", "network")},
    "demo": {"figures": {"figures": 400, "samples_per_shard": 40}},
    "biomedica": {
        "shards": "results/demo/draw_figures/local",
        "index": {"processes": 1},
        "remote": {"repo": "kiln/figures", "wait_seconds": 0.1, "max_wait_seconds": 1},
        "held_out": {"validation": 0.2, "test": 0.3},
        "plan": {"samples": 96, "epochs": 2, "batch_size": 16, "lanes": 2, "shuffle_buffer": 16},
        "model": {"config": {
            "embed_dim": 16,
            "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "patch_size": 16, "head_width": 16},
            "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
        }},
        "train": {"lr": 1e-3, "warmup_steps": 2, "seed": 0, "precision": "fp32", "workers": 1},
        "compare_seeds": [0, 1],
    },
}  # fmt: skip


def without_hub(jobs: dict[str, int]) -> dict[str, int]:
    """Jobs but for the demo's hub, which serves whoever runs."""
    return {rule: n for rule, n in jobs.items() if rule != "demo_serve_hub"}


def planned(checkout: Path, run: Path, *arguments: str) -> dict[str, int]:
    return without_hub(workflow.planned(checkout, run, "biomedica", *arguments))


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory) -> tuple[Path, Path]:
    """A checkout and a run folder in which biomedica is built, with a token that nothing may repeat."""
    base = tmp_path_factory.mktemp("biomedica")
    checkout, run = workflow.copy_checkout(base / "checkout"), base / "run one"
    (run / "config").mkdir(parents=True)
    (run / "config/config.yaml").write_text(yaml.safe_dump(SETTINGS))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", TOKEN)
        done = workflow.run(checkout, run, "biomedica")
    (base / "said.txt").write_text(done.stdout + done.stderr)
    return checkout, run


@pytest.fixture
def copied(finished_run, tmp_path) -> tuple[Path, Path]:
    """A copy of both, to be changed."""
    return workflow.copies(finished_run, tmp_path)


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def test_what_is_made(finished_run):
    _, run = finished_run
    made = run / "results/biomedica"
    plan = read(made / "plan/main/hybrid/plan.json")
    assert plan["local_per_epoch"] + plan["streamed_per_epoch"] == plan["samples"] == 96
    assert plan["streamed_per_epoch"] > 0
    assert read(made / "plan/main/local/plan.json")["steps"] == plan["steps"] == 12
    runs = {f"{arm}-{seed}" for arm in ("hybrid", "local") for seed in (0, 1)}
    assert {path.name for path in (made / "train_clip/main").iterdir()} == runs
    metrics = read(made / "evaluate/main/metrics.json")
    kinds = {"recall_at_5": "chance", "hybrid_over_local": "local_only"}
    assert {name: one["baseline_kind"] for name, one in metrics["summary"].items()} == kinds
    for one in metrics["summary"].values():
        assert one["higher_is_better"] and one["ci95"][0] <= one["value"] <= one["ci95"][1]
        assert one["n"] == len(pd.read_parquet(made / "hold_out/test.parquet", columns=["key"]))
    assert not list((run / "results/state/biomedica/train_clip").rglob("*.pt"))


def test_the_model_loads_as_a_local_folder_of_open_clip(finished_run):
    import open_clip
    import torch
    from safetensors.torch import load_file

    made = finished_run[1] / "results/biomedica"
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{made / 'export/main/model'}")
    trained = load_file(made / "train_clip/main/hybrid-0/model.safetensors")
    assert all(torch.equal(value, trained[name]) for name, value in model.state_dict().items() if name in trained)
    assert trained.keys() >= {name for name, _ in model.named_parameters()}


def test_the_token_is_nowhere(finished_run):
    """Neither in what was said nor in any file of the run, Snakemake's own included."""
    checkout, run = finished_run
    assert TOKEN not in (run.parent / "said.txt").read_text()
    for path in (*run.rglob("*"), *checkout.rglob("*")):
        if path.is_file():
            assert TOKEN.encode() not in path.read_bytes(), path


def hubs_in(run: Path) -> list[int]:
    """Processes of the demo's hub that work in the folder `run`."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if b"scripts.demo.serve_hub" in (process / "cmdline").read_bytes() and (process / "cwd").samefile(run):
                found.append(int(process.name))
        except OSError:  # it has ended meanwhile
            continue
    return found


def test_the_hub_is_gone(finished_run):
    """The service ends with its consumer; one that is there would be seen."""
    checkout, run = finished_run
    assert hubs_in(run) == []
    hub = [sys.executable, "-m", "scripts.demo.serve_hub", "--folder", "results/demo/draw_figures/hub"]
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    with subprocess.Popen([*hub, "--port-file", "url"], cwd=run, env=environment) as process:
        try:
            while not (run / "url").exists():
                assert process.poll() is None
                time.sleep(0.05)
            assert hubs_in(run) == [process.pid]
        finally:
            process.terminate()
    (run / "url").unlink()


def test_nothing_is_left_to_do_and_execution_settings_rerun_nothing(finished_run):
    values = ("biomedica.train.workers=0", "biomedica.train.prefetch=9", "biomedica.train.save_minutes=1",
              "biomedica.remote.attempts=9", "biomedica.remote.read_seconds=9", "biomedica.index.processes=2",
              "resources.gpu_single.threads=2")  # fmt: skip
    assert planned(*finished_run, "--config", f"set={' '.join(values)}") == {}


@pytest.mark.parametrize("value, jobs", BIOMEDICA)
def test_a_setting_reruns_its_readers(finished_run, value, jobs):
    assert planned(*finished_run, "--config", f"set={value}") == named("biomedica", jobs)


def test_messages_rerun_nothing_and_numbers_retrain(copied):
    checkout, run = copied
    train, training = (checkout / f"scripts/biomedica/{name}.py" for name in ("train_clip", "training"))
    train.write_text(train.read_text() + "\n# a remark\n")
    workflow.edit(checkout / "scripts/biomedica/train_clip.py", "import argparse\n", "import argparse\nimport string\n")
    assert planned(checkout, run) == {}
    training.write_text(training.read_text() + "\nEXTRA = 1\n")
    assert planned(checkout, run) == named("biomedica", {**BIOMEDICA_TRAININGS, **BIOMEDICA_AFTER_TRAINING})


def test_a_local_shard_that_is_rewritten_reruns_what_reads_the_folder(copied):
    checkout, run = copied
    shard = next((run / "results/demo/draw_figures/local").glob("*.tar"))
    shutil.copy(shard, shard.with_name("zz.tar"))
    assert planned(checkout, run)["biomedica_index_local"] == 1


def test_local_pairs_that_suffice_need_no_hub(finished_run, tmp_path):
    checkout, run = finished_run
    fresh = tmp_path / "fresh"
    (fresh / "config").mkdir(parents=True)
    shutil.copytree(run / "results/demo/draw_figures/local", fresh / "data")
    own = {**SETTINGS["biomedica"], "shards": "data", "compare_seeds": []}
    own["plan"] = {**own["plan"], "samples": 32, "epochs": 2}
    (fresh / "config/config.yaml").write_text(yaml.safe_dump({**SETTINGS, "biomedica": own}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nothing answers there
        workflow.run(checkout, fresh, "results/biomedica/train_clip/main/hybrid-0/model.safetensors")
    assert read(fresh / "results/biomedica/plan/main/hybrid/plan.json")["streamed_per_epoch"] == 0


def test_a_token_in_the_config_is_refused(finished_run):
    done = workflow.run(*finished_run, "biomedica", "--config", f"set=biomedica.hf_token={TOKEN}", check=False)
    said = done.stdout + done.stderr
    assert done.returncode and "HF_TOKEN" in said
    assert TOKEN not in said.replace(f"set=biomedica.hf_token={TOKEN}", "")
