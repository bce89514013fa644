"""Vision-language models behind one small interface: an image and a prompt in, a batch for `forward` out.

Two families differ in how pictures are handed over. Qwen2.5-VL and Qwen3-VL (transformers' own classes) take
`pixel_values` [patches, D] with `image_grid_thw` [images, 3]; Hulu-Med (its own remote code, see `hulumed`) takes
`pixel_values` [patches, 588] with `grid_sizes` [images, 3], `merge_sizes` [images] and the list `modals`. In
both, the pictures of a batch are concatenated on dimension 0, never stacked.
"""

import abc
import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from scripts.common.errors import KilnError
from scripts.common.listed_images import open_listed

IGNORED = -100
END = "<|im_end|>"


@dataclasses.dataclass(frozen=True)
class Example:
    """One image with a prompt and, when it teaches, the answer.

    Attributes:
        input_ids: [T] int64, the prompt up to the assistant's header, then the answer with its end token.
        labels: [T] int64, `IGNORED` but on the answer and its end token.
        vision: the family's tensors of this image, to be concatenated on dimension 0.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    vision: dict[str, torch.Tensor]


class Family(abc.ABC):
    """What the pipelines need to know of a family of models.

    Attributes:
        frozen: parts of module names that belong to the vision encoder or the projector, never to the language
            model.
        projector: name of the module between vision encoder and language model.
        code: pattern of files that a model's folder must hold beside weights and processor.
    """

    frozen: tuple[str, ...]
    projector: str
    code: str | None = None

    @abc.abstractmethod
    def load_model(self, folder: Path, **options: Any):
        """The model in `folder`; `options` go to `from_pretrained` (dtype, quantization_config, device_map)."""

    @abc.abstractmethod
    def load_processor(self, folder: Path):
        """The processor in `folder`; its `tokenizer` is the model's."""

    @abc.abstractmethod
    def prompt(self, processor, image: Path, text: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Ids [T] of a user's turn with image and text, up to the assistant's header, and the image's tensors.

        Raises:
            KilnError: the image is gone or unreadable; it is never replaced by another.
        """

    @abc.abstractmethod
    def inputs(self, config, input_ids: torch.Tensor, vision: dict[str, torch.Tensor]) -> dict[str, Any]:
        """What `forward` of a model with `config` needs for ids [B, T] and concatenated vision tensors."""

    @abc.abstractmethod
    def positions_after(self, model, lengths: torch.Tensor, count: int) -> torch.Tensor:
        """Position ids of `count` tokens after the prompts of the last `forward`, of `lengths` [B] tokens each."""

    def example(self, processor, image: Path, text: str, answer: str | None = None) -> Example:
        """The example of an image, a prompt and, when given, the answer that is to be learned."""
        ids, vision = self.prompt(processor, image, text)
        taught = answer_ids(processor.tokenizer, answer) if answer is not None else ids.new_empty(0)
        labels = torch.cat([torch.full_like(ids, IGNORED), taught])
        return Example(torch.cat([ids, taught]), labels, vision)

    def collate(self, config, examples: Sequence[Example], pad_id: int, side: str = "right") -> dict[str, Any]:
        """One batch: ids, mask and labels padded on `side`, pictures concatenated on dimension 0.

        The mask follows from lengths: a token that happens to have the padding's id is not masked.
        """
        ids = pad_sequence([e.input_ids for e in examples], True, pad_id, side)
        labels = pad_sequence([e.labels for e in examples], True, IGNORED, side)
        mask = pad_sequence([torch.ones_like(e.input_ids) for e in examples], True, 0, side)
        vision = {name: torch.cat([e.vision[name] for e in examples]) for name in examples[0].vision}
        return {"input_ids": ids, "attention_mask": mask, "labels": labels, **self.inputs(config, ids, vision)}


class Qwen(Family):
    """Qwen2.5-VL and Qwen3-VL, by transformers' own classes."""

    frozen = ("visual",)
    projector = "visual.merger"

    def load_model(self, folder: Path, **options: Any):
        from transformers import AutoModelForImageTextToText
        from transformers.utils import logging

        logging.disable_progress_bar()  # it fills a log file
        return AutoModelForImageTextToText.from_pretrained(folder, **options)

    def load_processor(self, folder: Path):
        from transformers import AutoProcessor

        return AutoProcessor.from_pretrained(folder)

    def prompt(self, processor, image: Path, text: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        content = [{"type": "image"}, {"type": "text", "text": text}]
        chat = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        made = processor(text=[chat], images=[open_listed(image, None)], return_tensors="pt")
        return made["input_ids"][0], {name: made[name] for name in ("pixel_values", "image_grid_thw")}

    def inputs(self, config, input_ids: torch.Tensor, vision: dict[str, torch.Tensor]) -> dict[str, Any]:
        return {**vision, "mm_token_type_ids": (input_ids == config.image_token_id).long()}

    def positions_after(self, model, lengths: torch.Tensor, count: int) -> torch.Tensor:
        # the model's own counter of how far its 3-D positions lag behind the number of tokens
        start = lengths[:, None] + inner(model).rope_deltas.to(lengths.device)
        return (start + torch.arange(count, device=lengths.device)).expand(3, -1, -1)


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """A batch with its tensors on `device`."""
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


@contextlib.contextmanager
def generating(model, wanted) -> Iterator[None]:
    """While the block runs, `model` generates by the configuration `wanted` alone.

    transformers fills what a given configuration leaves open from the model's own, such as Qwen's repetition penalty.
    """
    stored = model.generation_config
    model.generation_config = wanted
    try:
        yield
    finally:
        model.generation_config = stored


def inner(model):
    """The multimodal model below adapters and language-model head."""
    return (model.get_base_model() if hasattr(model, "get_base_model") else model).model


def answer_ids(tokenizer, answer: str) -> torch.Tensor:
    """Ids [T] int64 of an answer with its end token, as they follow the assistant's header.

    Raises:
        KilnError: the answer is empty, or the tokenizer has no end token of that name.
    """
    end = tokenizer.convert_tokens_to_ids(END)
    ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
    if not ids or end is None or end == tokenizer.unk_token_id:
        raise KilnError(
            f"answer {answer!r} gives {len(ids)} tokens, and {END} has id {end}",
            "give an answer of at least one token, and a model of the Qwen chat form",
        )
    return torch.tensor([*ids, end])


def family(name: str, code_sha256: str | None = None) -> Family:
    """The family of that name; `code_sha256` is what the remote code of `hulumed` must have.

    Raises:
        ValueError: an unknown name.
    """
    if name == "qwen":
        return Qwen()
    if name == "hulumed":
        from scripts.common.hulumed import HuluMed

        return HuluMed(code_sha256)
    raise ValueError(f"unknown family {name!r}")
