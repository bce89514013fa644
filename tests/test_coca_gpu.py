"""What only a GPU shows of pipeline coca: half precision, deterministic kernels, compiled steps, the published size."""

import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from test_coca_training import DIM, KILLED, RESULTS, ROOT, SETTINGS, data, first_step, open_fit, training  # noqa: F401

from benchmarks import coca, coca_training
from scripts.coca import encode_slides, train
from scripts.coca.generation import greedy_ids
from scripts.coca.model import CoCa
from scripts.coca.perceiver import Perceiver
from scripts.coca.settings import EncoderSettings, ModelSettings
from scripts.coca.slide_model import encoder_shape
from scripts.common import devices

pytestmark = pytest.mark.gpu
GPU = "cuda:0"
LOSSES = ("caption", "contrastive", "val_caption", "val_contrastive")


@pytest.fixture(autouse=True)
def exact_and_apart(monkeypatch):
    """No TF32, and no device, precision or determinism that outlives its test."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "")
    monkeypatch.delenv("ACCELERATE_TORCH_DEVICE")
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.use_deterministic_algorithms(False)


def run(data, device=GPU, **changes) -> tuple[list[dict], dict[str, torch.Tensor]]:  # noqa: F811
    """(losses by epoch, weights on the CPU) of a small training with its slide encoder."""
    fit = open_fit(data, device=device, **changes)
    assert fit.device.type == device.split(":")[0]
    fit.run(lambda _: None, lambda _: None)
    return fit.at.history, {name: value.cpu() for name, value in fit.model.state_dict().items()}


def assert_same_losses(found: list[dict], wanted: list[dict], tolerance: float) -> None:
    for ours, other in zip(found, wanted, strict=True):
        for name in LOSSES:
            assert ours[name] == pytest.approx(other[name], rel=tolerance), name


def test_a_gpu_trains_as_a_cpu_does(data):  # noqa: F811
    assert_same_losses(run(data)[0], run(data, "cpu")[0], 1e-2)


@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 0.1), ("fp16", 0.3)])
def test_half_precision_follows_full(data, precision, tolerance):  # noqa: F811
    """fp16 leaves steps out while its scale finds its place."""
    half, weights = run(data, precision=precision)
    full, _ = run(data)
    assert half[-1]["caption"] < 0.8 * half[0]["caption"]
    assert_same_losses(half, full, tolerance)
    assert all(value.isfinite().all() for value in weights.values())


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_deterministic_runs_are_equal_to_the_byte(data, precision):  # noqa: F811
    runs = [run(data, precision=precision, deterministic=True, max_tiles=130) for _ in range(2)]
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(value, runs[1][1][name]) for name, value in runs[0][1].items())


@pytest.mark.slow(minutes=2)
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_killed_and_resumed_it_ends_with_the_same_bytes(data, tmp_path, precision):  # noqa: F811
    """SIGKILL between two steps and in a save; fp16 has a loss scale to go on from."""
    numerics = {"deterministic": True, "precision": precision}
    train.main(training(data, tmp_path / "whole", "--device", GPU, **numerics))
    out = tmp_path / "out"
    options = training(data, out, "--device", GPU, "--settings", '{"train": {"save_minutes": 0}}', **numerics)
    for at, where in ((3, "between"), (7, "inside")):
        done = subprocess.run([sys.executable, "-c", KILLED, str(at), where, *options], cwd=ROOT, capture_output=True,
                              text=True, timeout=600)  # fmt: skip
        assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
    done = subprocess.run([sys.executable, "-m", "scripts.coca.train", *options], cwd=ROOT, capture_output=True,
                          text=True, timeout=600)  # fmt: skip
    assert done.returncode == 0 and "resumed from" in done.stderr, done.stderr[-3000:]
    for name in RESULTS:
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


@pytest.mark.slow
def test_compiled_training_equals_plain(data):  # noqa: F811
    assert_same_losses(run(data, compile=True)[0], run(data)[0], 1e-2)


@pytest.mark.parametrize("budget", [{"max_tiles": 70}, {"max_tokens": 40}])
def test_passes_of_the_model_equal_one_big_batch(data, budget):  # noqa: F811
    wanted, found = (first_step(open_fit(data, device=GPU, clip_grad=0, **more)) for more in ({}, budget))
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-4, msg=name)


def test_latents_of_a_gpu_are_those_of_a_cpu():
    torch.manual_seed(0)
    encoder = Perceiver(DIM, **encoder_shape(EncoderSettings(**SETTINGS["encoder"]))).eval()
    tiles, found = torch.randn(1000, DIM).half(), {}
    for device in (GPU, "cpu"):
        accelerator = devices.make_accelerator(device, "fp32", 1)
        encoder.to(accelerator.device)
        found[device] = encode_slides.encode(tiles, encoder, 64, accelerator)
        with torch.inference_mode():
            whole = encoder(tiles[None].to(accelerator.device))[1][0].cpu()
        np.testing.assert_allclose(found[device][1:], whole, atol=1e-3)
    np.testing.assert_allclose(found[GPU], found["cpu"], atol=1e-3)


def test_captions_of_a_gpu_are_those_of_a_cpu():
    torch.manual_seed(0)
    model = CoCa(60, **ModelSettings(**SETTINGS["model"]).model_dump(), image_dim=16).eval()
    images, mask = torch.randn(5, 9, 16), torch.arange(9) < torch.tensor([[9], [3], [1], [8], [5]])
    texts = SimpleNamespace(pad_id=0, bos_id=1, eos_id=2)
    found = [greedy_ids(model.to(one), images.to(one), mask.to(one), texts, 20) for one in (GPU, "cpu")]
    assert found[0] == found[1] and max(map(len, found[0])) > 3


@pytest.mark.slow
def test_the_published_size_trains_and_agrees_with_the_package(tmp_path, capsys):
    """A batch of 4 in bf16: losses and gradients agree; prints memory and speed."""
    args = coca.parse(["--device", GPU, "--precision", "bf16", "--text-lengths", "512", "--runs", "2"])
    steps, memory = (part(args, tmp_path)["lengths"]["512"]
                     for part in (coca_training.compare_steps, coca_training.compare_memory))  # fmt: skip
    assert memory["share"] <= coca_training.MEMORY_TARGET and memory["gpu_share"] < 1
    with capsys.disabled():
        print(f"\nMiB: {memory['gpu_peak_mib']}; original over ours: {steps['ratio']:.2f}")
