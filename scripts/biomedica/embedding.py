"""From figures and captions to unit vectors, by any of open_clip's models."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import nn

from scripts.biomedica import checkpoints, transforms
from scripts.biomedica.held_out import Side
from scripts.common import progress


class Embedder(NamedTuple):
    """A model in evaluation mode on its device, and what goes before it.

    Attributes:
        transform: PIL image -> uint8 [3,H,W].
        tokenizer: list of n texts -> int64 [n,T].
        preprocess_cfg: open_clip's.
    """

    model: nn.Module
    transform: Callable
    tokenizer: Callable
    preprocess_cfg: Mapping[str, Any]
    device: torch.device

    @torch.inference_mode()
    def images(self, batches: Iterable[Sequence[Image.Image]]) -> np.ndarray:
        """Unit vectors [N, D] float32 of RGB images, which come in batches."""
        made = []
        for images in batches:
            pixels = torch.stack([self.transform(image) for image in images]).to(self.device)
            vectors = self.model.encode_image(transforms.normalise(pixels, self.preprocess_cfg), normalize=True)
            made.append(vectors.float().cpu().numpy())
        return np.concatenate(made)

    @torch.inference_mode()
    def texts(self, texts: Sequence[str], size: int) -> np.ndarray:
        """Unit vectors [N, D] float32 of texts, `size` at a time; ends beyond the model's context are cut off."""
        made = []
        for start in range(0, len(texts), size):
            tokens = self.tokenizer(list(texts[start : start + size])).to(self.device)
            made.append(self.model.encode_text(tokens, normalize=True).float().cpu().numpy())
        return np.concatenate(made)

    def full(self, texts: Sequence[str]) -> int:
        """How many texts fill the model's context, so that their ends may not be seen."""
        padding = self.tokenizer([""])[0, -1]
        return int((self.tokenizer(list(texts))[:, -1] != padding).sum())

    def scale(self) -> float:
        """What cosines are multiplied by, the exponential of the learnt logit scale."""
        return float(self.model.logit_scale.detach().exp())


def similarities(model: Embedder, test: Side, size: int, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Cosines [N, N] of test images (rows) and captions, and unit vectors [N, D] of images, `size` at a time."""
    count = -(-len(test.table) // size)
    images = model.images(progress.bar(test.images(size), name, count))
    return images @ model.texts(test.captions, size).T, images


def load(checkpoint: Path, weights: Path | None, device) -> tuple[Embedder, checkpoints.Facts]:
    """The model of a checkpoint, on `device`, and its facts; `weights` may hold its tokenizer."""
    model, transform, tokenizer, facts = checkpoints.load(checkpoint, weights)
    return Embedder(model.to(device), transform, tokenizer, facts.preprocess_cfg, device), facts
