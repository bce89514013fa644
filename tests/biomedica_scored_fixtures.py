"""A small world to be scored: drawn figures that are held out, and tiny CLIP models trained on such figures."""

import io
from pathlib import Path

import numpy as np
import torch
from open_clip import ClipLoss
from PIL import Image

from scripts.biomedica import checkpoints, evaluate, held_out, transforms
from scripts.biomedica import model as models
from scripts.biomedica.pairs import Pair, caption_id
from scripts.biomedica.settings import ModelSettings
from scripts.common import artefacts

SIDE = 32
CONFIG = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": SIDE, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
TYPES = ("bar_chart", "gel", "scatter")
PLACES = ("top left", "top right", "bottom left", "bottom right")


def draw(kind: int, place: int, rng: np.random.Generator) -> Image.Image:
    """A pattern in one quarter of a figure; all have the same mean colour but for noise."""
    pixels = np.full((SIDE, SIDE), 128.0)
    quarter = np.tile(np.array([60.0, 196.0]), (16, 8))  # upright bars
    if kind == 1:
        quarter = quarter.T
    if kind == 2:
        quarter = np.where((np.add.outer(np.arange(16), np.arange(16)) // 4) % 2, 60.0, 196.0)
    y, x = 16 * (place // 2), 16 * (place % 2)
    pixels[y : y + 16, x : x + 16] = quarter
    pixels = np.clip(pixels + rng.normal(0, 6, pixels.shape), 0, 255).astype(np.uint8)
    return Image.fromarray(pixels).convert("RGB")


def make_pair(number: int, side: str, rng: np.random.Generator, panel_type: str | None = None, article: str = "") -> Pair:
    """A figure; every two neighbours are of one article."""
    kind, place = (int(one) for one in rng.integers(0, (len(TYPES), len(PLACES))))
    article = article or f"PMC{side[0]}{number // 2}"
    caption = f"a {TYPES[kind].replace('_', ' ')} in the {PLACES[place]}"
    data = io.BytesIO()
    draw(kind, place, rng).save(data, "PNG")
    return Pair(
        f"3-{article}-{number}-{side}", article, side, caption, caption_id(caption), data.getvalue(), SIDE, SIDE,
        panel_type or TYPES[kind], "unknown",
    )  # fmt: skip


def hold_out(folder: Path, count: int = 48, seed: int = 0, **options) -> Path:
    """Files of `count` pairs a side."""
    rng = np.random.default_rng(seed)
    for side in held_out.SIDES:
        with held_out.writer(folder / f"{side}.parquet") as add:
            for number in range(count):
                add(make_pair(number, side, rng, **options), held_out.LOCAL if number % 3 else "shards/00.tar")
    return folder


def train(path: Path, steps: int = 150, seed: int = 3, arm: str = "hybrid", kinds: int = len(TYPES)) -> Path:
    """A checkpoint of a tiny model after `steps` on figures of the first `kinds` panel types."""
    settings = ModelSettings(config=CONFIG)
    made = models.build(settings, seed)
    rng = np.random.default_rng(seed)
    pairs = [make_pair(i, "train", rng) for i in range(256)]
    pairs = [one for one in pairs if TYPES.index(one.panel_type) < kinds]
    transform = transforms.evaluation_transform(made.preprocess_cfg)
    files = held_out.decoded([one.image for one in pairs], [one.key for one in pairs])
    images = transforms.normalise(torch.stack([transform(one) for one in files]), made.preprocess_cfg)
    tokens = made.tokenizer([one.caption for one in pairs])
    optimizer = torch.optim.AdamW(made.model.parameters(), lr=2e-3)
    made.model.train()
    for _ in range(steps):
        rows = torch.from_numpy(rng.permutation(len(pairs))[:64])
        loss = ClipLoss()(*made.model(images[rows], tokens[rows]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    facts = checkpoints.Facts(
        made.model_cfg, made.preprocess_cfg, made.name, seed, arm, steps, 2, 64 * steps // 4, 64 * steps * 3 // 4
    )
    checkpoints.save(path, made.model.eval(), facts)
    return path


def run_evaluate(held: Path, checkpoint: Path, out: Path, changes: dict | None = None, **options) -> dict:
    """metrics.json of the step."""
    settings = {"evaluate": {"ks": [1, 5], "batch_size": 20} | (changes or {}), "model": {"config": CONFIG}}
    artefacts.write_json(out / "settings.json", settings | options.pop("settings", {}))
    command = [
        "--held-out", held, "--checkpoint", checkpoint, "--output-folder", out, "--meta", out / "meta.json",
        "--settings", out / "settings.json", "--device", "cpu", "--threads", "1",
    ]  # fmt: skip
    for name, value in options.items():
        command += [f"--{name}", *(value if isinstance(value, list) else [value])]
    evaluate.main([str(one) for one in command])
    return artefacts.read_json(out / "metrics.json")
