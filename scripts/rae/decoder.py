"""The decoder of a representation autoencoder: a vision transformer in the manner of MAE, from latents to pixels.

Names of parameters are those of the published checkpoints (HF ViTMAE's decoder before transformers 5, with a
trainable CLS token and no mask token), which therefore load with `load_state_dict`.
Sources: He et al., Masked Autoencoders Are Scalable Vision Learners, 2021, https://arxiv.org/abs/2111.06377;
Zheng et al., 2025, https://arxiv.org/abs/2510.11690.
"""

from typing import NamedTuple

import torch
from torch import nn
from torch.nn.functional import gelu, interpolate, scaled_dot_product_attention

from scripts.common.errors import KilnError
from scripts.rae.grid import decoder_patch

EPS = 1e-12


class Size(NamedTuple):
    """Shape of a decoder: count of blocks, their width, that of their MLP, and count of attention heads."""

    layers: int
    width: int
    mlp: int
    heads: int


DECODERS = {
    "ViT-B": Size(12, 768, 3072, 12),
    "ViT-L": Size(24, 1024, 4096, 16),
    "ViT-XL": Size(28, 1152, 4096, 16),
}


def position_embedding(width: int, grid: int) -> torch.Tensor:
    """Fixed 2-D sine-cosine embedding [1, 1 + grid**2, width] float32; the first row, of CLS, is zero.

    The first half of the width encodes the column, the second the row; each is sin, then cos, of
    position / 10000**(i / (width/4)) (MAE, section 3 and its published code).
    """
    rates = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.arange(grid, dtype=torch.float64)[:, None] * rates
    one_axis = torch.cat([angles.sin(), angles.cos()], dim=1)
    columns, rows = one_axis.repeat(grid, 1), one_axis.repeat_interleave(grid, dim=0)
    patches = torch.cat([columns, rows], dim=1)
    return torch.cat([torch.zeros_like(patches[:1]), patches])[None].float()


def unpatchify(patches: torch.Tensor, patch: int) -> torch.Tensor:
    """Patches [B, g*g, patch*patch*3], each in the order row, column, colour -> images [B, 3, g*patch, g*patch]."""
    grid = round(patches.shape[1] ** 0.5)
    parts = patches.reshape(len(patches), grid, grid, patch, patch, 3)
    return parts.permute(0, 5, 1, 3, 2, 4).reshape(len(patches), 3, grid * patch, grid * patch)


def _dense(inputs: int, outputs: int) -> nn.ModuleDict:
    return nn.ModuleDict({"dense": nn.Linear(inputs, outputs)})


class Block(nn.Module):
    """Pre-norm transformer block: x + attention(norm(x)), then x + mlp(norm(x)); [B,N,width] to the same."""

    def __init__(self, size: Size):
        super().__init__()
        width, self.heads = size.width, size.heads
        projections = nn.ModuleDict({name: nn.Linear(width, width) for name in ("query", "key", "value")})
        self.attention = nn.ModuleDict({"attention": projections, "output": _dense(width, width)})
        self.intermediate, self.output = _dense(width, size.mlp), _dense(size.mlp, width)
        self.layernorm_before, self.layernorm_after = nn.LayerNorm(width, EPS), nn.LayerNorm(width, EPS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = self.layernorm_before(x)
        query, key, value = (
            self.attention["attention"][name](normed).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for name in ("query", "key", "value")
        )
        attended = scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        x = x + self.attention["output"]["dense"](attended)
        return x + self.output["dense"](gelu(self.intermediate["dense"](self.layernorm_after(x))))


class Decoder(nn.Module):
    """Latents [B, latent_dim, h, w] -> patches [B, grid**2, patch**2 * 3] in the encoder's normalised pixel space.

    Attributes:
        grid, patch: patches per side of the image and pixels per side of a patch.
        decoder_pred: the last layer, whose weight the adaptive weight of the GAN loss refers to.

    Args:
        latent_dim: width of the latents.
        grid: latents per side; others are resized to it bilinearly.
        image_size: side of the image in pixels.
        size: one of `DECODERS`, or any other shape.

    Raises:
        KilnError: the image's side is no multiple of the grid, or the width does not fit the heads.
    """

    def __init__(self, latent_dim: int, grid: int, image_size: int, size: Size):
        super().__init__()
        if size.width % 4 or size.width % size.heads:
            raise KilnError(
                f"decoder width {size.width} is no multiple of 4 and of its {size.heads} heads",
                "choose a width that both divide",
            )
        self.latent_dim, self.grid, self.patch = latent_dim, grid, decoder_patch(image_size, grid)
        self.decoder_embed = nn.Linear(latent_dim, size.width)
        self.trainable_cls_token = nn.Parameter(torch.zeros(1, 1, size.width))
        self.register_buffer("decoder_pos_embed", position_embedding(size.width, grid))
        self.decoder_layers = nn.ModuleList(Block(size) for _ in range(size.layers))
        self.decoder_norm = nn.LayerNorm(size.width, EPS)
        self.decoder_pred = nn.Linear(size.width, self.patch**2 * 3)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """See the class.

        Raises:
            KilnError: the latents' width is another.
        """
        if latents.ndim != 4 or latents.shape[1] != self.latent_dim:
            raise KilnError(
                f"the decoder got latents of shape {list(latents.shape)}, expected [B, {self.latent_dim}, h, w]",
                "decode with the encoder that the decoder was trained for",
            )
        if latents.shape[2:] != (self.grid, self.grid):
            latents = interpolate(latents, size=(self.grid, self.grid), mode="bilinear", align_corners=False)
        x = self.decoder_embed(latents.flatten(2).transpose(1, 2))
        cls = self.trainable_cls_token.expand(len(x), -1, -1)
        x = torch.cat([cls, x], dim=1) + self.decoder_pos_embed
        for layer in self.decoder_layers:
            x = layer(x)
        return self.decoder_pred(self.decoder_norm(x))[:, 1:]

    def unpatchify(self, patches: torch.Tensor) -> torch.Tensor:
        """Patches of `forward` -> images [B, 3, grid*patch, grid*patch]."""
        return unpatchify(patches, self.patch)
