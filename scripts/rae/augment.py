"""Differentiable augmentation for the discriminator's input (Zhao et al. 2020, arXiv:2006.10738).

Draws and their use are apart, so that one draw can serve real and fake images, on any device.
"""

import dataclasses

import torch
from torch import Tensor

SHARE = 0.125


@dataclasses.dataclass(frozen=True)
class Draw:
    """Random values for a batch of B images; None where a kind of augmentation is off for the whole batch.

    Attributes:
        shift: [B,2] int64 rows and columns, each image's content moves up and left by them; zeros come in.
        colour: [3,B] float32: brightness to add, factor of saturation, factor of contrast.
        cutout: [B,4] int64: first row, end row, first column, end column of the box that is set to zero.
    """

    shift: Tensor | None
    colour: Tensor | None
    cutout: Tensor | None


def draw(
    batch: int, height: int, width: int, generator: torch.Generator, prob: float = 1.0, cutout: float = 0.0
) -> Draw:
    """Values for one batch; the generator (on the CPU) moves on by the same count whatever comes out.

    Shift within 12.5 % of the sides; brightness U(-0.5, 0.5), saturation U(0, 2), contrast U(0.5, 1.5).

    Args:
        prob: of each of the three kinds, once per batch.
        cutout: sides of the box as a share of the image's; 0 for none.

    Raises:
        ValueError: `prob` or `cutout` is not in [0, 1].
    """
    if not 0 <= prob <= 1 or not 0 <= cutout <= 1:
        raise ValueError(f"prob {prob} and cutout {cutout} must be in [0, 1]")
    gates = (torch.rand(3, generator=generator) < prob).tolist()
    uniform = torch.rand(7, batch, generator=generator)
    sides = torch.tensor([height, width])
    reach = torch.tensor([round(height * SHARE), round(width * SHARE)])
    shift = (uniform[0:2].T * (2 * reach + 1)).long() - reach
    colour = torch.stack([uniform[2] - 0.5, uniform[3] * 2, uniform[4] + 0.5])
    box = torch.tensor([round(height * cutout), round(width * cutout)])
    first = (uniform[5:7].T * (sides + 1 - box % 2)).long() - box // 2
    boxes = torch.stack([first, first + box], dim=2).clamp(min=0).flatten(1)
    return Draw(shift if gates[0] else None, colour if gates[1] else None, boxes if gates[2] and box.all() else None)


def take(values: Draw, positions: Tensor) -> Draw:
    """The values of some of a batch's images; positions: [P] int64."""
    return Draw(
        *(None if one is None else one.index_select(dim, positions)
          for one, dim in ((values.shift, 0), (values.colour, 1), (values.cutout, 0)))
    )  # fmt: skip


def apply(images: Tensor, values: Draw) -> Tensor:
    """[B,3,H,W] float -> the same, differentiable: shift, then brightness, saturation, contrast, then cutout."""
    if values.shift is not None:
        images = _shift(images, values.shift)
    if values.colour is not None:
        images = _colour(images, values.colour.to(images))
    if values.cutout is not None:
        images = images * _outside(values.cutout, *images.shape[2:]).to(images)
    return images


def _shift(images: Tensor, shift: Tensor) -> Tensor:
    # slices, because the gradient of a gather adds in no fixed order on a GPU
    height, width = images.shape[2:]
    reach = int(shift.abs().max())
    padded = torch.nn.functional.pad(images, [reach] * 4)
    corners = (shift + reach).tolist()
    moved = [one[:, y : y + height, x : x + width] for one, (y, x) in zip(padded, corners, strict=True)]
    return torch.stack(moved)


def _colour(images: Tensor, colour: Tensor) -> Tensor:
    brightness, saturation, contrast = colour.view(3, -1, 1, 1, 1)
    images = images + brightness
    grey = images.mean(dim=1, keepdim=True)
    images = (images - grey) * saturation + grey
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    return (images - mean) * contrast + mean


def _outside(boxes: Tensor, height: int, width: int) -> Tensor:
    top, bottom, left, right = boxes.T.unsqueeze(2)
    rows, columns = torch.arange(height), torch.arange(width)
    inside_rows, inside_columns = (rows >= top) & (rows < bottom), (columns >= left) & (columns < right)
    return ~(inside_rows[:, None, :, None] & inside_columns[:, None, None, :])
