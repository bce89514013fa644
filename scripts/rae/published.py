"""Decoders and latent statistics in the layout that the method's authors publish: names, reading, writing.

`decoders/<encoder>/<decoder>/model.pt` holds the decoder's state dict, without prefixes, and
`stats/<encoder>/<images>/stat.pt` {mean, var}, both by torch.save.
Source: https://github.com/bytetriper/RAE (configs/stage1/pretrained, extract_decoder.py).
"""

import math
from collections.abc import Mapping
from pathlib import Path

import torch

from scripts.common.errors import KilnError
from scripts.rae.decoder import DECODERS, Decoder, Size
from scripts.rae.encoder import Encoder

FIXED = "decoder_pos_embed"
STARTS_AT_ZERO = "trainable_cls_token"  # the oldest files lack it, and the original then leaves it at zero
WIDTHS = {384: "small", 768: "base", 1024: "large", 1152: "so400m", 1536: "giant"}
USUAL_IMAGE = 256


def decoder_file(name: str, encoder: Encoder, size: Size, tau: float, image_size: int) -> str:
    """Such as decoders/dinov2/wReg_base/ViTXL_n08/model.pt; `name` is the encoder's in the configuration."""
    known = {one: label.replace("-", "") for label, one in DECODERS.items()}
    shape = known.get(size) or "ViT_{}x{}x{}_h{}".format(*size)
    noise = f"n{tau:g}".replace(".", "")
    side = "" if image_size == USUAL_IMAGE else f"_i{image_size}"
    return f"decoders/{_encoder(name, encoder)}/{shape}_{noise}{side}/model.pt"


def statistics_file(name: str, encoder: Encoder, image_size: int) -> str:
    """Such as stats/dinov2/wReg_base/imagenet1k/stat.pt; the layout says ImageNet whatever the images were."""
    images = "imagenet1k" if name == "dinov2" else "ImageNet1k"
    side = "" if image_size == USUAL_IMAGE else f"_{image_size}"
    return f"stats/{_encoder(name, encoder)}/{images}{side}/stat.pt"


def _encoder(name: str, encoder: Encoder) -> str:
    family, kind = name.split("_")[0], encoder.model.config.model_type
    width = WIDTHS.get(encoder.dim, f"w{encoder.dim}")
    if kind.startswith("dinov2"):
        return f"{family}/{'wReg_' if kind.endswith('registers') else ''}{width}"
    side = f"_i{encoder.input_size}" if kind.startswith("siglip") else ""
    return f"{family}/{width}_p{encoder.patch}{side}"


def write_decoder(path: Path, decoder: Mapping[str, torch.Tensor]) -> None:
    """Store a decoder's state dict as a published model.pt; equal tensors give equal bytes under one file name.

    It is written in place, without a second copy of the weights in memory: give a path in an `atomic_folder`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({name: tensor.detach().cpu().contiguous() for name, tensor in decoder.items()}, path)


def read_decoder(path: Path, encoder: Encoder, image_size: int, heads: int | None = None) -> tuple[Decoder, Size]:
    """The decoder of a published model.pt, float32 on the CPU, and its size, read off the tensors' shapes.

    Args:
        encoder: whose latents it decodes; two encoders of one width and grid cannot be told apart here.
        image_size: side in pixels of its pictures.
        heads: of attention, which no shape shows; None takes those of the published size with these layers and widths.

    Raises:
        KilnError: the file is missing, damaged, or holds more than tensors; tensors are missing or unknown; it is for
            another width, grid or image size.
    """
    state = _read(path)
    layers = {name.split(".")[1] for name in state if name.startswith("decoder_layers.")}
    latent, width = _shape(state, "decoder_embed.weight", 2, path)[::-1]
    mlp = _shape(state, "decoder_layers.0.intermediate.dense.weight", 2, path)[0]
    pixels = _shape(state, "decoder_pred.weight", 2, path)[0]
    if latent != encoder.dim:
        raise KilnError(
            f"{path}: decodes latents of width {latent}, the encoder gives {encoder.dim}",
            "give the decoder of this encoder, or the encoder of this decoder",
        )
    if FIXED in state:
        positions = _shape(state, FIXED, 3, path)[1] - 1
        if positions != encoder.grid**2:
            raise KilnError(
                f"{path}: decodes {positions} latents a picture, the encoder gives {encoder.grid} x {encoder.grid}",
                "set the encoder's input size to that which the decoder was trained with",
            )
    patch = math.isqrt(pixels // 3)
    if 3 * patch**2 != pixels or patch * encoder.grid != image_size:
        raise KilnError(
            f"{path}: draws {pixels} values a patch, {patch * encoder.grid} pixels a side at the encoder's grid of "
            f"{encoder.grid}; rae.image_size is {image_size}",
            f"set rae.image_size to {patch * encoder.grid}, or give the decoder for {image_size}",
        )
    size = Size(len(layers), width, mlp, heads or _heads(path, len(layers), width, mlp))
    decoder = Decoder(encoder.dim, encoder.grid, image_size, size)
    _load(path, decoder, state)
    return decoder, size


def _heads(path: Path, layers: int, width: int, mlp: int) -> int:
    for known in DECODERS.values():
        if known[:3] == (layers, width, mlp):
            return known.heads
    raise KilnError(
        f"{path}: {layers} layers of width {width} and MLP {mlp} are none of {', '.join(DECODERS)}, and no shape "
        "shows the count of attention heads",
        "set rae.published.<encoder>.heads",
    )


def _load(path: Path, decoder: Decoder, state: Mapping[str, torch.Tensor]) -> None:
    own = decoder.state_dict()
    missing = sorted(own.keys() - state.keys() - {FIXED, STARTS_AT_ZERO})
    unknown = sorted(state.keys() - own.keys())
    unlike = sorted(name for name in own.keys() & state.keys() if own[name].shape != state[name].shape)
    found = [f"{len(names)} {what}: {_some(names)}" for what, names in (("missing", missing), ("unknown", unknown))
             if names]  # fmt: skip
    found += [f"{name} is {list(state[name].shape)}, expected {list(own[name].shape)}" for name in unlike[:3]]
    if found:
        raise KilnError(f"{path}: no decoder as published: {'; '.join(found)}", _HINT)
    decoder.load_state_dict(own | dict(state))


def _some(names: list[str]) -> str:
    return ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")


_HINT = "give the decoder's own state dict, such as decoders/dinov2/wReg_base/ViTXL_n08/model.pt"


def _shape(state: Mapping[str, torch.Tensor], name: str, dimensions: int, path: Path) -> tuple[int, ...]:
    if name not in state or state[name].ndim != dimensions:
        found = f"it is {list(state[name].shape)}" if name in state else f"it has {_some(sorted(state))}"
        raise KilnError(f"{path}: no tensor {name} of {dimensions} dimensions: {found}", _HINT)
    return tuple(state[name].shape)


def _read(path: Path) -> dict[str, torch.Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise KilnError(f"{path}: no such decoder", "check the path, or name a row of config/models.csv") from None
    except Exception as error:  # torch.load raises many kinds, and advises to run a stranger's code
        raise KilnError(f"{path}: damaged, or holds more than tensors ({type(error).__name__})", _HINT) from None
    if not isinstance(state, dict) or not all(isinstance(one, torch.Tensor) for one in state.values()):
        found = _some(sorted(map(str, state))) if isinstance(state, dict) else type(state).__name__
        hint = "of a training checkpoint, extract the decoder first: the original's extract_decoder.py --use-ema"
        raise KilnError(f"{path}: no state dict of a decoder, but {found}", hint)
    return {name: tensor.float() for name, tensor in state.items()}
