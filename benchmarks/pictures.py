"""Drawn JPEGs whose size and decoding cost are those of photographs."""

import io

import numpy as np
from PIL import Image

GRAIN, QUALITY = 11, 95


def draw_jpeg(number: int, width: int, height: int) -> bytes:
    """Soft coloured patches under some grain; about 0.53 bytes a pixel."""
    rng = np.random.default_rng([0, number])
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    ground = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32)
    pixels = np.clip(ground + rng.normal(0, GRAIN, (height, width, 1)), 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()


def with_note(jpeg: bytes, number: int) -> bytes:
    """The same picture with a comment of its own, so that no two files are equal."""
    note = b"%08d" % number
    return jpeg[:2] + b"\xff\xfe" + (len(note) + 2).to_bytes(2, "big") + note + jpeg[2:]
