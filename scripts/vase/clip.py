"""The CLIP model of acceptance and view selection, from a folder that open_clip loads as `local-dir:`."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import open_clip
import torch
from safetensors import SafetensorError
from torch import nn

from scripts.common.errors import KilnError

CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"


class Clip(NamedTuple):
    """A model in evaluation mode, its image transform (RGB image -> [3,S,S]), its tokenizer, S in pixels."""

    model: nn.Module
    transform: Callable
    tokenizer: Callable
    image_size: int


def check(folder: Path) -> None:
    """Raises KilnError if a file of the model is missing."""
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            # open_clip would go on with random weights and a warning
            raise KilnError(
                f"{folder / name}: no such file", f"vase.clip.model needs a folder with {CONFIG}, {WEIGHTS}"
            )


def load(folder: Path) -> Clip:
    """Load model, transform and tokenizer.

    Raises:
        KilnError: a file is missing, or the weights do not fit the configuration.
    """
    check(folder)
    try:
        model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
        tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    except (RuntimeError, KeyError, ValueError, TypeError, SafetensorError) as error:
        raise KilnError(
            f"{folder}: {WEIGHTS} does not fit {CONFIG}: {str(error)[:500]}", "fetch the folder anew, whole"
        ) from None
    size = model.visual.image_size
    return Clip(model.eval(), transform, tokenizer, size[0] if isinstance(size, tuple | list) else size)


@torch.inference_mode()
def text_direction(clip: Clip, prompts: Sequence[str]) -> torch.Tensor:
    """Direction of a class of prompts: L2norm(mean of their un-normalised embeddings), [D] float32.

    As VaseVQA-3D's clipfilter1 does; averaging before normalising lets longer embeddings weigh more.
    """
    embeddings = clip.model.encode_text(clip.tokenizer(list(prompts))).float()
    return nn.functional.normalize(embeddings.mean(0), dim=0)
