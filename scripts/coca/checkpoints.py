"""A trained model's file: its weights, a slide encoder's among them if it was trained, and what they belong to.

Safetensors with `coca.*` and, without a frozen encoder, `encoder.*`, and one metadata key of sorted JSON.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from scripts.coca import texts
from scripts.coca.settings import ModelSettings
from scripts.coca.slide_model import SlideModel, assemble
from scripts.common import artefacts
from scripts.common.errors import KilnError

TIED = "coca.to_logits.1.weight"  # the token embedding, which is stored once
AGAIN = "give model.safetensors of rule coca_train"


class Facts(NamedTuple):
    """What a checkpoint belongs to.

    Attributes:
        tile_dim: width of the tiles.
        encoder: `slide_model.encoder_shape` of the settings.
        model: section `model` of the settings.
        vocabulary, pad_id: of the tokenizer.
        tokenizer_sha256: `identity` of its folder.
        encoder_sha256: of the frozen slide encoder's weights; None if the encoder was trained and is in the file.
        step, epoch: optimiser steps and whole epochs so far.
    """

    tile_dim: int
    encoder: dict[str, int]
    model: dict[str, int]
    vocabulary: int
    pad_id: int
    tokenizer_sha256: str
    encoder_sha256: str | None
    step: int
    epoch: int


def identity(folder: Path) -> str:
    """One hash of the tokenizer in `folder`, of its vocabulary and rules alone.

    Raises:
        KilnError: no tokenizer there.
    """
    texts.identity(folder)
    return artefacts.sha256_file(folder / "tokenizer.json")


def save(path: Path, model: SlideModel, facts: Facts) -> None:
    """Write the checkpoint, atomically."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items() if name != TIED}
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
        raise KilnError(f"{path}: no checkpoint of a CoCa model: {type(error).__name__}: {error}", AGAIN) from None


def load(path: Path, tokenizer: Path | None) -> tuple[SlideModel, Facts]:
    """The model in evaluation mode, on the CPU, and its facts.

    Args:
        tokenizer: folder of the tokenizer that it is to be used with; None: it is not used with texts.

    Raises:
        KilnError: no such checkpoint, one of another tokenizer, or one that is not what it says.
    """
    facts, tensors = read(path)
    if tokenizer is not None:
        check_tokenizer(path, facts, tokenizer)
    try:
        settings = ModelSettings(**facts.model)
        tile_dim = None if facts.encoder_sha256 else facts.tile_dim
        with torch.random.fork_rng(devices=[]):
            model = assemble(settings, facts.encoder, tile_dim, facts.vocabulary, facts.pad_id)
        model.load_state_dict({**tensors, TIED: tensors["coca.token_emb.weight"]})
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        raise KilnError(f"{path}: not the model that it describes: {error}", AGAIN) from None
    return model.eval(), facts


def encoder_sha256(path: Path, facts: Facts) -> str:
    """Hash of the file that holds the slide encoder of the checkpoint at `path`: a frozen one's own, or itself."""
    return facts.encoder_sha256 or artefacts.input_hash(path)


def check_tokenizer(path: Path, facts: Facts, folder: Path) -> None:
    """Refuse the tokenizer in `folder` for the checkpoint at `path` unless it was trained with it.

    Raises:
        KilnError: it was trained with another.
    """
    found = identity(folder)
    if found != facts.tokenizer_sha256:
        raise KilnError(
            f"{path}: trained with tokenizer {facts.tokenizer_sha256[:12]}, but {folder} holds another ({found[:12]})",
            "give the tokenizer of this checkpoint, or train again with this one",
        )
