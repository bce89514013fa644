"""Fine-tuning by LoRA and QLoRA: what it learns, what it writes, and that no kill costs more than time."""

import importlib.util
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.stats import entropy
from vase_fixtures import ROOT, error_of
from vlm_fixtures import chat_rows, tiny_base

from scripts.busi import fine_tuning, train_lora
from scripts.busi.chat_examples import ChatExamples
from scripts.busi.chat_rows import read_rows
from scripts.busi.settings import TrainSettings
from scripts.common import launch, vlm
from scripts.common.errors import KilnError

pytestmark = pytest.mark.slow
SETTINGS = {
    "base": {"family": "qwen"},
    "lora": {"rank": 4, "alpha": 8},
    "train": {"epochs": 2, "batch_size": 2, "accumulation": 2, "lr": 2e-3, "workers": 0, "log_steps": 1},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A folder with a tiny base and the chat rows of 22 training and 6 validation pictures."""
    root = tmp_path_factory.mktemp("busi training")
    tiny_base(root / "base")
    chat_rows(root, "train", 22)
    chat_rows(root, "validation", 6)
    return root


def settings(**train) -> str:
    return json.dumps({**SETTINGS, "train": {**SETTINGS["train"], **train}})


def arguments(data: Path, out: Path, text: str, method: str = "lora") -> list[str]:
    paths = {
        "base": data / "base", "images": data / "images", "train": data / "train.jsonl",
        "validation": data / "validation.jsonl", "state-folder": out / "state", "tracker-folder": out / "curves",
        "output-folder": out, "meta": out / "meta.json",
    }  # fmt: skip
    options = [part for name, path in paths.items() for part in (f"--{name}", str(path))]
    return [*options, "--method", method, "--settings", text, "--threads", "1", "--device", "cpu"]


def train(data: Path, out: Path, text: str | None = None, method: str = "lora") -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "scripts.busi.train_lora", *arguments(data, out, text or settings(), method)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def train_here(data: Path, out: Path, text: str | None = None, method: str = "lora") -> None:
    """The same in this process, which has its imports behind it."""
    train_lora.main(arguments(data, out, text or settings(), method))


def made(out: Path) -> dict[str, bytes]:
    """What must be equal to the byte."""
    names = ("final_model/adapter_model.safetensors", "final_model/adapter_config.json", "metrics.json")
    return {name: (out / name).read_bytes() for name in names}


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory) -> Path:
    """The outputs of a training that nothing disturbed."""
    out = tmp_path_factory.mktemp("undisturbed")
    done = train(data, out)
    assert done.returncode == 0, done.stderr
    return out


def guess_loss(data: Path) -> float:
    """Entropy of the tokens with a label, place by place, over all of them."""
    rows = read_rows(data / "train.jsonl")
    assert rows["prompt"].nunique() == 1
    family = vlm.family("qwen")
    examples = ChatExamples(data / "images", rows, family, family.load_processor(data / "base"))
    labels = [
        example.labels[example.labels != vlm.IGNORED].tolist() for example in map(examples.__getitem__, rows.index)
    ]
    places = [[row[place] for row in labels if place < len(row)] for place in range(max(map(len, labels)))]
    nats = sum(len(tokens) * entropy(np.unique(tokens, return_counts=True)[1]) for tokens in places)
    return float(nats) / sum(map(len, labels))


def test_what_it_writes(undisturbed, data):
    names = {p.name for p in (undisturbed / "final_model").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "files.json"} <= names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pth"))]
    assert not (undisturbed / "state").exists()
    curves = json.loads((undisturbed / "metrics.json").read_text())
    assert [row["step"] for row in curves["train"]] == list(range(1, 13))
    assert len(curves["validation"]) == 2
    assert curves["validation"][1]["eval_loss"] < curves["train"][0]["loss"]
    record = json.loads((undisturbed / "meta.json").read_text())
    assert record["method"] == "lora"
    assert 0 < curves["guess_loss"] == pytest.approx(guess_loss(data))
    assert str(undisturbed) not in (undisturbed / "final_model/adapter_config.json").read_text()


def test_equal_runs_give_equal_bytes(undisturbed, data, tmp_path):
    done = train(data, tmp_path)
    assert done.returncode == 0, done.stderr
    assert made(tmp_path) == made(undisturbed)


@pytest.mark.parametrize(("seed", "workers"), [(0, 0), (1, 2)])
def test_killed_at_any_moment_it_ends_with_the_same_bytes(undisturbed, data, tmp_path, seed, workers):
    text = settings(save_minutes=0, workers=workers)  # a save after each step
    command = [sys.executable, "-m", "scripts.busi.train_lora", *arguments(data, tmp_path, text)]
    rng = random.Random(seed)
    kills = 0
    for _ in range(2):
        wanted = rng.randint(kills * 5 + 1, kills * 5 + 6)  # of 12 steps in two epochs
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)
        for line in process.stderr:
            if f"step {wanted}/" in line:
                time.sleep(rng.random() / 20)  # somewhere in the step or the save after it
                os.killpg(process.pid, signal.SIGKILL)
                kills += 1
                break
        process.wait()
    assert kills == 2
    done = train(data, tmp_path, text)
    assert done.returncode == 0, done.stderr
    assert "resumed from" in done.stderr
    assert made(tmp_path) == made(undisturbed)


def test_a_time_budget_saves_exits_non_zero_and_carries_on(undisturbed, data, tmp_path):
    done = train(data, tmp_path, settings(budget_minutes=0))
    assert "time budget is used up; saved at step 1" in error_of(done)
    assert (tmp_path / "state").is_dir()
    assert not (tmp_path / "final_model").exists()
    (told,) = (json.loads(p.read_text()) for p in (tmp_path / "state").glob("*/heartbeat.json"))
    assert (told["step"], told["steps"], told["last_save"]["step"], told["phase"]) == (1, 12, 1, "ending")
    assert told["owner"] == "scripts.busi.train_lora" and told["loss"] > 0
    done = train(data, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "checkpoint-1" in done.stderr
    assert made(tmp_path) == made(undisturbed)


def test_a_changed_setting_starts_afresh(data, tmp_path, caplog):
    caplog.set_level("INFO", "kiln")
    for lr in (2e-3, 1e-3):
        with pytest.raises(KilnError, match="saved at step 1"):
            train_here(data, tmp_path, settings(budget_minutes=0, lr=lr))
    assert "resumed" not in caplog.text
    assert len(list((tmp_path / "state").iterdir())) == 2
    train_here(data, tmp_path, settings(lr=1e-3))
    assert "resumed" in caplog.text
    assert not (tmp_path / "state").exists()


def test_two_processes_learn_what_one_does(data, tmp_path):
    one = train(data, tmp_path / "one", settings(batch_size=4, accumulation=1, max_steps=3))
    assert one.returncode == 0, one.stderr
    text = settings(batch_size=2, accumulation=1, max_steps=3)
    launch = ["-m", "scripts.common.launch", "--processes", "2", "--", "scripts.busi.train_lora"]
    two = subprocess.run(
        [sys.executable, *launch, *arguments(data, tmp_path / "two", text)],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert two.returncode == 0, two.stderr
    losses = [
        [row["loss"] for row in json.loads((tmp_path / name / "metrics.json").read_text())["train"]]
        for name in ("one", "two")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_qlora_learns_and_starts_from_an_earlier_adapter(undisturbed, data, tmp_path):
    text = settings(init_from=str(undisturbed / "final_model"), optimiser="adamw_8bit")
    train_here(data, tmp_path, text, "qlora")
    curves = json.loads((tmp_path / "metrics.json").read_text())["train"]
    fresh = json.loads((undisturbed / "metrics.json").read_text())["train"]
    assert curves[0]["loss"] < (fresh[0]["loss"] + fresh[-1]["loss"]) / 2
    assert curves[0]["loss"] > curves[-1]["loss"]
    weights = load_file(tmp_path / "final_model/adapter_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


def test_an_image_that_became_unreadable_stops_it_with_its_name(data, tmp_path):
    broken = chat_rows(tmp_path, "train", 6)
    chat_rows(tmp_path, "validation", 3)
    (tmp_path / "base").symlink_to(data / "base")
    victim = tmp_path / "images" / read_rows(broken)["image"][3]
    victim.write_text("no picture")
    for workers in (0, 1):
        with pytest.raises(KilnError, match=re.escape(victim.name)):
            train_here(tmp_path, tmp_path / "out", settings(workers=workers))
    assert not (tmp_path / "out/final_model").exists()


def test_a_folder_that_is_no_model_is_refused(data, tmp_path):
    for name in ("images", "base"):
        (tmp_path / name).mkdir()
    for name in ("train.jsonl", "validation.jsonl"):
        (tmp_path / name).symlink_to(data / name)
    with pytest.raises(KilnError, match=r"no model \(no config.json there\)"):
        train_here(tmp_path, tmp_path / "out")


@pytest.mark.parametrize(
    ("items", "processes", "expected"), [(630, 1, 3 * 40), (630, 4, 3 * 10), (16, 1, 3), (1, 1, 3), (17, 1, 6)]
)
def test_steps_of_the_published_schedule(items, processes, expected):
    assert fine_tuning.total_steps(TrainSettings(), items, processes) == expected


def test_a_row_that_is_no_chat_row_is_named(tmp_path):
    table = chat_rows(tmp_path, "train", 3)
    table.write_text(table.read_text() + '{"image": "x.png"}\n')
    with pytest.raises(KilnError, match=r"train.jsonl, line 4: no chat row"):
        read_rows(table)


def test_zero2_without_deepspeed_says_so_before_any_model_is_loaded(data, tmp_path):
    if importlib.util.find_spec("deepspeed"):
        pytest.skip("deepspeed is installed")
    with pytest.raises(KilnError, match="deepspeed is not installed here"):
        train_here(data, tmp_path, settings(deepspeed="zero2"))


def test_what_zero2_leaves_open_is_what_the_trainer_fills_in():
    """The keys that transformers' integration replaces (its `trainer_config_process`)."""
    auto = {key for key, value in fine_tuning.ZERO2.items() if value == "auto"}
    assert auto == {
        "gradient_accumulation_steps", "gradient_clipping", "train_batch_size", "train_micro_batch_size_per_gpu",
    }  # fmt: skip
    assert json.loads(json.dumps(fine_tuning.ZERO2)) == fine_tuning.ZERO2
    stage = fine_tuning.ZERO2["zero_optimization"]
    assert stage["stage"] == 2
    assert stage["offload_optimizer"]["device"] == "cpu"
    assert "optimizer" not in fine_tuning.ZERO2  # the Trainer's own is then exchanged for DeepSpeed's on the CPU


def test_several_gpus_are_started_by_torchrun():
    command = launch.step_command(["scripts.busi.train_lora", "--method", "lora"], 8)
    assert command[1:3] == ["-m", "torch.distributed.run"]
    assert "--nproc_per_node=8" in command
    assert command[-3:] == ["scripts.busi.train_lora", "--method", "lora"]
