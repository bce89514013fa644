"""Features that need no model: what a task is worth is what a model adds to them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from scripts.common.images import open_rgb

NAMES = ("red", "green", "blue", "width", "height", "kilobytes")


def image_features(sources: Sequence[Path | bytes], max_pixels: int = 2**62) -> np.ndarray:
    """Mean colour (0-255), size in pixels and file size of image files, or of their bytes, as [N,6] float64."""
    rows = []
    for source in sources:
        image = open_rgb(source, max_pixels)
        size = len(source) if isinstance(source, bytes) else source.stat().st_size
        rows.append([*np.asarray(image).mean(axis=(0, 1)), *image.size, size / 1000])
    return np.array(rows, dtype=np.float64).reshape(-1, len(NAMES))
