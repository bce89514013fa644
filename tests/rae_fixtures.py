"""What the tests of the rae steps share: a stamp-sized data set, tiny encoders in the real classes, their training."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from transformers import (
    BitImageProcessor,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from scripts.demo import initialise_weights
from scripts.rae import (
    build_arrow,
    checkpoints,
    compute_latent_stats,
    compute_reference_stats,
    evaluate,
    reconstruct,
    train_autoencoder,
)
from scripts.rae.decoder import Decoder, Size
from scripts.rae.encoder import Encoder

SIDE = 32
SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
INPUT = {"dinov2": 28, "siglip2": 32}
PERCEPTUAL = {"weights": None, "backbone": [4, 8]}
TRAIN = {
    "image_size": SIDE,
    "decoder": {"size": "free", "layers": 1, "width": 32, "mlp": 64, "heads": 2},
    "perceptual": PERCEPTUAL,
    "discriminator": {"recipe": "free", "weights": None, "dim": 16, "depth": 2, "taps": [0, 1], "size": 32},
    "autoencoder": {
        "epochs": 8, "batch_size": 24, "lr": 5e-3, "final_lr": 5e-4, "warmup_epochs": 1, "discriminator_start": 4,
        "gan_start": 6, "ema_decay": 0.8, "precision": "fp32", "workers": 0, "tracker": "none",
    },
}  # fmt: skip
CALM = {"lr": 5e-4, "final_lr": 5e-5}  # rounding grows tenfold an epoch at the fixtures' rate
RESULTS = ("autoencoder.safetensors", "metrics.json")  # what a kill must not change
EVALUATE = {"extractor": "kiln-random", "inception": None, "batch_size": 8, "images_per_part": 10, "workers": 0}


def draw_images(root: Path, count: int = 60) -> None:
    """Coloured boxes and discs on tinted grounds, two classes, train/ and val/."""
    rng = np.random.default_rng(0)
    for number in range(2 * count):
        kind, side = ("box", "disc")[number % 2], "train" if number // 2 % 6 else "val"
        image = Image.new("RGB", (48, 40), tuple(int(x) for x in rng.integers(0, 256, 3)))
        x, y, size = (int(v) for v in rng.integers((4, 4, 12), (20, 14, 24)))
        shape = getattr(ImageDraw.Draw(image), "rectangle" if kind == "box" else "ellipse")
        shape((x, y, x + size, y + size), fill=tuple(int(v) for v in rng.integers(0, 256, 3)))
        path = root / side / kind / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, quality=92)


def encoder_settings(name: str) -> dict:
    return {"model": "a folder", "input_size": INPUT[name]}


def common(meta: Path, settings: dict) -> list[str]:
    return ["--device", "cpu", "--threads", "1", "--settings", json.dumps(settings), "--meta", str(meta)]


def build_data(root: Path) -> Path:
    """Into `root`: images/, arrow/dataset, an encoder and its stat.pt for each of dinov2 and siglip2."""
    draw_images(root / "images")
    torch.manual_seed(0)
    dino = Dinov2WithRegistersConfig(image_size=28, patch_size=7, num_register_tokens=4, **SIZES)
    Dinov2WithRegistersModel(dino).save_pretrained(root / "dinov2")
    BitImageProcessor().save_pretrained(root / "dinov2")
    siglip = SiglipVisionConfig(image_size=32, patch_size=8, intermediate_size=64, **SIZES)
    SiglipVisionModel(siglip).save_pretrained(root / "siglip2")
    SiglipImageProcessor().save_pretrained(root / "siglip2")
    build_arrow.main(["--images", str(root / "images"), "--output-folder", str(root / "arrow"), "--threads", "1",
                      "--settings", "images_per_shard=30"])  # fmt: skip
    for name in INPUT:
        statistics(root, name, root / f"{name}.pt")
    return root


def statistics(root: Path, name: str, output: Path, **changes) -> None:
    values = {"batch_size": 16, "images_per_part": 40, "workers": 0} | changes
    settings = {"image_size": SIDE, "encoder": encoder_settings(name), "latent_stats": values}
    compute_latent_stats.main(
        ["--dataset", str(root / "arrow/dataset"), "--encoder", str(root / name), "--output", str(output),
         "--state-folder", str(output.with_suffix(".state")), *common(output.with_suffix(".meta.json"), settings)]
    )  # fmt: skip


def training(root: Path, name: str, out: Path, **changes) -> list[str]:
    settings = TRAIN | {"encoder": encoder_settings(name), "autoencoder": TRAIN["autoencoder"] | changes}
    return [
        "--name", name, "--dataset", str(root / "arrow/dataset"), "--encoder", str(root / name),
        "--statistics", str(root / f"{name}.pt"), "--state-folder", str(out.with_name(f"{out.name}.state")),
        "--tracker-folder", str(out.with_name(f"{out.name}.curves")), "--output-folder", str(out),
        *common(out / "meta.json", settings),
    ]  # fmt: skip


def check_curve(out: Path, one: list[dict]) -> None:
    """The loss curve `one` of one process, but for rounding, which the GAN's stage amplifies."""
    ours = json.loads((out / "metrics.json").read_text())["history"]
    for mine, other in zip(ours, one, strict=True):
        assert mine.keys() == other.keys()
        for name in ("l1", "lpips", "discriminator"):
            if name in other:
                assert mine[name] == pytest.approx(other[name], rel=2e-3 if "gan" in other else 5e-4), name


def train_all(root: Path) -> dict[str, Path]:
    """{encoder: folder of its undisturbed training on `build_data`'s}."""
    for name in INPUT:
        train_autoencoder.main(training(root, name, root / f"train_{name}"))
    return {name: root / f"train_{name}" for name in INPUT}


def scored(data: Path, name: str, folder: Path, out: Path, **changes) -> dict:
    """metrics.json of an autoencoder."""
    values = EVALUATE | changes
    reference = ["--state-folder", str(out / "1"), "--output-folder", str(out / "reference")]
    compute_reference_stats.main(["--dataset", str(data / "arrow/dataset"), *reference,
                                  *common(out / "1.json", {"image_size": SIDE, "evaluate": values})])  # fmt: skip
    reconstruct.main(
        ["--dataset", str(data / "arrow/dataset"), "--checkpoint", str(folder / "autoencoder.safetensors"),
         "--encoder", str(data / name), "--state-folder", str(out / "2"), "--output-folder", str(out / "reconstruct"),
         *common(out / "2.json", {"perceptual": PERCEPTUAL, "evaluate": values})]
    )  # fmt: skip
    evaluate.main(
        ["--name", name, "--reference", str(out / "reference"), "--reconstructions", str(out / "reconstruct"),
         "--settings", json.dumps({"perceptual": PERCEPTUAL}), "--dataset-summary", str(data / "arrow/summary.json"),
         "--output", str(out / "metrics.json"), "--meta", str(out / "3.json")]
    )  # fmt: skip
    return json.loads((out / "metrics.json").read_text())


def inception_weights(path: Path) -> Path:
    """Random weights in the layout of torch-fidelity's file."""
    torch.save(initialise_weights.build("inception", 0).state_dict(), path)
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
