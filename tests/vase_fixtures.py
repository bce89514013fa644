"""What the tests of the vase steps share: small pictures, small tables, and a way to run a step."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from scripts.common import images, shards, tables
from scripts.demo import draw_vases

ROOT = Path(__file__).resolve().parents[1]
VIEW = "{vase}_{view}_ac001001.jpg"
TECHNIQUES = ("black-figure", "red-figure")
TECHNIQUE_TINTS = ((40, 35, 30), (200, 110, 50))


def picture(path: Path, seed: int, size: int = 32, tint: tuple[int, int, int] | None = None, **save) -> Path:
    """A picture of 4 x 4 noisy blocks in the format of its ending, its mean colour near `tint`."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (4, 4, 3)) if tint is None else np.array(tint) + rng.integers(-50, 51, (4, 4, 3))
    pixels = np.kron(np.clip(blocks, 0, 255), np.ones((size // 4, size // 4, 1)))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.astype(np.uint8)).save(path, **save)
    return path


def shard_table(folder: Path, place: Path, per_shard: int = 100) -> shards.ShardTable:
    """The shard table of `folder`, written to `place`."""
    table = shards.assign(None, shards.scan(folder, images.EXTENSIONS), per_shard)
    table.save(place)
    return table


def run(main, *arguments, settings: dict | None = None, threads: int = 1) -> None:
    """Call a step's `main` with paths and texts as they are, and settings as JSON."""
    extra = ["--settings", json.dumps(settings)] if settings else []
    main([*map(str, arguments), *extra, "--threads", str(threads)])


def command_line(module: str, *arguments, settings: dict | None = None) -> subprocess.CompletedProcess:
    """Run a step as a user does, and return what it said."""
    extra = ["--settings", json.dumps(settings)] if settings else []
    command = [sys.executable, "-m", f"scripts.vase.{module}", *map(str, arguments), *extra, "--threads", "1"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=dict(os.environ), timeout=300)


def error_of(completed: subprocess.CompletedProcess) -> str:
    """The message of a step that failed as it should: status 1, a `Hint:`, no traceback."""
    assert completed.returncode == 1, completed.stderr
    assert "Traceback" not in completed.stderr, completed.stderr
    assert "\nHint: " in completed.stderr, completed.stderr
    return completed.stderr


def write(path: Path, rows: list[dict] | pd.DataFrame, key: str = "path") -> Path:
    """Rows as a table of the house."""
    tables.write_table(path, pd.DataFrame(rows), [key])
    return path


def files_below(folder: Path) -> list[str]:
    """Every file and link below `folder`, hidden ones too."""
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_symlink() or p.is_file())


def clip_folder(folder: Path, seed: int = 0, embed_dim: int = 32, image_size: int = 32, layers: int = 2) -> Path:
    """A tiny CLIP with random weights, in a folder that open_clip loads as `local-dir:`."""
    import open_clip
    import torch
    from safetensors.torch import save_file

    config = {
        "embed_dim": embed_dim,
        "vision_cfg": {"image_size": image_size, "layers": layers, "width": 64, "head_width": 32, "patch_size": 8},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
    }
    torch.manual_seed(seed)
    model = open_clip.CLIP(**config)
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")
    preprocess = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}
    text = json.dumps({"model_cfg": config, "preprocess_cfg": preprocess})
    (folder / "open_clip_config.json").write_text(text, encoding="utf-8")
    return folder


def draw(folder: Path, seed: int = 3, vases: int = 16) -> Path:
    """Raw and labelled pictures of a few vases, and what is true of them."""
    settings = {
        "seed": seed, "vases": vases, "labelled_vases": 12, "shared_vases": 3, "clip_vases": 1, "image_size": 40,
    }  # fmt: skip
    meta = folder.with_name(f"{folder.name}.meta.json")
    arguments = ["--output-folder", str(folder), "--meta", str(meta), "--settings", json.dumps(settings)]
    draw_vases.main([*arguments, "--threads", "1"])
    return folder


def technique_rows(root: Path, name: str, count: int, answered: bool) -> None:
    """`count` pictures below root/images whose colour tells the technique, and their rows root/<name>.jsonl."""
    lines = []
    for number in range(count):
        which = number % 2
        image = f"{name}_{number}.jpg"
        picture(root / "images" / image, number + 1000 * len(name), 96, tint=TECHNIQUE_TINTS[which])
        messages = [{"role": "user", "content": "<image>What technique?"}]
        messages += [{"role": "assistant", "content": TECHNIQUES[which]}] if answered else []
        row = {"id": image, "vase": image, "dimension": "technique", "messages": messages, "images": [image]}
        lines.append(json.dumps({**row, "reference": TECHNIQUES[which], "facts": ""}))
    (root / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
