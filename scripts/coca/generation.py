"""Captions of image tokens, with cached keys and values: greedy, by beam search, or drawn from the likeliest tokens.

No caption depends on the batch that it is made in. No mark but the end is ever made; where a tokenizer has one mark
for begin and end, that is the end.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from scripts.coca.model import Cache
from scripts.coca.settings import CaptionSettings
from scripts.coca.texts import Texts
from scripts.common.hashed import unit


def captions(model, image_tokens: Tensor, texts: Texts, values: CaptionSettings, slides: Sequence[str]) -> list[str]:
    """Captions of `slides`, by greedy choice, beams or draws, as `values` say.

    Args:
        model: a CoCa in evaluation mode.
        image_tokens: float [B, N, image_dim], on the model's device.
        slides: [B] names, which decide the draws.
    """
    if values.beams > 1:
        found = beam_ids(model, image_tokens, texts, values.max_length, values.beams)[0]
    elif values.top_k:
        found = sampled_ids(model, image_tokens, texts, values, slides)
    else:
        found = greedy_ids(model, image_tokens, None, texts, values.max_length)
    return [texts.decode(row) for row in found]


def greedy(model, image_tokens: Tensor, mask: Tensor | None, texts: Texts, max_length: int) -> list[str]:
    """The likeliest token after the likeliest token, per row until the end mark or `max_length` new tokens.

    Args:
        model: a CoCa in evaluation mode.
        image_tokens: float [B, N, image_dim], on the model's device.
        mask: bool [B, N], True for image tokens that are there; None: all.
    """
    return [texts.decode(row) for row in greedy_ids(model, image_tokens, mask, texts, max_length)]


def greedy_ids(model, image_tokens: Tensor, mask: Tensor | None, texts: Texts, max_length: int) -> list[list[int]]:
    """The tokens of `greedy`, without marks."""
    return _one_by_one(model, image_tokens, mask, texts, max_length, lambda logits, position: logits.argmax(dim=1))


def sampled_ids(
    model, image_tokens: Tensor, texts: Texts, values: CaptionSettings, slides: Sequence[str]
) -> list[list[int]]:
    """Tokens drawn from the `top_k` likeliest at each place (Fan et al. 2018, https://arxiv.org/abs/1805.04833), in
    proportion to their probability at `temperature`; the draws depend on seed, slide and place alone."""

    def choose(logits: Tensor, position: int) -> Tensor:
        best, ids = logits.topk(min(values.top_k, logits.shape[1]), dim=1)
        bounds = (best.double() / values.temperature).softmax(dim=1).cumsum(dim=1).cpu().numpy()
        draws = np.array([unit(values.seed, slide, str(position)) for slide in slides])[:, None] * bounds[:, -1:]
        return ids.gather(1, torch.from_numpy((bounds <= draws).sum(axis=1, keepdims=True)).to(ids.device))[:, 0]

    return _one_by_one(model, image_tokens, None, texts, values.max_length, choose)


@torch.inference_mode()
def _one_by_one(
    model, image_tokens: Tensor, mask: Tensor | None, texts: Texts, max_length: int,
    choose: Callable[[Tensor, int], Tensor],
) -> list[list[int]]:  # fmt: skip
    """Tokens that `choose` takes, [B] from logits [B, size] at a position, until each row's end mark."""
    cache = model.start_cache(model.embed_image(image_tokens, mask)[1], max_length)
    rows = len(image_tokens)
    last = torch.full((rows, 1), texts.bos_id, device=image_tokens.device)
    going = torch.ones(rows, dtype=torch.bool, device=image_tokens.device)
    made = []
    for position in range(max_length):
        chosen = choose(_of_texts(model.step(last, position, cache), texts), position)
        going &= chosen != texts.eos_id
        if not going.any():
            break
        made.append(chosen.where(going, texts.pad_id))
        last = chosen[:, None]
    ids = torch.stack(made, dim=1).tolist() if made else [[] for _ in range(rows)]
    return [[one for one in row if one != texts.pad_id] for row in ids]


@torch.inference_mode()
def beam_ids(
    model, image_tokens: Tensor, texts: Texts, max_length: int, beams: int
) -> tuple[list[list[int]], list[float]]:
    """Tokens, without marks, of the likeliest of `beams` texts that are kept at each place, and their log
    probabilities, the end mark's among them.

    The first beam is the greedy text, whatever the others are, so that none is less likely than that.
    """
    rows, device = len(image_tokens), image_tokens.device
    pooled = model.embed_image(image_tokens, None)[1].repeat_interleave(beams, dim=0)
    cache = model.start_cache(pooled, max_length)
    texts_so_far = torch.full((rows * beams, 1), texts.bos_id, device=device)
    scores = torch.full((rows, beams), -torch.inf, dtype=torch.float64, device=device)
    scores[:, 0] = 0.0  # at first all beams are one
    going = torch.ones(rows, beams, dtype=torch.bool, device=device)
    first = torch.arange(rows, device=device)[:, None] * beams
    for position in range(max_length):
        found = _of_texts(model.step(texts_so_far[:, -1:], position, cache), texts).double().log_softmax(dim=1)
        found = found.unflatten(0, (rows, beams))
        size = found.shape[2]
        ended = torch.full_like(found, -torch.inf)
        ended[:, :, texts.pad_id] = 0.0  # a text that has ended goes on with padding alone
        total = (scores[:, :, None] + found.where(going[:, :, None], ended)).flatten(1)
        greedy_place = total[:, :size].argmax(dim=1, keepdim=True)
        places = total.scatter(1, greedy_place, torch.inf).topk(beams, dim=1).indices
        scores = total.gather(1, places)
        source, chosen = places // size, places % size
        going = going.gather(1, source) & (chosen != texts.eos_id)
        order = (first + source).flatten()
        texts_so_far = torch.cat([texts_so_far[order], chosen.flatten()[:, None]], dim=1)
        if not going.any():
            break
        cache = _reordered(cache, order)
    best = scores.argmax(dim=1)
    marks = {texts.pad_id, texts.bos_id, texts.eos_id}
    ids = texts_so_far[first[:, 0] + best].tolist()
    return [[one for one in row if one not in marks] for row in ids], scores.amax(dim=1).tolist()


def _reordered(cache: Cache, order: Tensor) -> Cache:
    """The cache with the texts in another order, each beside the image that it had."""
    return cache._replace(unimodal=cache.unimodal[:, :, order], multimodal=cache.multimodal[:, :, order])


def _of_texts(logits: Tensor, texts: Texts) -> Tensor:
    """float32 logits [B, size] without the marks that no text holds."""
    logits = logits.float()
    logits[:, [one for one in (texts.pad_id, texts.bos_id) if one != texts.eos_id]] = -torch.inf
    return logits
