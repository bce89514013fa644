"""Copies of pictures without a model, which a reconstruction must beat: blurred by a factor of 8, or of one colour."""

import torch
from torch.nn.functional import interpolate

from scripts.rae import quality

SHRINK = 8


def shrunk(images: torch.Tensor) -> torch.Tensor:
    """uint8 [B,3,S,S], made 8 times smaller by the mean of squares and large again, bicubic: uint8."""
    side = images.shape[-1]
    small = interpolate(images.float() / 255, size=max(1, side // SHRINK), mode="area")
    return quality.to_uint8(interpolate(small, size=side, mode="bicubic", align_corners=False))


def mean_colour(images: torch.Tensor) -> torch.Tensor:
    """uint8 [B,3,S,S], all pixels of each picture set to the picture's mean colour: uint8."""
    return quality.to_uint8(images.double().mean(dim=(2, 3), keepdim=True) / 255).expand_as(images)
