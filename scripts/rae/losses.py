"""Losses and schedules of stage 1: L1 + LPIPS + adaptive hinge GAN (RAE, arXiv:2510.11690; VQGAN, arXiv:2012.09841)."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from scripts.common.errors import KilnError


class Reconstruction(NamedTuple):
    """Scalars: what is minimised, and its two parts before weighting."""

    total: Tensor
    l1: Tensor
    lpips: Tensor


def reconstruction_loss(
    reconstructions: Tensor,
    images: Tensor,
    perceptual: Callable[[Tensor, Tensor], Tensor] | None = None,
    lpips_weight: float = 1.0,
) -> Reconstruction:
    """Mean |x - y| + weight * mean LPIPS of two batches [B,3,H,W] in [0,1], the first not clamped.

    Args:
        perceptual: distances [B] of batches in [-1,1], such as `Lpips`; None leaves the term out.
    """
    l1 = (reconstructions - images).abs().mean()
    if perceptual is None:
        return Reconstruction(l1, l1, torch.zeros_like(l1))
    lpips = perceptual(2 * reconstructions - 1, 2 * images - 1).mean()
    return Reconstruction(l1 + lpips_weight * lpips, l1, lpips)


def adaptive_weight(
    reconstruction: Tensor,
    generator: Tensor,
    last_layer: nn.Parameter,
    reduce: Callable[[Tensor], Tensor] = lambda gradient: gradient,
) -> Tensor:
    """VQGAN's lambda = |grad of reconstruction| / (|grad of generator| + 1e-6), clamped to [0, 1e4], no gradient.

    Args:
        reconstruction, generator: scalar losses whose graphs are kept for the backward pass.
        last_layer: weight of the decoder's last layer, by which both gradients are taken.
        reduce: mean of a gradient over processes, so that several agree with one.
    """
    norms = [
        torch.linalg.vector_norm(reduce(torch.autograd.grad(loss, last_layer, retain_graph=True)[0].detach()))
        for loss in (reconstruction, generator)
    ]
    return (norms[0] / (norms[1] + 1e-6)).clamp(0, 1e4)


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Hinge: (mean relu(1 - real) + mean relu(1 + fake)) / 2, a scalar, of logits of any shape."""
    return 0.5 * ((1 - real).relu().mean() + (1 + fake).relu().mean())


def generator_loss(fake: Tensor) -> Tensor:
    """-mean(logits), a scalar."""
    return -fake.mean()


def quantise(images: Tensor) -> Tensor:
    """Images in [-1,1], clamped and rounded to the 256 levels that a file can hold; no gradient."""
    return ((images.detach().clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1


@dataclasses.dataclass(frozen=True)
class Schedule:
    """First epochs, counted from 0, of the terms; published values.

    Raises:
        KilnError: an epoch is negative, or the generator would learn from a discriminator that never did.
    """

    lpips_start: int = 0
    discriminator_start: int = 6
    gan_start: int = 8

    def __post_init__(self):
        if min(self.lpips_start, self.discriminator_start) < 0 or self.gan_start < self.discriminator_start:
            raise KilnError(
                f"{self}: expected starts of at least 0, and gan_start no earlier than discriminator_start",
                "let the discriminator learn first; the published starts are 0, 6 and 8",
            )

    def lpips(self, epoch: int) -> bool:
        """Whether LPIPS counts."""
        return epoch >= self.lpips_start

    def discriminator(self, epoch: int) -> bool:
        """Whether the discriminator is updated."""
        return epoch >= self.discriminator_start

    def gan(self, epoch: int) -> bool:
        """Whether the generator's adversarial loss counts."""
        return epoch >= self.gan_start


def update_ema(average: nn.Module, model: nn.Module, decay: float = 0.9978) -> None:
    """average <- decay * average + (1 - decay) * model, for all parameters, in place.

    torch's own update, without its `AveragedModel`: that copies the model at the first update, where published runs
    average from the start.

    Raises:
        ValueError: the two differ in their parameters' names or shapes.
    """
    ours, theirs = dict(average.named_parameters()), dict(model.named_parameters())
    if [(k, v.shape) for k, v in ours.items()] != [(k, v.shape) for k, v in theirs.items()]:
        raise ValueError("the average and the model are of different architectures")
    get_ema_multi_avg_fn(decay)([x.detach() for x in ours.values()], [x.detach() for x in theirs.values()], 0)
