"""The contrastive loss of a global batch that no single pass holds: GradCache (Gao et al. 2021), over processes too.

The loss needs latents alone. So they are computed first, without a graph where there are several passes, and gathered
from all processes; the loss's gradient by them is exact, and each pass hands its part of it down to the weights.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, distributed

from scripts.common.errors import KilnError

Latents = tuple[Tensor, Tensor]  # of texts and of images, [n,d] each


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


class Gradients(NamedTuple):
    """Of the contrastive loss, a scalar without graph: by this process's latents [n,d], and by the log scale."""

    loss: Tensor
    text: Tensor
    image: Tensor
    scale: Tensor


def gradients(latents: Latents, scale: Tensor, loss: Callable[[Tensor, Tensor, Tensor], Tensor], sides: Sides):
    """`Gradients` of the loss of all processes' latents; each process computes the whole loss.

    Args:
        latents: this process's, with or without a graph, which is left alone.
        scale: the logarithm of the temperature's inverse; a parameter.
        loss: (texts [N,d], images [N,d], scale) -> scalar.
    """
    whole = [gather(one, sides).requires_grad_() for one in latents]
    with torch.enable_grad():
        value = loss(*whole, scale)
        text, image, by_scale = torch.autograd.grad(value, [*whole, scale])
    return Gradients(value.detach(), text[sides.own], image[sides.own], by_scale)


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
    """Add the gradient of a global batch's whole loss to the weights: this process's part of a sum over processes.

    Args:
        batches: gives `count` passes, and if there is more than one, the same once more.
        encode: a pass -> its latents.
        terms: a pass -> its latents, and what it adds to the loss by itself, a scalar.
        scale, loss: as in `gradients`.
        backpropagate: of a scalar.

    Returns: the sum of what this process's passes added by themselves, and the contrastive loss of all processes.
    """
    if count == 1:
        text, image, own = terms(next(batches))
        found = gradients((text, image), scale, loss, sides)
        backpropagate(own + _carry((text, image), found, slice(None)) + _once(scale, found, sides))
        return own.detach(), found.loss
    with torch.no_grad():
        latents = [encode(next(batches)) for _ in range(count)]
    found = gradients(tuple(torch.cat(one) for one in zip(*latents, strict=True)), scale, loss, sides)
    total, start = torch.zeros_like(found.loss), 0
    for number in range(count):
        text, image, own = terms(next(batches))
        rows = slice(start, start + len(text))
        carried = own + _carry((text, image), found, rows)
        backpropagate(carried + _once(scale, found, sides) if number == 0 else carried)
        total, start = total + own.detach(), rows.stop
    return total, found.loss


def _carry(latents: Latents, found: Gradients, rows: slice) -> Tensor:
    """A scalar whose gradient by `latents` is that of the contrastive loss."""
    return (latents[0] * found.text[rows]).sum() + (latents[1] * found.image[rows]).sum()


def _once(scale: Tensor, found: Gradients, sides: Sides) -> Tensor:
    """As `_carry`, for the scale, which all processes share: it counts in the first alone."""
    return (scale * found.scale).sum() * (sides.rank == 0)


def sum_gradients(parameters: Sequence[torch.nn.Parameter]) -> None:
    """Add up gradients over processes, in place.

    Once for a batch, whatever its passes: their number may differ between processes, so hooks on the backward pass,
    as `DistributedDataParallel` has, would wait for each other. A parameter without a gradient has it nowhere.
    """
    waiting = [distributed.all_reduce(p.grad, async_op=True) for p in parameters if p.grad is not None]
    for one in waiting:
        one.wait()


def same(codes: Tensor) -> Tensor:
    """bool [N,N]: which texts of codes [N] are equal."""
    return codes[:, None] == codes[None, :]
