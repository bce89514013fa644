"""Losses of CoCa: the caption's cross entropy, and the contrast of texts with images (Yu et al. 2022, section 3.2)."""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, pad


def caption_loss(logits: Tensor, ids: Tensor, pad_id: int) -> tuple[Tensor, Tensor]:
    """Sum of cross entropies of each next token, and how many there are; their ratio is the mean loss.

    Args:
        logits: [B,L,V], position t predicting token t + 1; the last position predicts nothing.
        ids: [B,L], the whole text; `pad_id` is never predicted.
    """
    labels = pad(ids[:, 1:], (0, 1), value=pad_id)
    losses = cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=pad_id, reduction="sum")
    return losses, (labels != pad_id).sum()


def contrastive_loss(
    text_latents: Tensor, image_latents: Tensor, log_scale: Tensor, same: Tensor | None = None
) -> Tensor:
    """Mean of the cross entropies text to image and image to text, a scalar; rows of equal number belong together.

    Args:
        text_latents, image_latents: [N,D] of unit length.
        log_scale: logarithm of what similarities are multiplied by.
        same: bool [N,N], symmetric, true where two texts are equal: such pairs, off the diagonal, are no negatives.
    """
    similarity = text_latents @ image_latents.T * log_scale.exp()
    own = torch.arange(len(similarity), device=similarity.device)
    if same is not None:
        equal = same & (own != own[:, None])
        similarity = similarity.masked_fill(equal, -torch.inf)
    return (cross_entropy(similarity, own) + cross_entropy(similarity.T, own)) / 2


def loss_terms(
    *,
    logits: Tensor | None = None,
    ids: Tensor | None = None,
    pad_id: int = 0,
    tokens: Tensor | float | None = None,
    text_latents: Tensor | None = None,
    image_latents: Tensor | None = None,
    log_scale: Tensor | None = None,
    same: Tensor | None = None,
    caption_weight: float = 1.0,
    contrastive_weight: float = 1.0,
) -> dict[str, Tensor]:
    """The loss of a batch as {name: weighted scalar}, whose sum is minimised.

    The one place to change it; or `coca.train.loss_plugin` names a file with a function of this name, which is called
    with these keywords and should take others too: it may call this one and add terms, or do without.

    A batch that takes several forward passes asks for `caption` once per pass, each pass giving its share, and for
    `contrastive` once with the latents of all passes. A term whose tensors are None is left out.

    Args:
        logits, ids, pad_id: see `caption_loss`.
        tokens: count of predicted tokens of the whole batch, by which the sum is divided; None: those of `ids`.
        text_latents, image_latents, log_scale, same: see `contrastive_loss`.
    """
    terms = {}
    if logits is not None and ids is not None:
        total, count = caption_loss(logits, ids, pad_id)
        terms["caption"] = caption_weight * total / (count if tokens is None else tokens)
    if text_latents is not None and image_latents is not None and log_scale is not None:
        contrast = contrastive_loss(text_latents, image_latents, log_scale, same)
        terms["contrastive"] = contrastive_weight * contrast
    return terms
