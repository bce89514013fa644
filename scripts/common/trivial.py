"""Features that need no model: what a task is worth is what a model adds to them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from scripts.common.images import open_rgb

NAMES = ("red", "green", "blue", "width", "height", "kilobytes")


def image_features(paths: Sequence[Path], max_pixels: int = 2**62) -> np.ndarray:
    """Mean colour (0-255), size in pixels and file size, as [N,6] float64."""
    rows = []
    for path in paths:
        image = open_rgb(path, max_pixels)
        rows.append([*np.asarray(image).mean(axis=(0, 1)), *image.size, path.stat().st_size / 1000])
    return np.array(rows, dtype=np.float64).reshape(-1, len(NAMES))
