"""What the tests of vision-language models share: a tiny model with random weights, and chat rows to teach it."""

import hashlib
import json
from pathlib import Path

from vase_fixtures import picture

from scripts.busi.settings import PROMPT
from scripts.common import tiny_vlm

CLASSES = ("Normal", "Benign", "Malignant")
TINTS = ((50, 50, 50), (128, 128, 128), (205, 205, 205))


def tiny_base(folder: Path, seed: int = 0, **sizes) -> Path:
    """A folder with a tiny Qwen2.5-VL of random weights."""
    tiny_vlm.build(folder, [PROMPT, " ".join(CLASSES)] * 3, seed=seed, **sizes)
    return folder


def chat_rows(root: Path, side: str, count: int, prompt: str = PROMPT, size: int = 96) -> Path:
    """`count` pictures whose brightness tells the class, below root/images, and their chat rows root/<side>.jsonl."""
    lines = []
    for number in range(count):
        label = number % 3
        path = root / "images" / CLASSES[label].lower() / f"{side} ({number}).png"
        picture(path, number + 1000 * len(side), size, tint=TINTS[label])
        messages = [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]},
            {"role": "assistant", "content": [{"type": "text", "text": CLASSES[label]}]},
        ]
        name = str(path.relative_to(root / "images"))
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        row = {"image": name, "sha256": digest, "label": label, "group": name, "messages": messages}
        lines.append(json.dumps(row))
    table = root / f"{side}.jsonl"
    table.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return table
