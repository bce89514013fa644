"""A chat template of ms-swift that asks the tokenizer for the number of its image token."""

from swift.template.templates.qwen import Qwen2VLTemplate


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
