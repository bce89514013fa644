"""SFT and GRPO by ms-swift: what they write, that no kill costs more than time, and what they refuse."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from vase_fixtures import ROOT, TECHNIQUES, error_of, technique_rows

from scripts.common import tiny_vlm, trivial
from scripts.vase.settings import RewardSettings

pytestmark = pytest.mark.slow
TRAIN = {
    "batch_size": 4, "accumulation": 1, "max_steps": 6, "lr": 1e-3, "workers": 0, "dataset_processes": 1,
    "gradient_checkpointing": False, "eval_steps": 2, "save_steps": 2, "save_total_limit": 1, "logging_steps": 1,
}  # fmt: skip
SFT = {**TRAIN, "tuner": {"rank": 4, "alpha": 8}}
GRPO = {**TRAIN, "tuner": {"tuner": "lora", "rank": 4, "alpha": 8}, "generations": 2, "max_completion_length": 6}
GRPO |= {"eval_steps": 100, "lr": 1e-3}
REWARD = {"format": "plain"}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A folder with a tiny base, and rows of 20 training and 6 validation pictures for SFT and GRPO."""
    root = tmp_path_factory.mktemp("vase training")
    tiny_vlm.build(root / "base", ["What technique?", *TECHNIQUES] * 3, image_side=56)
    for kind, answered in (("sft", True), ("grpo", False)):
        technique_rows(root, f"{kind}_train", 20, answered)
        technique_rows(root, f"{kind}_validation", 6, answered)
    return root


def command(kind: str, data: Path, out: Path, processes: int = 1, **changes) -> list[str]:
    paths = {
        "model": data / "base", "images": data / "images", "train": data / f"{kind}_train.jsonl",
        "validation": data / f"{kind}_validation.jsonl", "state-folder": out / "state",
        "tracker-folder": out / "curves", "output-folder": out, "meta": out / "meta.json",
    }  # fmt: skip
    options = [part for name, path in paths.items() for part in (f"--{name}", str(path))]
    values = {kind: {**(SFT if kind == "sft" else GRPO), **changes}}
    values |= {"reward": REWARD} if kind == "grpo" else {}
    start = ["-m", "scripts.common.launch", "--processes", str(processes), "--", f"scripts.vase.train_{kind}"]
    return [sys.executable, *start, *options, "--settings", json.dumps(values), "--threads", "1", "--device", "cpu"]


def train(kind: str, data: Path, out: Path, processes: int = 1, **changes) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(kind, data, out, processes, **changes), cwd=ROOT, capture_output=True, text=True, timeout=400
    )


def made(kind: str, out: Path) -> dict[str, bytes]:
    """What must be equal to the byte."""
    names = ["last/adapter_model.safetensors", "last/adapter_config.json", "metrics.json"]
    names += ["best/adapter_model.safetensors"] if kind == "sft" else ["completions.jsonl"]
    return {name: (out / name).read_bytes() for name in names}


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    """{kind: outputs of a training that nothing disturbed}, trained when first asked for."""

    class Outputs(dict):
        def __missing__(self, kind: str) -> Path:
            out = tmp_path_factory.mktemp(f"undisturbed_{kind}")
            done = train(kind, data, out)
            assert done.returncode == 0, done.stderr[-3000:]
            self[kind] = out
            return out

    return Outputs()


def test_what_sft_writes(undisturbed):
    out = undisturbed["sft"]
    for name in ("best", "last"):
        files = {p.name for p in (out / name).iterdir()}
        assert {"adapter_model.safetensors", "adapter_config.json", "files.json"} <= files
        assert not [f for f in files if f.endswith((".bin", ".pt", ".pth")) or "state" in f or f == "args.json"]
        assert str(out) not in (out / name / "adapter_config.json").read_text()
    curves = json.loads((out / "metrics.json").read_text())
    assert [row["step"] for row in curves["train"]] == list(range(1, 7))
    assert [row["step"] for row in curves["validation"]] == [2, 4, 6]
    losses = {row["step"]: row["eval_loss"] for row in curves["validation"]}
    assert curves["best_step"] == min(losses, key=losses.get)
    assert losses[6] < curves["train"][0]["loss"]
    assert list(curves["floors"]) == [trivial.GUESS] and 0 < curves["floors"][trivial.GUESS] < losses[2]
    assert not (out / "state").exists()
    assert list((out / "curves").glob("events.*"))


def test_what_is_learned_of_an_answer_is_what_ms_swift_labels(data):
    """A guess is scored on the tokens that have a label; ms-swift's own template says which."""
    code = """
import json, sys
from swift.model import get_processor
from swift.template import get_template
from scripts.vase import swift_template
swift_template.take_image_tokens_from_tokenizer()
template = get_template(get_processor(sys.argv[1], model_type="qwen2_5_vl"), template_type="qwen2_5_vl")
template.set_mode("train")
answers = json.loads(sys.argv[2])
rows = [[{"role": "user", "content": "What?"}, {"role": "assistant", "content": answer}] for answer in answers]
labels = [template.encode({"messages": row})["labels"] for row in rows]
theirs = [[one for one in row if one != -100] for row in labels]
print(json.dumps([theirs, swift_template.answer_tokens(sys.argv[1], "qwen2_5_vl", answers)]))
"""
    answers = [*TECHNIQUES, "a long answer, of several words and signs!", "x"]
    command = [sys.executable, "-c", code, str(data / "base"), json.dumps(answers)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    theirs, ours = json.loads(done.stdout.splitlines()[-1])
    assert ours == theirs and len(set(map(len, ours))) > 1, (ours, theirs)


def test_what_grpo_writes(undisturbed, data):
    out = undisturbed["grpo"]
    lines = [json.loads(line) for line in (out / "completions.jsonl").read_text().splitlines()]
    assert lines and {"prompt", "completion", "advantages"} <= set(lines[0])
    curves = json.loads((out / "metrics.json").read_text())
    assert len(curves["train"]) == 6 and all("reward" in row for row in curves["train"])
    rows = [json.loads(line) for line in (data / "grpo_train.jsonl").read_text().splitlines()]
    right = max(Counter(row["reference"] for row in rows).values()) / len(rows)
    values = RewardSettings(**REWARD)  # right: 1 and the bonus; wrong: a rival, so the penalty
    wanted = right * (1 + values.bonus) - (1 - right) * values.penalty + values.format_weight
    assert curves["floors"] == {"majority answers": pytest.approx(wanted)}
    assert (out / "last/adapter_model.safetensors").is_file()
    assert not (out / "state").exists()


def kill_at(process: subprocess.Popen, when) -> bool:
    """Wait until `when()` holds, then kill the whole tree; whether it came to that."""
    while process.poll() is None:
        if when():
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return True
        time.sleep(0.002)
    return False


def in_a_save(state: Path) -> bool:
    """Whether a checkpoint is there that is not whole."""
    return any(not (p / "COMPLETE").exists() for p in state.glob("*/checkpoint-*"))


@pytest.mark.parametrize("kind", ["sft", "grpo"])
def test_killed_at_any_step_and_in_a_save_it_ends_with_the_same_bytes(undisturbed, data, tmp_path, kind):
    rng = random.Random(kind)
    state = tmp_path / "state"
    log = tmp_path / "log"

    def start() -> subprocess.Popen:
        return subprocess.Popen(
            command(kind, data, tmp_path), cwd=ROOT, stderr=log.open("w"), stdout=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip

    wanted = rng.choice((3, 5))  # between two checkpoints
    assert kill_at(start(), lambda: f"step {wanted}/" in log.read_text())
    assert kill_at(start(), lambda: in_a_save(state))
    assert "resumed from" in log.read_text()
    done = train(kind, data, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "resumed from" in done.stderr and "was not finished: moved" in done.stderr
    assert made(kind, tmp_path) == made(kind, undisturbed[kind])


def test_a_time_budget_saves_exits_non_zero_and_carries_on(undisturbed, data, tmp_path):
    done = train("sft", data, tmp_path, budget_minutes=0)
    assert "time budget is used up; saved at step 1" in error_of(done)
    assert (tmp_path / "state").is_dir() and not (tmp_path / "last").exists()
    (told,) = (json.loads(p.read_text()) for p in (tmp_path / "state").glob("*/heartbeat.json"))
    assert (told["step"], told["last_save"]["step"], told["phase"]) == (1, 1, "ending") and told["loss"] > 0
    assert told["owner"] == "scripts.vase.train_sft"
    done = train("sft", data, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "checkpoint-1" in done.stderr
    assert made("sft", tmp_path) == made("sft", undisturbed["sft"])


def test_two_processes_learn_what_one_does(data, tmp_path):
    one = train("sft", data, tmp_path / "one", max_steps=2, batch_size=4)
    two = train("sft", data, tmp_path / "two", processes=2, max_steps=2, batch_size=2)
    assert one.returncode == 0, one.stderr[-3000:]
    assert two.returncode == 0, two.stderr[-3000:]
    losses = [
        [row["loss"] for row in json.loads((tmp_path / name / "metrics.json").read_text())["train"]]
        for name in ("one", "two")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)
    weights = [load_file(tmp_path / name / "last/adapter_model.safetensors") for name in ("one", "two")]
    for name, tensor in weights[0].items():
        assert tensor.sub(weights[1][name]).abs().max() < 2e-3, name


def merge(data: Path, adapter: Path, out: Path) -> subprocess.CompletedProcess:
    paths = {
        "base": data / "base", "adapter": adapter, "images": data / "images",
        "prompts": data / "sft_validation.jsonl", "output-folder": out, "meta": out / "meta.json",
    }  # fmt: skip
    options = [part for name, path in paths.items() for part in (f"--{name}", str(path))]
    command = [sys.executable, "-m", "scripts.vase.merge", *options, "--threads", "1", "--device", "cpu"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_a_merged_model_is_base_and_adapter_and_replaces_an_older_one(undisturbed, data, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/stale.safetensors").write_bytes(b"of another adapter")
    done = merge(data, undisturbed["sft"] / "best", tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert not (tmp_path / "model/stale.safetensors").exists()
    parity = json.loads((tmp_path / "parity.json").read_text())
    assert parity["relative_error"] < parity["tolerance"] == 1e-4 < parity["adapter_effect"]
    # independent of swift and peft: W + alpha / rank * B A
    base = load_file(data / "base/model.safetensors")
    merged = load_file(tmp_path / "model/model.safetensors")
    adapter = load_file(undisturbed["sft"] / "best/adapter_model.safetensors")
    pairs = [name for name in adapter if name.endswith("lora_A.weight")]
    assert pairs
    for name in pairs:
        a, b = adapter[name], adapter[name.replace("lora_A", "lora_B")]
        part = name.removeprefix("base_model.model.").replace(".lora_A.weight", ".weight")
        key = next(k for k in base if k.removeprefix("model.").endswith(part.split("layers.")[1]) and "visual" not in k)
        expected = base[key] + SFT["tuner"]["alpha"] / SFT["tuner"]["rank"] * b @ a
        assert (merged[key] - expected).abs().max() < 1e-6, name


def test_an_adapter_of_another_base_is_refused(undisturbed, data, tmp_path):
    shutil.copytree(undisturbed["sft"] / "best", tmp_path / "adapter")
    path = tmp_path / "adapter/adapter_model.safetensors"
    save_file({name: tensor.repeat(2, 2) for name, tensor in load_file(path).items()}, path)
    said = error_of(merge(data, tmp_path / "adapter", tmp_path / "out"))
    assert "adapter and base do not fit" in said
    assert not (tmp_path / "out/model").exists()


def test_a_base_without_processor_is_refused(data, tmp_path):
    shutil.copytree(data / "base", tmp_path / "base")
    for name in ("preprocessor_config.json", "processor_config.json"):
        (tmp_path / "base" / name).unlink(missing_ok=True)
    for name in ("images", "sft_train.jsonl", "sft_validation.jsonl"):
        (tmp_path / name).symlink_to(data / name)
    said = error_of(train("sft", tmp_path, tmp_path / "out"))
    assert "no processor" in said


def test_a_row_too_long_stops_it_and_is_never_replaced(data, tmp_path):
    done = train("sft", data, tmp_path, max_length=16)
    assert done.returncode != 0
    assert not (tmp_path / "last").exists()
