"""Small inputs of pipeline vase: drawn vases, and a CLIP with random weights in the real classes."""

import json
from pathlib import Path

import open_clip
import torch
from safetensors.torch import save_file

from scripts.demo import draw_vases

CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
PREPROCESS = {"mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bicubic", "resize_mode": "shortest"}


def draw(folder: Path, seed: int = 3, vases: int = 16) -> Path:
    """Raw and labelled pictures of a few vases, and what is true of them."""
    settings = {
        "seed": seed, "vases": vases, "labelled_vases": 12, "shared_vases": 3, "clip_vases": 1, "image_size": 40,
    }  # fmt: skip
    meta = folder.with_name(f"{folder.name}.meta.json")
    arguments = ["--output-folder", str(folder), "--meta", str(meta), "--settings", json.dumps(settings)]
    draw_vases.main([*arguments, "--threads", "1"])
    return folder


def tiny_clip(folder: Path, seed: int = 0) -> Path:
    """A folder that open_clip loads as local-dir."""
    torch.manual_seed(seed)
    model = open_clip.CLIP(**CLIP)
    folder.mkdir(parents=True)
    config = {"model_cfg": CLIP, "preprocess_cfg": PREPROCESS}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    save_file(dict(model.state_dict()), folder / "open_clip_model.safetensors")
    return folder
