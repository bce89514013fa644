"""What only a GPU shows: half precision, 4-bit kernels, and DeepSpeed."""

import importlib.util
import json

import pytest
import torch
from test_busi_training import arguments, settings
from vlm_fixtures import chat_rows, tiny_base

from scripts.busi import train_lora

pytestmark = [pytest.mark.gpu, pytest.mark.slow]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("busi gpu")
    tiny_base(root / "base")
    chat_rows(root, "train", 24)
    chat_rows(root, "validation", 6)
    return root


def losses(data, out, text: str, method: str = "lora", device: str = "cuda:0") -> list[float]:
    options = arguments(data, out, text, method)
    options[options.index("--device") + 1] = device
    train_lora.main(options)
    return [row["loss"] for row in json.loads((out / "metrics.json").read_text())["train"]]


@pytest.mark.parametrize("method", ["lora", "qlora"])
@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_a_gpu_learns_what_a_cpu_does(data, tmp_path, method, precision):
    gpu = losses(data, tmp_path / "gpu", settings(precision=precision), method)
    cpu = losses(data, tmp_path / "cpu", settings(precision="fp32"), method, "cpu")
    assert gpu[0] == pytest.approx(cpu[0], rel=0.03)  # before any step: the same weights, other rounding
    assert gpu[-1] == pytest.approx(cpu[-1], rel=0.1)


@pytest.mark.parametrize("optimiser", ["adamw_8bit", "paged_adamw_8bit"])
def test_eight_bit_optimisers_learn(data, tmp_path, optimiser):
    found = losses(data, tmp_path, settings(optimiser=optimiser, gradient_checkpointing=True))
    assert found[-1] < found[0]


def test_deterministic_kernels_give_equal_bytes(data, tmp_path):
    text = settings(deterministic=True, precision="bf16")
    for name in ("one", "two"):
        losses(data, tmp_path / name, text)
    one, two = ((tmp_path / name / "final_model/adapter_model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
def test_zero2_learns_what_one_gpu_does(data, tmp_path):
    plain = losses(data, tmp_path / "plain", settings(precision="bf16"))
    sharded = losses(data, tmp_path / "sharded", settings(precision="bf16", deepspeed="zero2"))
    assert torch.tensor(sharded) == pytest.approx(torch.tensor(plain), rel=0.05)
