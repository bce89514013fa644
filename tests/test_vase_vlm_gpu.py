"""What only a GPU shows of the second half: half precision, merging in bfloat16, answers in batches, vLLM."""

import importlib.util
import json
import subprocess

import pytest
import torch
from test_vase_training import ROOT, command
from vase_fixtures import run, technique_rows

from scripts.common import tiny_vlm
from scripts.vase import generation, merge
from scripts.vase.vqa_rows import read_rows

pytestmark = [pytest.mark.gpu, pytest.mark.slow]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("vase gpu")
    tiny_vlm.build(root / "base", ["What technique?", "black-figure", "red-figure"] * 3, image_side=56)
    for kind, answered in (("sft", True), ("grpo", False)):
        technique_rows(root, f"{kind}_train", 20, answered)
        technique_rows(root, f"{kind}_validation", 6, answered)
    return root


def train(kind, data, out, device="cuda:0", **changes) -> list[dict]:
    line = command(kind, data, out, **changes)
    line[line.index("--device") + 1] = device
    line[line.index("--") : line.index("--")] = ["--gpus", "0" if device == "cpu" else "1"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((out / "metrics.json").read_text())["train"]


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_sft_on_a_gpu_learns_what_a_cpu_does(data, tmp_path, precision):
    gpu = train("sft", data, tmp_path / "gpu", precision=precision)
    cpu = train("sft", data, tmp_path / "cpu", "cpu", precision="fp32")
    assert gpu[0]["loss"] == pytest.approx(cpu[0]["loss"], rel=0.03)
    assert gpu[-1]["loss"] == pytest.approx(cpu[-1]["loss"], rel=0.15)


def test_an_adapter_merges_in_bfloat16_within_tolerance(data, tmp_path):
    train("sft", data, tmp_path / "sft", precision="bf16")
    run(
        merge.main, "--base", data / "base", "--adapter", tmp_path / "sft/best", "--images", data / "images",
        "--prompts", data / "sft_validation.jsonl", "--output-folder", tmp_path / "merged", "--meta",
        tmp_path / "merged/meta.json", "--device", "cuda:0",
    )  # fmt: skip
    parity = json.loads((tmp_path / "merged/parity.json").read_text())
    assert parity["relative_error"] <= parity["tolerance"]


@pytest.mark.parametrize(
    "vllm",
    [
        "none",
        pytest.param("colocate", marks=pytest.mark.skipif(not importlib.util.find_spec("vllm"), reason="no vLLM")),
    ],
)
def test_grpo_on_a_gpu(data, tmp_path, vllm):
    curves = train("grpo", data, tmp_path, precision="bf16", vllm=vllm)
    assert len(curves) == 6 and all(torch.isfinite(torch.tensor(row["loss"])) for row in curves)


def test_answers_on_a_gpu_are_those_of_a_cpu(data):
    rows = read_rows(data / "grpo_train.jsonl")
    texts = []
    for device in ("cpu", "cuda:0"):
        model, processor = generation.load(data / "base", torch.device(device), torch.float32, 56**2)
        found = generation.generate(model, processor, data / "images", rows, max_new_tokens=4)
        texts.append([one.text for one in found])
    same = sum(a == b for a, b in zip(*texts, strict=True))
    assert same >= 0.9 * len(rows)  # a tie of two tokens may fall otherwise
