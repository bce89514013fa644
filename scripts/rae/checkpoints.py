"""A trained autoencoder's file: the EMA decoder, the latents' statistics, and what both belong to.

Safetensors with `decoder.*`, `latent_mean`, `latent_var`, and one metadata key of sorted JSON.
"""

import json
from collections.abc import Mapping
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
        steps: optimiser steps; 0 where they are unknown, as of a published decoder.
    """

    encoder: str
    encoder_sha256: str
    input_size: int
    image_size: int
    size: tuple[int, int, int, int]
    tau: float
    steps: int


def identity(folder: Path) -> str:
    """One hash of the configuration and weights of the encoder in `folder`, whether or not Kiln retrieved it."""
    model_folders.identity(folder)
    listing = folder / "files.json"
    recorded = artefacts.read_json(listing) if listing.is_file() else {}
    files = [folder / "config.json", *sorted(folder.glob("*.safetensors"))]
    return artefacts.sha256_text(
        *(recorded.get(file.name, {}).get("sha256") or artefacts.input_hash(file) for file in files)
    )


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


def load(path: Path, encoder_folder: Path) -> tuple[Autoencoder, Facts]:
    """The autoencoder in evaluation mode, on the CPU, with its encoder from `encoder_folder`.

    Raises:
        KilnError: no such checkpoint, or one of another encoder.
    """
    facts, tensors = read(path)
    prefix = "decoder."
    decoder = {name.removeprefix(prefix): one for name, one in tensors.items() if name.startswith(prefix)}
    return assemble(path, facts, decoder, tensors.get("latent_mean"), tensors.get("latent_var"), encoder_folder), facts


def assemble(path: Path, facts: Facts, decoder: Mapping[str, torch.Tensor], mean, var, folder: Path) -> Autoencoder:
    """The autoencoder of a decoder's tensors and [C,H,W] statistics, with its encoder from `folder`.

    Raises:
        KilnError: what `path` holds belongs to another encoder, or does not fit its own `facts`.
    """
    found = identity(folder)
    if found != facts.encoder_sha256:
        raise KilnError(
            f"{path}: trained on encoder {facts.encoder} ({facts.encoder_sha256[:12]}), but {folder} holds "
            f"another ({found[:12]})",
            "give the checkpoint of this encoder, or the encoder of this checkpoint",
        )
    encoder = Encoder(folder, facts.input_size)
    made = Decoder(encoder.dim, encoder.grid, facts.image_size, Size(*facts.size))
    if mean is None or var is None:
        raise KilnError(f"{path}: no latent statistics", "make or retrieve it anew")
    try:
        made.load_state_dict(decoder)
    except RuntimeError as error:
        raise KilnError(f"{path}: not the decoder that it describes: {error}", "make or retrieve it anew") from None
    return Autoencoder(encoder, made, facts.tau, mean, var).eval()
