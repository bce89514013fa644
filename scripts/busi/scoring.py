"""What a model says of an image: the likelihood of each possible answer, and the text that it would write.

No sampling. Image and prompt are encoded once for all answers: their keys and values are repeated, and only the
answers' own tokens run through the model again.
"""

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from scripts.common.vlm import Family, answer_ids, generating


def encode_answers(tokenizer, answers: Sequence[str]) -> list[torch.Tensor]:
    """Ids [T_a] of each answer with its end token."""
    return [answer_ids(tokenizer, answer) for answer in answers]


@torch.inference_mode()
def log_likelihoods(model, family: Family, batch: dict[str, Any], answers: Sequence[torch.Tensor]) -> torch.Tensor:
    """Sums of token log-likelihoods [B, answers] float64, end token included, given image and prompt.

    Args:
        batch: left-padded prompts, from `Family.collate`, without labels, on the model's device.
        answers: from `encode_answers`.
    """
    mask = batch["attention_mask"]
    device, rows, kinds = mask.device, len(mask), len(answers)
    prefix = model(**batch, use_cache=True)
    first = prefix.logits[:, -1].double().log_softmax(-1)  # [B, V]
    ids = pad_sequence(list(answers), True, 0).to(device)  # [A, K]
    known = pad_sequence([torch.ones_like(a) for a in answers], True, 0).to(device)  # [A, K]
    start = first[:, ids[:, 0]]  # [B, A]
    cache = prefix.past_key_values
    cache.batch_repeat_interleave(kinds)
    tokens = ids[:, :-1].repeat(rows, 1)  # [B * A, K - 1]
    seen = torch.cat([mask.repeat_interleave(kinds, 0), known[:, :-1].repeat(rows, 1)], 1)
    lengths = mask.sum(1)
    positions = family.positions_after(model, lengths, tokens.shape[1]).repeat_interleave(kinds, -2)
    logits = model(
        input_ids=tokens, attention_mask=seen, position_ids=positions, past_key_values=cache, use_cache=True
    ).logits  # fmt: skip
    following = ids[:, 1:].repeat(rows, 1)[..., None]
    later = logits.double().log_softmax(-1).gather(-1, following)[..., 0] * known[:, 1:].repeat(rows, 1)
    return start.cpu() + later.sum(1).view(rows, kinds).cpu()


def normalise(logliks: torch.Tensor, answers: Sequence[torch.Tensor], how: str) -> torch.Tensor:
    """Scores [B, A]: the sums as they are, or over the answers' numbers of tokens (`mean`)."""
    if how == "sum":
        return logliks
    return logliks / torch.tensor([len(a) for a in answers], dtype=logliks.dtype)


@torch.inference_mode()
def greedy_texts(model, batch: dict[str, Any], tokenizer, max_new_tokens: int) -> list[str]:
    """What the model writes after each left-padded prompt when it always takes the likeliest token."""
    from transformers import GenerationConfig

    stored = model.generation_config
    # the stored configuration may sample; only its tokens are taken over
    greedy = GenerationConfig(
        do_sample=False, num_beams=1, max_new_tokens=max_new_tokens, bos_token_id=stored.bos_token_id,
        eos_token_id=stored.eos_token_id, pad_token_id=stored.pad_token_id or tokenizer.pad_token_id,
        suppress_tokens=stored.suppress_tokens,
    )  # fmt: skip
    with generating(model, greedy):
        made = model.generate(**batch, generation_config=greedy)
    length = batch["input_ids"].shape[1]
    # remote code that feeds embeddings returns the new tokens alone
    new = made[:, length:] if made.shape[1] > length and torch.equal(made[:, :length], batch["input_ids"]) else made
    return [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]


def parse_answer(text: str, answers: Sequence[str]) -> int | None:
    """The class that a text names: the answer alone, in any letter case, a full stop allowed; else None."""
    plain = re.sub(r"\s+", " ", text).strip().rstrip(".").casefold()
    for number, answer in enumerate(answers):
        if plain == answer.casefold():
            return number
    return None
