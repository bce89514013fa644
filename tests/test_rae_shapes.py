"""The published sizes without their weights, compiled training, and the benchmarks at their smallest."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import Dataset
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import rae_training
from scripts.rae.autoencoder_training import Fit
from scripts.rae.decoder import DECODERS, Decoder

ROOT = Path(__file__).resolve().parents[1]


class Noise(Dataset):
    """(epoch, index) -> (a smooth picture [3,64,64] in [0,1], index), as `TrainingPictures` gives them."""

    def __init__(self, count: int = 48):
        coarse = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(0))
        self.pictures = torch.nn.functional.interpolate(coarse, size=64, mode="bilinear")

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, key: tuple[int, int]) -> tuple[torch.Tensor, int]:
        return self.pictures[key[1]], key[1]


def trained(root: Path, device: str = "cpu", **changes) -> Fit:
    """A finished small training through all stages: three epochs of three steps."""
    settings = {
        "epochs": 3, "batch_size": 16, "warmup_epochs": 1, "discriminator_start": 1, "gan_start": 2, "lr": 1e-3,
        "precision": "fp32",
    } | changes  # fmt: skip
    fit = rae_training.make_fit(root, rae_training.DEMO, Noise(), device, 1, **settings)
    fit.run(lambda _: None, lambda _: None)
    return fit


@pytest.mark.parametrize(("name", "published"), [("ViT-B", 22.1), ("ViT-L", 78.0), ("ViT-XL", 106.6)])
def test_decoders_take_the_published_multiplications(name, published):
    """Giga multiply-adds of a picture's 257 tokens, those of attention's own products left out, as published."""
    with torch.device("meta"):
        decoder, latents = Decoder(768, 16, 256, DECODERS[name]), torch.zeros(1, 768, 16, 16)
    with FlopCounterMode(display=False) as counter:
        assert decoder.unpatchify(decoder(latents)).shape == (1, 3, 256, 256)
    counts = counter.get_flop_counts()["Global"]
    linear = counts[torch.ops.aten.mm] + counts[torch.ops.aten.addmm]
    assert linear / 2e9 == pytest.approx(published, abs=0.05)


@pytest.mark.slow
def test_compiled_training_equals_plain_in_every_stage(tmp_path):
    rae_training.prepare(tmp_path, rae_training.DEMO)
    plain, compiled = (trained(tmp_path, compile=choice, lr=2e-4) for choice in (False, True))
    assert "adaptive_weight" in plain.at.history[-1]
    for ours, other in zip(compiled.at.history, plain.at.history, strict=True):
        assert ours == pytest.approx(other, rel=1e-3)
    for name, value in compiled.autoencoder.decoder.state_dict().items():
        torch.testing.assert_close(value, plain.autoencoder.decoder.state_dict()[name], atol=1e-3, rtol=1e-3)


@pytest.mark.slow(minutes=2)
def test_the_benchmarks_run_and_both_sides_agree(tmp_path):
    command = [sys.executable, "-m", "benchmarks.rae", "--smallest", "--output", str(tmp_path / "all.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "all.json").read_text())
    for part in ("arrow", "evaluation", "loading"):
        assert 0 < found[part]["ratio_min"] <= found[part]["ratio_max"], part
        assert found[part]["alternative"]
    assert found["evaluation"]["rfid"]["ours"] == pytest.approx(found["evaluation"]["rfid"]["alternative"], rel=1e-3)
    for stages in found["training"]["shares"].values():
        assert all(0 < one["not_forward_or_backward"] < 1 for one in stages.values())
