"""What the tests of rae's scores share: Inception weights that no one trained, and an untrained autoencoder."""

import unittest.mock
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch_fidelity import feature_extractor_inceptionv3
from transformers import SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel

from scripts.rae import checkpoints
from scripts.rae.decoder import Decoder, Size
from scripts.rae.encoder import Encoder

SIDE = 32


def inception_weights(path: Path) -> Path:
    """Random weights in the layout of torch-fidelity's file; He-normal, as default ones make all features alike."""
    own = feature_extractor_inceptionv3.FeatureExtractorInceptionV3
    with (
        unittest.mock.patch.object(feature_extractor_inceptionv3, "load_state_dict_from_url", lambda *_, **__: {}),
        unittest.mock.patch.object(own, "load_state_dict", lambda *_, **__: None),
    ):
        model = own("inception-v3-compat", ["2048"])
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    torch.save(model.state_dict(), path)
    return path


def untrained(folder: Path) -> tuple[Path, Path]:
    """(checkpoint, folder of its encoder): a tiny SigLIP and a decoder with random weights."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    encoder = folder / "siglip2-base-patch16-256"
    SiglipVisionModel(SiglipVisionConfig(image_size=SIDE, patch_size=8, **sizes)).save_pretrained(encoder)
    SiglipImageProcessor().save_pretrained(encoder)
    size = Size(1, 32, 64, 2)
    decoder = Decoder(32, 4, SIDE, size)
    facts = checkpoints.Facts("siglip2", checkpoints.identity(encoder), SIDE, SIDE, tuple(size), 0.8, 1)
    mean, var = torch.zeros(32, 4, 4), torch.ones(32, 4, 4)
    assert Encoder(encoder, SIDE).grid == 4
    checkpoints.save(folder / "autoencoder.safetensors", decoder, mean, var, facts)
    return folder / "autoencoder.safetensors", encoder


def noisy_pictures(root: Path, count: int, classes: int = 2) -> Path:
    """Blocks of colour under noise, 40x36 PNGs in class folders, or in `root` itself if `classes` is 0."""
    rng = np.random.default_rng(0)
    for number in range(count):
        blocks = np.kron(rng.integers(30, 220, (3, 3, 3)), np.ones((12, 14, 1)))[:36, :40]
        pixels = np.clip(blocks + rng.normal(0, 12, blocks.shape), 0, 255).astype(np.uint8)
        place = root / f"class{number * classes // count}" if classes else root
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(place / f"{number:03d}.png")
    return root
