"""The contrastive loss of a global batch whose pairs lie with several processes, as many as each may hold.

Latents are gathered from all processes, and each computes the whole loss: `scripts.common.contrastive` has the rest.
"""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, distributed

from scripts.common import contrastive
from scripts.common.contrastive import Gradients, Latents
from scripts.common.errors import KilnError


class Sides(NamedTuple):
    """How many pairs of the global batch each process has, and which process this is."""

    counts: tuple[int, ...]
    rank: int

    @property
    def own(self) -> slice:
        """This process's rows of the gathered latents."""
        start = sum(self.counts[: self.rank])
        return slice(start, start + self.counts[self.rank])


def gather(local: Tensor, sides: Sides) -> Tensor:
    """[n,...] of each process, n by `sides.counts`, to [N,...] in order of processes; carries no gradient.

    Raises:
        KilnError: this process's rows are not as many as `sides` says.
    """
    local = local.detach()
    if len(local) != sides.counts[sides.rank]:
        raise KilnError(
            f"process {sides.rank} has {len(local)} rows of a global batch, expected {sides.counts[sides.rank]}",
            "this is a defect: report it",
        )
    if len(sides.counts) == 1:
        return local
    padded = local.new_zeros(max(sides.counts), *local.shape[1:])
    padded[: len(local)] = local
    parts = [torch.empty_like(padded) for _ in sides.counts]
    distributed.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, sides.counts, strict=True)])


def gradients(latents: Latents, scale: Tensor, loss: Callable[[Tensor, Tensor, Tensor], Tensor], sides: Sides):
    """`Gradients` of the loss of all processes' latents; that by the scale, which all share, counts in the first alone.

    Args:
        latents: this process's, with or without a graph, which is left alone.
        scale: the logarithm of the temperature's inverse; a parameter.
        loss: (texts [N,d], images [N,d], scale) -> scalar.
    """
    whole = [gather(one, sides).requires_grad_() for one in latents]
    with torch.enable_grad():
        value = loss(*whole, scale)
        text, image, by_scale = torch.autograd.grad(value, [*whole, scale])
    return Gradients(value.detach(), text[sides.own], image[sides.own], by_scale * (sides.rank == 0))


def backward(
    batches: Iterator,
    count: int,
    encode: Callable[..., Latents],
    terms: Callable[..., tuple[Tensor, Tensor, Tensor]],
    scale: Tensor,
    loss: Callable[[Tensor, Tensor, Tensor], Tensor],
    sides: Sides,
    backpropagate: Callable[[Tensor], None] = Tensor.backward,
) -> tuple[Tensor, Tensor]:
    """`contrastive.backward` with `gradients`; returns the contrastive loss of all processes."""
    found = functools.partial(gradients, scale=scale, loss=loss, sides=sides)
    return contrastive.backward(batches, count, encode, terms, scale, found, backpropagate)


def same(codes: Tensor) -> Tensor:
    """bool [N,N]: which texts of codes [N] are equal."""
    return codes[:, None] == codes[None, :]
