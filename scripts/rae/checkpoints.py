"""A trained autoencoder's file: the EMA decoder, the latents' statistics, and what both belong to.

Safetensors with `decoder.*`, `latent_mean`, `latent_var`, and one metadata key of sorted JSON.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from scripts.common import artefacts, model_folders
from scripts.common.errors import KilnError
from scripts.rae.autoencoder import Autoencoder
from scripts.rae.decoder import Decoder, Size
from scripts.rae.encoder import Encoder


class Facts(NamedTuple):
    """What a checkpoint belongs to.

    Attributes:
        encoder: name in the configuration, such as dinov2.
        encoder_sha256: `identity` of its folder.
        input_size, image_size: sides in pixels, of the encoder's input and of the autoencoder's images.
        size: the decoder's layers, width, MLP and heads.
        tau: greatest noise in training.
        steps: optimiser steps.
    """

    encoder: str
    encoder_sha256: str
    input_size: int
    image_size: int
    size: tuple[int, int, int, int]
    tau: float
    steps: int


def identity(folder: Path) -> str:
    """One hash of what identifies the encoder in `folder`."""
    files = model_folders.identity(folder)
    return artefacts.sha256_text(*(artefacts.input_hash(path) for _, path in sorted(files.items())))


def save(path: Path, decoder: Decoder, mean: torch.Tensor, var: torch.Tensor, facts: Facts) -> None:
    """Write the checkpoint, atomically; mean, var: [C,H,W]."""
    tensors = {f"decoder.{name}": tensor for name, tensor in decoder.state_dict().items()}
    tensors |= {"latent_mean": mean, "latent_var": var}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with artefacts.atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={"kiln": json.dumps(facts._asdict(), sort_keys=True)})


def read(path: Path) -> tuple[Facts, dict[str, torch.Tensor]]:
    """Facts and tensors of a checkpoint.

    Raises:
        KilnError: the file is missing, damaged, or of another kind.
    """
    try:
        with safe_open(path, framework="pt") as handle:
            facts: dict[str, Any] = json.loads((handle.metadata() or {})["kiln"])
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118, no mapping
        return Facts(**{**facts, "size": tuple(facts["size"])}), tensors
    except Exception as error:  # safetensors raises an error class of its own
        raise KilnError(
            f"{path}: no checkpoint of an autoencoder: {type(error).__name__}: {error}",
            "give autoencoder.safetensors of rule rae_train_autoencoder",
        ) from None


def read_published_decoder(path: Path) -> dict[str, torch.Tensor]:
    """Tensors of a decoder in the published layout, model.pt: a plain state dict with the names of `Decoder`.

    Raises:
        KilnError: the file is missing, damaged, or holds anything else.
    """
    hint = "give a model.pt of the published decoders, or autoencoder.safetensors of rule rae_train_autoencoder"
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds
        raise KilnError(f"{path}: no published decoder: {type(error).__name__}: {error}", hint) from None
    known = isinstance(stored, dict) and "decoder_pred.weight" in stored and all(map(torch.is_tensor, stored.values()))
    if not known:
        found = ", ".join(map(str, list(stored)[:8])) if isinstance(stored, dict) else type(stored).__name__
        raise KilnError(f"{path}: holds {found}; expected a decoder's tensors, such as decoder_pred.weight", hint)
    return stored


def load(path: Path, encoder_folder: Path) -> tuple[Autoencoder, Facts]:
    """The autoencoder in evaluation mode, on the CPU, with its encoder from `encoder_folder`.

    Raises:
        KilnError: no such checkpoint, or one of another encoder.
    """
    facts, tensors = read(path)
    found = identity(encoder_folder)
    if found != facts.encoder_sha256:
        raise KilnError(
            f"{path}: trained on encoder {facts.encoder} ({facts.encoder_sha256[:12]}), but {encoder_folder} holds "
            f"another ({found[:12]})",
            "give the checkpoint of this encoder, or the encoder of this checkpoint",
        )
    encoder = Encoder(encoder_folder, facts.input_size)
    decoder = Decoder(encoder.dim, encoder.grid, facts.image_size, Size(*facts.size))
    prefix = "decoder."
    decoder.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
    return Autoencoder(encoder, decoder, facts.tau, tensors["latent_mean"], tensors["latent_var"]).eval(), facts
