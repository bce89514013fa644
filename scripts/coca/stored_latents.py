"""Stored latents as the image tokens of the model that they belong to."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from scripts.coca.checkpoints import Facts
from scripts.coca.latents import Latents
from scripts.common import artefacts
from scripts.common.errors import KilnError


def open_latents(folder: Path, checkpoint: Path, facts: Facts, slides: Sequence[str]) -> Latents:
    """The latents in `folder`, of which there are those of all `slides`.

    Raises:
        KilnError: another slide encoder made them than that of the checkpoint, or a slide has none.
    """
    found = Latents(folder, facts.encoder["dim"])
    wanted = facts.encoder_sha256 or artefacts.input_hash(checkpoint)
    if found.encoder_sha256 != wanted:
        raise KilnError(
            f"{folder}: latents of slide encoder {found.encoder_sha256[:12]}, but {checkpoint} has {wanted[:12]}",
            "encode the slides with the slide encoder of this checkpoint: rule coca_encode_slides",
        )
    for slide in slides:
        found.get(slide)
    return found


def batches(latents: Latents, slides: Sequence[str], size: int) -> Iterator[torch.Tensor]:
    """Image tokens float32 [B, latents, dim] of slides, in order; the vector of the whole slide is none of them."""
    for start in range(0, len(slides), size):
        yield torch.from_numpy(np.stack([latents.get(one)[1:] for one in slides[start : start + size]])).float()
