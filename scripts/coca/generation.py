"""Greedy captions of image tokens, with cached keys and values."""

import torch

from scripts.coca.texts import Texts


def greedy(model, image_tokens: torch.Tensor, mask: torch.Tensor | None, texts: Texts, max_length: int) -> list[str]:
    """The likeliest token after the likeliest token, per row until the end mark or `max_length` new tokens.

    Args:
        model: a CoCa in evaluation mode.
        image_tokens: float [B, N, image_dim], on the model's device.
        mask: bool [B, N], True for image tokens that are there; None: all.
    """
    return [texts.decode(row) for row in greedy_ids(model, image_tokens, mask, texts, max_length)]


@torch.inference_mode()
def greedy_ids(model, image_tokens, mask, texts: Texts, max_length: int) -> list[list[int]]:
    """The tokens of `greedy`, without marks."""
    rows = len(image_tokens)
    _, pooled = model.embed_image(image_tokens, mask)
    cache = model.start_cache(pooled, max_length)
    last = torch.full((rows, 1), texts.bos_id, device=image_tokens.device)
    going = torch.ones(rows, dtype=torch.bool, device=image_tokens.device)
    made = []
    for position in range(max_length):
        logits = model.step(last, position, cache).float()
        logits[:, [texts.pad_id, texts.bos_id]] = -torch.inf  # no text holds them
        chosen = logits.argmax(dim=1)
        going &= chosen != texts.eos_id
        if not going.any():
            break
        made.append(chosen.where(going, texts.pad_id))
        last = chosen[:, None]
    ids = torch.stack(made, dim=1).tolist() if made else [[] for _ in range(rows)]
    return [[one for one in row if one != texts.pad_id] for row in ids]
