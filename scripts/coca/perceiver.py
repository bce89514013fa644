"""The slide encoder: a Perceiver that reads the tiles of a slide into a fixed count of latents, in Prism's layout.

Tiles are a set: there are no positions, and their order changes nothing. Attention to them has one head, neither norm
nor biases on the tiles, and from the second layer on one set of weights, whose keys are made once for all layers. One
stack of self-attention blocks serves all layers.
Sources: Jaegle et al., Perceiver, 2021, https://arxiv.org/abs/2103.03206; Shaikovski et al., PRISM, 2024,
https://arxiv.org/abs/2405.10254. Names of parameters are those of Prism's published weights.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, linear, scaled_dot_product_attention

from scripts.common.errors import KilnError

LAYER = re.compile(r"perceiver\.layers\.(\d+)\.(xattn|tf)\.")
HINT = "give the weights of a slide encoder with the settings of section encoder, such as Prism's own"


class CrossAttention(nn.Module):
    """Attention with one head from latents [B,L,dim] to tiles [B,N,tile_dim]: [B,L,dim]."""

    def __init__(self, dim: int, tile_dim: int):
        super().__init__()
        self.x_norm = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_kv = nn.Linear(tile_dim, 2 * dim, bias=False)
        self.to_out = nn.Linear(dim, dim, bias=False)

    def keys(self, tiles: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B,1,N,dim] of tiles [B,N,tile_dim]."""
        key, value = self.to_kv(tiles)[:, None].chunk(2, dim=-1)
        return key, value

    def forward(self, x: Tensor, keys: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        """Attention to the tiles of `keys`, where mask, bool [B,N], is true."""
        query = self.to_q(self.x_norm(x))[:, None]
        mask = None if mask is None else mask[:, None, None]
        return self.to_out(scaled_dot_product_attention(query, *keys, attn_mask=mask)[:, 0])

    def stream(self, x: Tensor, tiles: Tensor, mask: Tensor | None, chunk: int) -> Tensor:
        """The same as `forward`, from tiles of any float type and device, `chunk` of them at a time.

        No keys or values are made: q . (K t) = (K'q) . t, and the mean of V t is V of the mean of t. Softmax is summed
        up as in Milakov and Gimelshein, Online normalizer calculation for softmax, 2018,
        https://arxiv.org/abs/1805.02867.
        """
        to_key, to_value = self.to_kv.weight.chunk(2)
        query = self.to_q(self.x_norm(x)) @ to_key * x.shape[-1] ** -0.5
        lowest = torch.finfo(torch.float32).min
        peak = torch.full((*x.shape[:2], 1), lowest, device=x.device)
        weight, total = torch.zeros_like(peak), torch.zeros(*x.shape[:2], tiles.shape[-1], device=x.device)
        for start in range(0, tiles.shape[1], chunk):
            part = tiles[:, start : start + chunk].to(x.device, x.dtype)
            scores = (query @ part.transpose(1, 2)).float()
            if mask is not None:
                scores = scores.masked_fill(~mask[:, None, start : start + chunk], lowest)
            higher = torch.maximum(peak, scores.amax(dim=-1, keepdim=True))
            scores, shrink, peak = (scores - higher).exp(), (peak - higher).exp(), higher
            weight = weight * shrink + scores.sum(dim=-1, keepdim=True)
            total = total * shrink + scores.to(x.dtype) @ part
        return self.to_out(linear((total / weight).to(x.dtype), to_value))


class _Heads(nn.Module):
    """Self-attention [B,L,dim] without biases, under the names of `nn.MultiheadAttention`."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        nn.init.xavier_uniform_(self.in_proj_weight)
        self.out_proj = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        projected = linear(x, self.in_proj_weight).unflatten(-1, (3, self.heads, -1))
        attended = scaled_dot_product_attention(*projected.permute(2, 0, 3, 1, 4).unbind())
        return self.out_proj(attended.transpose(1, 2).flatten(2))


class SelfAttention(nn.Module):
    """Layer norm and self-attention [B,L,dim]."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.norm, self.mha = nn.LayerNorm(dim), _Heads(dim, heads)

    def forward(self, x: Tensor) -> Tensor:
        return self.mha(self.norm(x))


class GEGLU(nn.Module):
    """x * gelu(gate) of [..., 2F], x before gate: [..., F] (Shazeer 2020, https://arxiv.org/abs/2002.05202)."""

    def forward(self, inner: Tensor) -> Tensor:
        x, gate = inner.chunk(2, dim=-1)
        return x * gelu(gate)


class FeedForward(nn.Module):
    """Layer norm and a gated feed-forward part [B,L,dim]."""

    def __init__(self, dim: int, mlp_ratio: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.net = nn.Sequential(nn.Linear(dim, 2 * mlp_ratio * dim), GEGLU(), nn.Linear(mlp_ratio * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.norm(x))


class _Stack(nn.Module):
    """The latents that are learnt, and the layers; the first two attend to tiles with weights of their own."""

    def __init__(self, tile_dim, dim, latents, depth, transformer_depth, heads, mlp_ratio):
        super().__init__()
        self.latents = nn.Parameter(torch.randn(latents, dim))

        def cross() -> nn.ModuleDict:
            return nn.ModuleDict({"xattn": CrossAttention(dim, tile_dim), "ff": FeedForward(dim, mlp_ratio)})

        def block() -> nn.ModuleDict:
            return nn.ModuleDict({"mhsa": SelfAttention(dim, heads), "ff": FeedForward(dim, mlp_ratio)})

        self.layers = nn.ModuleList(nn.ModuleDict({"xattn": cross()}) for _ in range(min(depth, 2)))
        self.layers[0]["tf"] = nn.ModuleList(block() for _ in range(transformer_depth))


class Perceiver(nn.Module):
    """Tiles of slides to one vector per slide and `latents` vectors, both with a layer norm of their own.

    Args:
        tile_dim: width of the tiles' embeddings.
        dim: width of the latents.
        latents: their count beside the first, which stands for the slide.
        depth: count of attentions to the tiles, each followed by the self-attention blocks.
        transformer_depth: count of those blocks.
        heads: of self-attention.
        mlp_ratio: width of feed-forward parts by `dim`.
    """

    def __init__(
        self,
        tile_dim: int = 2560,
        dim: int = 1280,
        latents: int = 512,
        depth: int = 8,
        transformer_depth: int = 6,
        heads: int = 8,
        mlp_ratio: int = 1,
    ):
        super().__init__()
        self.tile_dim, self.dim, self.depth = tile_dim, dim, depth
        self.cls_norm, self.img_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.perceiver = _Stack(tile_dim, dim, 1 + latents, depth, transformer_depth, heads, mlp_ratio)

    def forward(self, tiles: Tensor, mask: Tensor | None = None, chunk: int | None = None) -> tuple[Tensor, Tensor]:
        """Slide embeddings [B,dim] and latents [B,latents,dim].

        Args:
            tiles: [B,N,tile_dim] of any float type.
            mask: bool [B,N], true where there is a tile, at least once per row; None: everywhere.
            chunk: tiles that are looked at at a time, without keys and values of all; for use without gradients.

        Raises:
            KilnError: tiles or mask of another shape, or no tiles.
        """
        self._check(tiles, mask)
        layers = self.perceiver.layers
        x = self.perceiver.latents.expand(len(tiles), -1, -1)
        if chunk is None:
            tiles = tiles.to(x.dtype)
        keys = None
        for number in range(self.depth):
            cross = layers[min(number, 1)]["xattn"]
            if chunk is not None:
                x = x + cross["xattn"].stream(x, tiles, mask, chunk)
            else:
                keys = cross["xattn"].keys(tiles) if number < 2 else keys
                x = x + cross["xattn"](x, keys, mask)
            x = x + cross["ff"](x)
            for block in layers[0]["tf"]:
                x = x + block["mhsa"](x)
                x = x + block["ff"](x)
        return self.cls_norm(x[:, 0]), self.img_norm(x[:, 1:])

    def _check(self, tiles: Tensor, mask: Tensor | None) -> None:
        if tiles.ndim != 3 or tiles.shape[2] != self.tile_dim or not tiles.shape[1]:
            raise KilnError(
                f"the slide encoder got tiles of shape {list(tiles.shape)}, expected [B, N, {self.tile_dim}], N > 0",
                "give embeddings of the tile encoder that this slide encoder was trained for",
            )
        if mask is not None and (mask.shape != tiles.shape[:2] or mask.dtype != torch.bool):
            raise KilnError(
                f"a mask of {mask.dtype} {list(mask.shape)} for tiles {list(tiles.shape)}",
                "give one true or false per tile",
            )

    def load_weights(self, path: Path) -> None:
        """Take weights from a safetensors or torch file, such as Prism's, whose other networks are left out.

        Names may have a prefix, such as `image_resampler.`, and shared layers may be there once or repeated.

        Raises:
            KilnError: the file is missing, damaged or more than tensors; or what it holds is another network.
        """
        tensors = self._own_names(path, read_tensors(path))
        expected = {name: tensor.shape for name, tensor in self.state_dict().items()}
        _refuse(path, "lacks", expected.keys() - tensors.keys())
        _refuse(path, "also holds", tensors.keys() - expected.keys())
        for name, shape in expected.items():
            if tensors[name].shape != shape:
                raise KilnError(f"{path}: {name} has shape {list(tensors[name].shape)}, expected {list(shape)}", HINT)
        self.load_state_dict(tensors)

    def _own_names(self, path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors without their prefix, and each shared layer under its first name."""
        latents = "perceiver.latents"
        prefixes = [name.removesuffix(latents) for name in tensors if f".{name}".endswith(f".{latents}")]
        if len(prefixes) != 1:
            raise KilnError(f"{path}: {len(prefixes)} tensors named {latents}, expected one", HINT)
        own: dict[str, Tensor] = {}
        greatest = 0
        for full, tensor in tensors.items():
            if not full.startswith(prefixes[0]):
                continue
            name = full.removeprefix(prefixes[0])
            layer = LAYER.match(name)
            if layer:
                number, part = int(layer[1]), layer[2]
                greatest = max(greatest, number)
                first = min(number, 1) if part == "xattn" else 0
                name = f"perceiver.layers.{first}.{part}.{name[layer.end() :]}"
            if name in own and not torch.equal(own[name], tensor):
                raise KilnError(f"{path}: {full} differs from {prefixes[0]}{name}, which here are one", HINT)
            own[name] = tensor
        if greatest >= self.depth or 1 < greatest < self.depth - 1:
            raise KilnError(f"{path}: {greatest + 1} layers, expected {self.depth} (encoder.depth)", HINT)
        return own


@torch.inference_mode()
def encode(tiles: torch.Tensor, encoder: Perceiver, chunk: int, accelerator) -> np.ndarray:
    """[1 + latents, dim] float32 of tiles [N,tile_dim] of any float type; the first row stands for the slide."""
    with accelerator.autocast():
        slide, latents = encoder(tiles[None].to(accelerator.device), chunk=chunk)
    return torch.cat([slide[:, None], latents], dim=1)[0].float().cpu().numpy()


def read_tensors(path: Path) -> dict[str, Tensor]:
    """{name: tensor} of a safetensors file or of a torch file that holds tensors alone, on the CPU.

    Raises:
        KilnError: the file is missing, damaged, or holds more than tensors.
    """
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise KilnError(f"{path}: no such file", "check encoder.weights") from None
    except Exception as error:  # both libraries raise many kinds, and torch advises to run a stranger's code
        raise KilnError(
            f"{path}: unreadable weights, damaged or more than tensors ({type(error).__name__})", HINT
        ) from None
    if not isinstance(tensors, dict) or not all(torch.is_tensor(one) for one in tensors.values()):
        raise KilnError(f"{path}: no state dict of tensors", HINT)
    return tensors


def _refuse(path: Path, what: str, names: Iterable[str]) -> None:
    names = sorted(names)
    if names:
        raise KilnError(f"{path}: {what} {len(names)} tensors, such as {names[0]}", HINT)
