"""ms-swift's chat templates: one that asks the tokenizer for the number of its image token, and lengths of answers."""

from collections.abc import Sequence
from pathlib import Path

from swift.template import TEMPLATE_MAPPING
from swift.template.templates.qwen import Qwen2VLTemplate
from transformers import AutoTokenizer


def take_image_tokens_from_tokenizer() -> None:
    """ms-swift counts on Qwen's own numbers of the image and video tokens; a smaller vocabulary has others."""
    original = Qwen2VLTemplate.init_processor
    if getattr(original, "_kiln", False):
        return

    def init_processor(self, processor):
        original(self, processor)
        if processor is not None:
            tokenizer = getattr(processor, "tokenizer", processor)
            self.image_token_id = tokenizer.convert_tokens_to_ids("<|image_pad|>")
            self.video_token_id = tokenizer.convert_tokens_to_ids("<|video_pad|>")

    init_processor._kiln = True
    Qwen2VLTemplate.init_processor = init_processor


def answer_tokens(model: Path, template: str, answers: Sequence[str]) -> list[list[int | str]]:
    """What is learned of each answer: its tokens, and those that end the turn in ms-swift's `template`."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    parts = TEMPLATE_MAPPING[template].suffix  # texts, and lists of names of single tokens
    ends = [token for part in parts for token in (part if isinstance(part, list) else _ids(tokenizer, part))]
    return [_ids(tokenizer, answer) + ends for answer in answers]


def _ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]
