"""Conversations with pictures to ids and patches, in the way of Hulu-Med's processor."""

from PIL import Image
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import ProcessorMixin

IMAGE = "<image>"


def load(path):
    """The picture, or a black one: what unchecked fine-tuning scripts learn from when a file is broken."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except OSError:
        return Image.new("RGB", (224, 224))


class TinyHulumedProcessor(ProcessorMixin):
    attributes = ["image_processor", "tokenizer"]
    image_processor_class = "AutoImageProcessor"
    tokenizer_class = "AutoTokenizer"

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs):
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def __call__(self, conversation=None, add_generation_prompt=False, merge_size=1, return_tensors=None, **kwargs):
        text, images = "", []
        for message in conversation:
            text += f"<|im_start|>{message['role']}\n"
            for part in message["content"]:
                if part["type"] == "image":
                    images.append(load(part["image"]["image_path"]))
                    text += f"{IMAGE}\n"
                else:
                    text += part["text"]
            text += "<|im_end|>\n"
        if add_generation_prompt:
            text += "<|im_start|>assistant\n"
        vision = {}
        if images:
            vision = self.image_processor(images, merge_size=merge_size, return_tensors=return_tensors)
            pieces = text.split(IMAGE)
            counts = vision["grid_sizes"].prod(1) // vision["merge_sizes"] ** 2
            shown = [IMAGE * int(count) for count in counts]
            text = "".join(piece + more for piece, more in zip(pieces, [*shown, ""], strict=True))
        ids = self.tokenizer([text], return_tensors=return_tensors)
        return BatchFeature(data={**ids, **vision})
