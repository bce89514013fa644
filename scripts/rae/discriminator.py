"""The DINO discriminator of RAE: light heads over the tokens of a frozen self-supervised ViT.

Lineage: StyleGAN-T (arXiv:2301.09515), then VAR's and RAE's (arXiv:2510.11690) variant with five heads.
"""

import dataclasses
import functools
from pathlib import Path

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from scripts.common.errors import KilnError
from scripts.rae.perceptual import load_state

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NORMS = ("bn", "gn")
EPSILON = 1e-6


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Size of a DINO ViT: heads read its tokens after the blocks `taps`, and after the last block once more."""

    patch: int
    dim: int
    depth: int
    heads: int
    taps: tuple[int, ...]
    size: int = 224


_TAPS = (2, 5, 8, 11)
RECIPES = {
    "S_8": Recipe(8, 384, 12, 6, _TAPS),
    "S_16": Recipe(16, 384, 12, 6, _TAPS),
    "B_16": Recipe(16, 768, 12, 12, _TAPS),
}


class DinoFeatures(nn.Module):
    """Tokens of a frozen DINO ViT with the names of timm's checkpoints.

    Args:
        recipe: its size.
        weights: state dict such as `dino_vit_small_patch8_224.pth`; None leaves random weights.
        seed: of the random weights.

    Raises:
        KilnError: the file does not fit the recipe, or the recipe does not fit itself.
    """

    def __init__(self, recipe: Recipe, weights: Path | None = None, seed: int = 0):
        super().__init__()
        _check(recipe)
        self.recipe = recipe
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            # the tanh form of GELU is the published discriminator's, not DINO's
            self.vit = VisionTransformer(
                img_size=recipe.size,
                patch_size=recipe.patch,
                num_classes=0,
                embed_dim=recipe.dim,
                depth=recipe.depth,
                num_heads=recipe.heads,
                norm_layer=functools.partial(nn.LayerNorm, eps=EPSILON),
                act_layer=functools.partial(nn.GELU, approximate="tanh"),
            )
            if weights is None:
                _spread(self.vit)
        if weights is not None:
            load_state(self.vit, weights)
        for block in self.vit.blocks:
            # as published; softmax does not see a key bias, so this changes nothing but rounding
            nn.init.zeros_(block.attn.qkv.bias[recipe.dim : 2 * recipe.dim])
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1))
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor) -> list[Tensor]:
        """Tokens [B,dim,L] without CLS: of the last block, then of the taps; images [B,3,H,W] in [-1,1].

        Tokens are as the blocks leave them: the ViT's final norm is not applied.
        """
        size = (self.recipe.size, self.recipe.size)
        x = nn.functional.interpolate(images, size, mode="bilinear", align_corners=False)
        x = ((x + 1) / 2 - self.mean) / self.std
        last = self.recipe.depth - 1
        blocks = sorted({*self.recipe.taps, last})
        found = self.vit.forward_intermediates(x, blocks, output_fmt="NLC", intermediates_only=True)
        tokens = {block: one.transpose(1, 2) for block, one in zip(blocks, found, strict=True)}
        return [tokens[block] for block in (last, *self.recipe.taps)]


class Discriminator(nn.Module):
    """Logits of real against fake; only `heads` learns, and only its state need be saved.

    No statistic crosses samples, so a sample's logits do not depend on its batch. In training mode every forward pass
    takes one step of the power iteration of the spectral norm; evaluation mode changes nothing.

    Args:
        recipe: one of `RECIPES`, which needs `weights`, or a `Recipe` of any size.
        weights: the DINO ViT, see `DinoFeatures`.
        kernel: odd width of the second convolution.
        norm: "bn" for per-sample statistics over the tokens, "gn" for 32 groups.
        seed: of a ViT without weights. Heads draw from torch's global generator.

    Raises:
        KilnError: an argument is none of these.
    """

    def __init__(
        self,
        recipe: str | Recipe = "S_8",
        weights: Path | None = None,
        kernel: int = 9,
        norm: str = "bn",
        seed: int = 0,
    ):
        super().__init__()
        if isinstance(recipe, str):
            if recipe not in RECIPES:
                raise KilnError(f"discriminator {recipe!r}: expected one of {', '.join(RECIPES)}", "check the recipe")
            if weights is None:
                raise KilnError(f"discriminator {recipe} without DINO weights", "give dino_vit_small_patch8_224.pth")
            recipe = RECIPES[recipe]
        tokens = (recipe.size // recipe.patch) ** 2
        if kernel % 2 == 0 or not 0 < kernel <= 2 * tokens:
            raise KilnError(f"discriminator kernel {kernel}: expected odd, at most {2 * tokens}", "use 9")
        if norm not in NORMS or (norm == "gn" and recipe.dim % 32):
            raise KilnError(
                f"discriminator norm {norm!r} at width {recipe.dim}: expected bn, or gn where 32 divides the width",
                "use bn",
            )
        self.dino = DinoFeatures(recipe, weights, seed)
        self.heads = nn.ModuleList(_head(recipe.dim, kernel, norm) for _ in range(len(recipe.taps) + 1))

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, heads * tokens], at least float32, of images [B,3,H,W] in [-1,1], of any size."""
        read = zip(self.heads, self.dino(images), strict=True)
        logits = torch.cat([head(x).flatten(1) for head, x in read], dim=1)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


class LocalBatchNorm(nn.InstanceNorm1d):
    """Batch norm of StyleGAN-T with a virtual batch of one: statistics of each sample over its tokens, in float32."""

    def __init__(self, channels: int):
        super().__init__(channels, eps=EPSILON, affine=True)

    def forward(self, x: Tensor) -> Tensor:
        """[B,C,L] -> [B,C,L], at least float32."""
        return super().forward(x.to(torch.promote_types(x.dtype, torch.float32)))


class Residual(nn.Module):
    """(f(x) + x) / sqrt(2), which keeps the variance."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        """[B,C,L] -> [B,C,L]."""
        return (self.inner(x) + x) * 0.5**0.5


def _head(channels: int, kernel: int, norm: str) -> nn.Sequential:
    last = spectral_norm(nn.Conv1d(channels, 1, 1))
    return nn.Sequential(_block(channels, 1, norm), Residual(_block(channels, kernel, norm)), last)


def _block(channels: int, kernel: int, norm: str) -> nn.Sequential:
    # the parametrization, not the deprecated hook: it starts from a warm power iteration and survives a deep copy
    convolution = nn.Conv1d(channels, channels, kernel, padding=kernel // 2, padding_mode="circular")
    normalised = LocalBatchNorm(channels) if norm == "bn" else nn.GroupNorm(32, channels, eps=EPSILON)
    return nn.Sequential(spectral_norm(convolution), normalised, nn.LeakyReLU(0.2))


def _spread(vit: VisionTransformer) -> None:
    # timm's start is so small that random blocks would hand on what they got, and all taps be alike
    for layer in vit.blocks.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)


def _check(recipe: Recipe) -> None:
    wrong = None
    if recipe.size % recipe.patch or recipe.size < 2 * recipe.patch:
        wrong = f"size {recipe.size} is no multiple of patch {recipe.patch}, two at least"
    elif recipe.dim % recipe.heads:
        wrong = f"width {recipe.dim} does not divide by {recipe.heads} heads"
    elif not recipe.taps or not all(0 <= tap < recipe.depth for tap in recipe.taps):
        wrong = f"taps {recipe.taps} are not within blocks 0 to {recipe.depth - 1}"
    if wrong:
        raise KilnError(f"discriminator recipe: {wrong}", "correct the recipe")
