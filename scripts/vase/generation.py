"""Answers of a vision-language model of Qwen's family: chats with pictures in, texts out, in batches."""

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from scripts.common import vlm
from scripts.common.artefacts import sha256_text
from scripts.common.errors import KilnError
from scripts.common.listed_images import open_listed
from scripts.vase.vqa_rows import IMAGE, VqaRow

FAMILY = vlm.family("qwen")


class Answer(NamedTuple):
    """A text, and how many tokens were written for it, the end token counted."""

    text: str
    tokens: int


class Sampling(NamedTuple):
    """How tokens are drawn; `top_k` 0 or below draws from all."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0


class _NumbersOnly(LogitsProcessor):
    """Stops where a greedy answer would silently be token 0."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if scores.isnan().any():
            raise KilnError("the model's logits are not numbers", "set precision to fp32 or bf16; look at the training")
        return scores


def load(folder: Path, device: torch.device, dtype: torch.dtype, max_pixels: int):
    """(model in evaluation mode on `device`, its processor with pictures capped at `max_pixels`)."""
    processor = FAMILY.load_processor(folder)
    cap_pixels(processor, max_pixels)
    model = FAMILY.load_model(folder, dtype=dtype, device_map={"": device})
    return model.eval(), processor


def free(device: torch.device) -> None:
    """Give back the memory of models that nothing refers to any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def cap_pixels(processor, max_pixels: int) -> None:
    """Lower the largest picture that the processor lets through to `max_pixels`; never raise it."""
    sizes = processor.image_processor
    most = min(sizes.size["longest_edge"], max_pixels)  # Qwen's names for pixels, not for edges
    sizes.size = {"longest_edge": most, "shortest_edge": min(sizes.size["shortest_edge"], most)}


def chat_of(row: VqaRow, system: str | None) -> list[dict[str, Any]]:
    """A row's turns in the form of a chat template; the system prompt gives way to the row's own."""
    chat = [{"role": "system", "content": system}] if system and row.turns[0][0] != "system" else []
    for role, text in row.turns:
        if role != "user":
            chat.append({"role": role, "content": text})
            continue
        content: list[dict[str, str]] = []
        for number, part in enumerate(text.split(IMAGE)):
            content += [{"type": "image"}] if number else []
            content += [{"type": "text", "text": part}] if part else []
        chat.append({"role": role, "content": content})
    return chat


def encode(processor, folder: Path, rows: Sequence[VqaRow], system: str | None, config) -> dict[str, Any]:
    """Left-padded prompts of `rows` up to the assistant's header: ids and mask [B, T] int64, pictures concatenated.

    Raises:
        KilnError: an image is gone or unreadable; it is never replaced by another.
    """
    chats = [processor.apply_chat_template(chat_of(row, system), add_generation_prompt=True) for row in rows]
    pictures = [[open_listed(folder / path, None) for path in row.images] for row in rows]
    made = processor(text=chats, images=pictures, padding=True, padding_side="left", return_tensors="pt")
    vision = {name: made[name] for name in ("pixel_values", "image_grid_thw")}
    ids = made["input_ids"]
    return {"input_ids": ids, "attention_mask": made["attention_mask"], **FAMILY.inputs(config, ids, vision)}


def batch_seed(seed: int, *parts: str) -> int:
    """A seed from 0 to 2**63 - 1 for what `parts` name."""
    return int(sha256_text(str(seed), *parts)[:16], 16) >> 1


def configuration(stored: GenerationConfig, tokenizer, max_new_tokens: int, sampling: Sampling | None):
    """How to write: of the stored configuration only the tokens count, never how it samples or penalises."""
    how = {"do_sample": False}
    if sampling:
        how = {"do_sample": True, **sampling._asdict(), "top_k": max(0, sampling.top_k)}
    end = stored.eos_token_id if stored.eos_token_id is not None else tokenizer.eos_token_id
    pad = stored.pad_token_id if stored.pad_token_id is not None else tokenizer.pad_token_id
    return GenerationConfig(
        **how, num_beams=1, max_new_tokens=max_new_tokens, bos_token_id=stored.bos_token_id, eos_token_id=end,
        pad_token_id=pad, suppress_tokens=stored.suppress_tokens,
    )  # fmt: skip


@torch.inference_mode()
def generate(
    model,
    processor,
    folder: Path,
    rows: Sequence[VqaRow],
    *,
    max_new_tokens: int,
    system: str | None = None,
    sampling: Sampling | None = None,
    seed: int = 0,
) -> list[Answer]:
    """One answer to each row, all in one batch.

    Args:
        folder: images folder.
        system: system prompt; None: the chat template's own.
        sampling: None always takes the likeliest token.
        seed: of the tokens that are drawn; torch's own random state stays as it is.

    Raises:
        KilnError: an image cannot be read, memory is full, or logits are not numbers.
    """
    batch = vlm.to_device(encode(processor, folder, rows, system, model.config), model.device)
    tokenizer = processor.tokenizer
    wanted = configuration(model.generation_config, tokenizer, max_new_tokens, sampling)
    length = batch["input_ids"].shape[1]
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices), vlm.generating(model, wanted):
            torch.manual_seed(seed)
            guard = LogitsProcessorList([_NumbersOnly()])
            made = model.generate(**batch, generation_config=wanted, logits_processor=guard)[:, length:]
    except torch.OutOfMemoryError as error:
        raise KilnError(
            f"out of memory with {len(rows)} prompts of {length} tokens: {str(error)[:200]}",
            "lower vase.predict.batch_size or vase.vlm.max_pixels",
        ) from error
    ends = wanted.eos_token_id if isinstance(wanted.eos_token_id, list) else [wanted.eos_token_id]
    return [_answer(ids, ends, tokenizer) for ids in made.tolist()]


def _answer(ids: list[int], ends: Sequence[int], tokenizer) -> Answer:
    count = next((number for number, token in enumerate(ids, start=1) if token in ends), len(ids))
    return Answer(tokenizer.decode(ids[:count], skip_special_tokens=True).strip(), count)
