"""The gradient of a contrastive loss over a batch that no single pass holds: GradCache (Gao et al. 2021).

The loss needs latents alone. So they are computed first, without a graph where there are several passes; the loss's
gradient by them is exact, and each pass hands its part of it down to the weights.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, distributed

Latents = tuple[Tensor, Tensor]  # of texts and of images, [n,d] each


class Gradients(NamedTuple):
    """Of the contrastive loss, a scalar without graph: by this process's latents [n,d], and by the log scale.

    `scale` is this process's part of a sum over processes.
    """

    loss: Tensor
    text: Tensor
    image: Tensor
    scale: Tensor


def backward(
    batches: Iterator,
    count: int,
    encode: Callable[..., Latents],
    terms: Callable[..., tuple[Tensor, Tensor, Tensor]],
    scale: Tensor,
    gradients: Callable[[Latents], Gradients],
    backpropagate: Callable[[Tensor], None] = Tensor.backward,
) -> tuple[Tensor, Tensor]:
    """Add the gradient of a global batch's whole loss to the weights: this process's part of a sum over processes.

    Args:
        batches: gives `count` passes, and if there is more than one, the same once more.
        encode: a pass -> its latents.
        terms: a pass -> its latents, and what it adds to the loss by itself, a scalar.
        scale: the logarithm of the temperature's inverse; a parameter.
        gradients: of the contrastive loss, by all of this process's latents, whose graph it leaves alone.
        backpropagate: of a scalar.

    Returns: the sum of what this process's passes added by themselves, and the loss that `gradients` told.
    """
    if count == 1:
        text, image, own = terms(next(batches))
        found = gradients((text, image))
        backpropagate(own + _carry((text, image), found, slice(None)) + (scale * found.scale).sum())
        return own.detach(), found.loss
    with torch.no_grad():
        latents = [encode(next(batches)) for _ in range(count)]
    found = gradients(tuple(torch.cat(one) for one in zip(*latents, strict=True)))
    total, start = torch.zeros_like(found.loss), 0
    for number in range(count):
        text, image, own = terms(next(batches))
        rows = slice(start, start + len(text))
        carried = own + _carry((text, image), found, rows)
        backpropagate(carried + (scale * found.scale).sum() if number == 0 else carried)
        total, start = total + own.detach(), rows.stop
    return total, found.loss


def _carry(latents: Latents, found: Gradients, rows: slice) -> Tensor:
    """A scalar whose gradient by `latents` is that of the contrastive loss."""
    return (latents[0] * found.text[rows]).sum() + (latents[1] * found.image[rows]).sum()


def sum_gradients(parameters: Sequence[torch.nn.Parameter]) -> None:
    """Add up gradients over processes, in place.

    Once for a batch, whatever its passes: their number may differ between processes, so hooks on the backward pass,
    as `DistributedDataParallel` has, would wait for each other. A parameter without a gradient has it nowhere.
    """
    waiting = [distributed.all_reduce(p.grad, async_op=True) for p in parameters if p.grad is not None]
    for one in waiting:
        one.wait()
