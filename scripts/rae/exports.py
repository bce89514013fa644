"""An exported autoencoder: a folder that holds all but the encoder, in safetensors and in the published layout.

decoder.safetensors      the decoder's tensors
statistics.safetensors   mean and var of clean latents, [C,H,W]
config.json              encoder, sizes, noise, and how it was trained
decoders/.../model.pt    the same decoder, see `published`
stats/.../stat.pt        the same statistics
files.json               {name: {bytes, sha256}} of all of these
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from scripts.common import artefacts
from scripts.common.errors import KilnError
from scripts.rae import checkpoints, latent_stats, published
from scripts.rae.autoencoder import Autoencoder
from scripts.rae.decoder import Size

DECODER, STATISTICS, CONFIG = "decoder.safetensors", "statistics.safetensors", "config.json"


def save(folder: Path, model: Autoencoder, facts: checkpoints.Facts, about: Mapping[str, Any]) -> None:
    """Write the folder, whole or not at all; `about` tells in config.json what else there is to tell."""
    decoder, encoder = model.decoder.state_dict(), model.encoder
    size = Size(*facts.size)
    config = {
        "encoder": {"name": facts.encoder, "sha256": facts.encoder_sha256, "input_size": facts.input_size,
                    "patch": encoder.patch},
        "latents": {"dim": encoder.dim, "grid": encoder.grid},
        "decoder": {**size._asdict(), "patch": model.decoder.patch},
        "image_size": facts.image_size,
        "tau": facts.tau,
        "steps": facts.steps,
        **about,
    }  # fmt: skip
    with artefacts.atomic_folder(folder) as temporary:
        save_file({name: one.contiguous() for name, one in decoder.items()}, temporary / DECODER)
        save_file({"mean": model.latent_mean, "var": model.latent_var}, temporary / STATISTICS)
        artefacts.write_json(temporary / CONFIG, config)
        names = published.decoder_file(facts.encoder, encoder, size, facts.tau, facts.image_size)
        published.write_decoder(temporary / names, decoder)
        names = published.statistics_file(facts.encoder, encoder, facts.image_size)
        latent_stats.write_statistics(temporary / names, model.latent_mean, model.latent_var)
        artefacts.write_listing(temporary)


def load(folder: Path | str, encoder: Path | str) -> Autoencoder:
    """The autoencoder of an exported folder, in evaluation mode on the CPU, with its encoder from folder `encoder`.

    Called with images [B,3,S,S] in [0,1] it gives their reconstructions; see also its `encode` and `decode`.

    Raises:
        KilnError: no exported folder, a damaged one, or one of another encoder.
    """
    folder = Path(folder)
    config = artefacts.read_json(folder / CONFIG)
    try:
        known, size = config["encoder"], Size(*(config["decoder"][field] for field in Size._fields))
        facts = checkpoints.Facts(known["name"], known["sha256"], known["input_size"], config["image_size"], size,
                                  config["tau"], config["steps"])  # fmt: skip
    except (KeyError, TypeError) as error:
        raise KilnError(
            f"{folder / CONFIG}: not that of an exported autoencoder ({type(error).__name__}: {error})",
            "give the folder that rule rae_export wrote",
        ) from None
    decoder, statistics = (_tensors(folder / name) for name in (DECODER, STATISTICS))
    mean, var = statistics.get("mean"), statistics.get("var")
    return checkpoints.assemble(folder, facts, decoder, mean, var, Path(encoder))


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except Exception as error:  # safetensors raises an error class of its own
        raise KilnError(f"{path}: unreadable weights: {error}", "export or download the folder again") from None
