"""What only a GPU shows of pipeline rae: half precision, deterministic kernels, compiled steps, the published sizes."""

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from test_rae_shapes import Noise, trained

from benchmarks import rae_data, rae_training
from scripts.common import devices
from scripts.rae import checkpoints, extractors, reconstruct
from scripts.rae.decoder import Size
from scripts.rae.perceptual import Lpips

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("rae gpu")
    rae_training.prepare(root, rae_training.DEMO)
    return root


@pytest.fixture(autouse=True)
def exact_and_apart(monkeypatch):
    """No TF32, and no device, precision or determinism that outlives its test."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "")
    monkeypatch.delenv("ACCELERATE_TORCH_DEVICE")
    yield
    forget()
    torch.use_deterministic_algorithms(False)


def forget() -> None:
    """Accelerate keeps one device and precision for a process."""
    AcceleratorState._reset_state(reset_partial_state=True)


def run(models, monkeypatch, device: str, **changes) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """(losses by epoch, decoder's weights on the CPU) of a small training through all stages."""
    forget()
    monkeypatch.delenv("ACCELERATE_TORCH_DEVICE", raising=False)
    fit = trained(models, device, **changes)
    assert fit.accelerator.device.type == device.split(":")[0]
    return fit.at.history, {name: value.cpu() for name, value in fit.autoencoder.decoder.state_dict().items()}


def test_a_gpu_trains_as_a_cpu_does(models, monkeypatch):
    """Without noise, which is drawn on the device; the adversarial stage amplifies rounding."""
    gpu, _ = run(models, monkeypatch, "cuda:0", tau=0)
    cpu, _ = run(models, monkeypatch, "cpu", tau=0)
    for ours, other in zip(gpu, cpu, strict=True):
        assert ours == pytest.approx(other, rel=2e-2 if "gan" in other else 2e-3)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_learns_what_full_does(models, monkeypatch, precision):
    half, weights = run(models, monkeypatch, "cuda:0", precision=precision)
    full, _ = run(models, monkeypatch, "cuda:0")
    assert half[-1]["l1"] < half[0]["l1"]
    assert half[0]["l1"] == pytest.approx(full[0]["l1"], rel=0.02)
    assert all(value.isfinite().all() for value in weights.values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_deterministic_runs_are_equal_to_the_byte(models, monkeypatch, precision):
    runs = [run(models, monkeypatch, "cuda:0", precision=precision, deterministic=True) for _ in range(2)]
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(value, runs[1][1][name]) for name, value in runs[0][1].items())


def test_compiled_steps_equal_plain_ones(models, monkeypatch):
    plain, _ = run(models, monkeypatch, "cuda:0")
    compiled, _ = run(models, monkeypatch, "cuda:0", compile=True)
    for ours, other in zip(compiled, plain, strict=True):
        assert ours == pytest.approx(other, rel=2e-2 if "gan" in other else 2e-3)


def test_scores_of_a_gpu_are_those_of_a_cpu(models, monkeypatch):
    rae_data.write_checkpoint(models / "one.safetensors", models / "encoder", 64, 64, Size(2, 64, 128, 4))
    images = (torch.stack([Noise()[0, i][0] for i in range(16)]) * 255).round().to(torch.uint8)
    found = {}
    for device in ("cuda:0", "cpu"):
        forget()
        monkeypatch.delenv("ACCELERATE_TORCH_DEVICE", raising=False)
        accelerator = devices.make_accelerator(device, "fp32", 1)
        model, _ = checkpoints.load(models / "one.safetensors", models / "encoder")
        lpips = Lpips(None, (8, 16)).to(accelerator.device)
        made = reconstruct.reconstruct(images, model.to(accelerator.device), accelerator)
        scores = reconstruct.score(images, made, lpips)
        extractor = extractors.load_extractor(extractors.RANDOM, None, accelerator.device)
        found[device] = made.cpu(), scores, extractor(images)
    (gpu, gpu_scores, gpu_features), (cpu, cpu_scores, cpu_features) = found.values()
    assert (gpu.int() - cpu.int()).abs().max() <= 1
    assert (gpu != cpu).float().mean() < 1e-3
    for name, values in cpu_scores.items():
        np.testing.assert_allclose(gpu_scores[name], values, rtol=1e-3, err_msg=name)
    np.testing.assert_allclose(gpu_features, cpu_features, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_the_published_sizes_train(tmp_path, monkeypatch, capsys):
    """DINOv2-B with registers, ViT-XL, S_8 and VGG16 at batch 8, a step of each stage; prints the peak of memory."""
    rae_training.prepare(tmp_path, rae_training.PAPER)
    forget()
    fit = rae_training.make_fit(tmp_path, rae_training.PAPER, range(800), "cuda:0", 1, batch_size=8, precision="bf16")
    images, peaks = torch.rand(8, 3, 256, 256, generator=torch.Generator().manual_seed(0)), {}
    for stage, epoch in rae_training.STAGES.items():
        torch.cuda.reset_peak_memory_stats()
        fit.at.epoch, fit.at.sums, fit.at.counts = epoch, {}, {}
        fit._step(images, torch.arange(8))
        assert all(np.isfinite(value) for value in fit.at.sums.values())
        assert ("gan" in fit.at.sums, "discriminator" in fit.at.sums) == (epoch >= 8, epoch >= 6)
        peaks[stage] = round(torch.cuda.max_memory_allocated() / 2**30, 1)
    with capsys.disabled():
        print(f"\npeak memory in GiB at batch 8: {peaks}")
