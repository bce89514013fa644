"""The frozen vision encoder of a representation autoencoder: images to a grid of patch features.

Source: Zheng et al., Diffusion Transformers with Representation Autoencoders, 2025, https://arxiv.org/abs/2510.11690.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from scripts.common import model_folders
from scripts.common.errors import KilnError
from scripts.rae.grid import neighbours


@dataclasses.dataclass(frozen=True)
class Family:
    """How one type of model is loaded and called.

    Args:
        model_class: name of its class in transformers.
        norm: attribute that holds its final layer norm.
        prefix: (config) -> number of tokens before the patches (CLS and registers).
        options: (count of images, count of patches) -> what its forward takes beside the images.
    """

    model_class: str
    norm: str
    prefix: Callable[[Any], int]
    options: Callable[[int, int], dict[str, Any]] = lambda images, patches: {}


def _all_patches_in_order(images: int, patches: int) -> dict[str, Any]:
    noise = torch.arange(patches, dtype=torch.float32).expand(images, -1)
    return {"noise": noise, "interpolate_pos_encoding": True}


SIGLIP = Family("SiglipVisionModel", "post_layernorm", lambda _: 0, lambda *_: {"interpolate_pos_encoding": True})
FAMILIES: Mapping[str, Family] = {
    "dinov2": Family("Dinov2Model", "layernorm", lambda _: 1),
    "dinov2_with_registers": Family("Dinov2WithRegistersModel", "layernorm", lambda c: 1 + c.num_register_tokens),
    "siglip": SIGLIP,
    "siglip_vision_model": SIGLIP,
    "vit_mae": Family("ViTMAEModel", "layernorm", lambda _: 1, _all_patches_in_order),
}


class Encoder(nn.Module):
    """A frozen vision transformer, always in evaluation mode, whose final layer norm has no affine part.

    Attributes:
        dim, patch, prefix_tokens: width, patch side in pixels, and count of CLS and register tokens, of the model.
        input_size, grid: side that images are resized to, in pixels; patches per side.
        mean, std: buffers [3] float32 of the model's image processor.

    Args:
        folder: from `save_pretrained`, with safetensors and an image processor; nothing is downloaded.
        input_size: side of the encoder's input in pixels; None takes the model's own `image_size`.

    Raises:
        KilnError: no such model, type unknown, weights missing, no image processor, or `input_size` is no multiple
            of the patch.
    """

    def __init__(self, folder: Path, input_size: int | None = None):
        super().__init__()
        config = _read_config(folder)
        self.family = FAMILIES[config.model_type]
        self.dim, self.patch = config.hidden_size, config.patch_size
        self.prefix_tokens = self.family.prefix(config)
        self.input_size = config.image_size if input_size is None else input_size
        self.grid = _grid(self.input_size, self.patch, folder)
        for name, values in zip(("mean", "std"), _normalisation(folder), strict=True):
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32))
        self.model = _load(folder, config, self.family)
        norm = getattr(self.model, self.family.norm)
        setattr(self.model, self.family.norm, nn.LayerNorm(self.dim, norm.eps, elementwise_affine=False))
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "Encoder":
        """Stay in evaluation mode, whatever `mode` is."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images [B,3,S,S] in [0,1] -> latents [B,dim,grid,grid]; each patch's features have mean 0, variance 1.

        Raises:
            KilnError: the images are not of this shape.
        """
        if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] != images.shape[3]:
            raise KilnError(
                f"the encoder got images of shape {list(images.shape)}, expected [B, 3, S, S]",
                "give RGB images cropped to squares",
            )
        if images.shape[-1] != self.input_size:
            size = (self.input_size, self.input_size)
            images = nn.functional.interpolate(images, size=size, mode="bicubic", align_corners=False)
        pixels = (images - self.mean[:, None, None]) / self.std[:, None, None]
        options = self.family.options(len(images), self.grid**2)
        options = {name: v.to(pixels.device) if torch.is_tensor(v) else v for name, v in options.items()}
        tokens = self.model(pixel_values=pixels, **options).last_hidden_state[:, self.prefix_tokens :]
        return tokens.transpose(1, 2).reshape(len(images), self.dim, self.grid, self.grid)


def _read_config(folder: Path):
    from transformers import AutoConfig

    model_folders.identity(folder)
    known = f"known are {', '.join(sorted(FAMILIES))}"
    hint = "give a folder of DINOv2 (with or without registers), SigLIP, SigLIP2 of a fixed resolution, or ViT-MAE"
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise KilnError(f"{folder / 'config.json'}: unreadable configuration ({error}); {known}", hint) from None
    if config.model_type not in FAMILIES:
        raise KilnError(f"{folder / 'config.json'}: model_type {config.model_type!r} is no encoder; {known}", hint)
    config = getattr(config, "vision_config", config)
    config.vision_use_head = False  # SigLIP's pooling head would be computed for nothing
    if config.model_type == "vit_mae":
        config.mask_ratio = 0.0
    return config


def _grid(size: int, patch: int, folder: Path) -> int:
    if size < 1 or size % patch:
        raise KilnError(
            f"{folder}: encoder input size {size} is no multiple of the model's patch {patch}",
            f"set the encoder's input size to {neighbours(size, patch)}",
        )
    return size // patch


def _normalisation(folder: Path) -> tuple[list[float], list[float]]:
    from transformers import AutoImageProcessor

    hint = "add the model's preprocessor_config.json to the folder"
    try:
        processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise KilnError(f"{folder}: no image processor there ({error})", hint) from None
    values = processor.image_mean, processor.image_std
    if not all(isinstance(v, list | tuple) and len(v) == 3 for v in values) or min(values[1]) <= 0:
        raise KilnError(
            f"{folder}: the image processor's mean {values[0]} and std {values[1]} are not three numbers each, "
            "with std above 0",
            hint,
        )
    return values


def _load(folder: Path, config, family: Family) -> nn.Module:
    import transformers
    from safetensors import SafetensorError
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # else each tensor of a text tower or of a head is listed as unexpected
    try:
        model, report = getattr(transformers, family.model_class).from_pretrained(
            folder,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise KilnError(f"{folder}: the weights do not load: {error}", "retrieve the model again") from None
    finally:
        logging.set_verbosity(verbosity)
    missing = sorted(report["missing_keys"])
    if missing:
        raise KilnError(
            f"{folder}: the weights lack {len(missing)} tensors of {family.model_class}, such as {missing[0]}",
            "the folder is incomplete or of another model: retrieve it again",
        )
    return model
