"""A trained model's file: open_clip's weights, and what is needed to use them.

Safetensors of open_clip's `state_dict`, and one metadata key of sorted JSON.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from scripts.biomedica import model as models
from scripts.biomedica import transforms
from scripts.common import artefacts
from scripts.common.errors import KilnError

AGAIN = "give model.safetensors of rule biomedica_train_clip"


class Facts(NamedTuple):
    """What a checkpoint is.

    Attributes:
        model_cfg, preprocess_cfg: open_clip's.
        name: of the model, in words.
        seed, arm: of the training: "hybrid" or "local".
        step, epoch: optimiser steps and whole epochs so far.
        samples_local, samples_streamed: pairs seen so far.
    """

    model_cfg: dict[str, Any]
    preprocess_cfg: dict[str, Any]
    name: str
    seed: int
    arm: str
    step: int
    epoch: int
    samples_local: int
    samples_streamed: int


class Trained(NamedTuple):
    """A model in evaluation mode, on the CPU; PIL image -> uint8 [3,H,W]; list of texts -> int64 [n,T]; its facts.

    `transforms.normalise(images, facts.preprocess_cfg)` makes of uint8 what the model takes.
    """

    model: nn.Module
    transform: Callable
    tokenizer: Callable
    facts: Facts


def save(path: Path, model: nn.Module, facts: Facts) -> None:
    """Write the checkpoint, atomically."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    with artefacts.atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={"kiln": json.dumps(facts._asdict(), sort_keys=True)})


def read(path: Path) -> tuple[Facts, dict[str, torch.Tensor]]:
    """Facts and tensors of a checkpoint, on the CPU.

    Raises:
        KilnError: the file is missing, damaged, or of another kind.
    """
    try:
        with safe_open(path, framework="pt") as handle:
            facts: dict[str, Any] = json.loads((handle.metadata() or {})["kiln"])
            return Facts(**facts), {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    except Exception as error:  # safetensors raises an error class of its own
        raise KilnError(f"{path}: no checkpoint of a CLIP model: {type(error).__name__}: {error}", AGAIN) from None


def load(path: Path, folder: Path | None = None) -> Trained:
    """The model of a checkpoint and all that its use needs.

    Args:
        folder: that holds the tokenizer, for a model that has another one than open_clip's own.

    Raises:
        KilnError: no such checkpoint, or one that is not what it says.
    """
    facts, tensors = read(path)
    model = models.assemble(facts.model_cfg, str(path))
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise KilnError(f"{path}: not the model that it describes: {error}", AGAIN) from None
    transform = transforms.evaluation_transform(facts.preprocess_cfg)
    return Trained(model.eval(), transform, models.tokenizer_of(facts.model_cfg, str(path), folder), facts)
