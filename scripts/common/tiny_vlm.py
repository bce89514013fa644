"""A tiny Qwen2.5-VL with random weights: the real classes, processor and chat template, a small vocabulary.

What trains and reads Qwen2.5-VL takes it unchanged, and a step takes milliseconds. The demo pre-trains it; tests
use it as it is. Qwen2.5-VL's own 151,665 tokens would cost ten times the time of a training step.
"""

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

END, PAD, IMAGE = "<|im_end|>", "<|endoftext|>", "<|image_pad|>"
SPECIAL = (
    PAD,
    "<|im_start|>",
    END,
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    IMAGE,
    "<|video_pad|>",
)
# Qwen2.5-VL's, without its numbering of several pictures
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' or 'video' in content %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build(
    folder: Path,
    corpus: Iterable[str],
    *,
    seed: int = 0,
    hidden: int = 64,
    layers: int = 2,
    vision_hidden: int = 64,
    vision_depth: int = 2,
    image_side: int = 84,
    vocabulary: int = 1024,
) -> tuple[Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor]:
    """Make the model and its processor, and save both to `folder`.

    Args:
        folder: made if missing; `AutoProcessor` and `AutoModelForImageTextToText` load it offline.
        corpus: texts that the tokens are made of; every other text costs about one token per byte.
        seed: of the weights; the global random state of torch stays as it was.
        hidden: width of the language model (4 heads, 2 of them for keys and values), a multiple of 64: bitsandbytes'
            4-bit blocks hold 64 weights. So is `vision_hidden`.
        image_side: pixels, a multiple of 14; pictures are scaled to about its square, in about their own proportions,
            by Qwen's rule: both sides become multiples of 28.
        vocabulary: most tokens, the special ones not counted; a small corpus makes fewer.

    Returns:
        The model (float32, in evaluation mode) and the processor.

    Raises:
        ValueError: a size that is no such multiple.
    """
    for name, value, unit in (
        ("hidden", hidden, 64),
        ("vision_hidden", vision_hidden, 64),
        ("image_side", image_side, 14),
    ):
        if value <= 0 or value % unit:
            raise ValueError(f"{name} = {value}: expected a multiple of {unit}")
    tokenizer = make_tokenizer(corpus, vocabulary)
    pixels = {"min_pixels": image_side**2, "max_pixels": image_side**2}
    processor = Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(**pixels),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(**pixels),
        chat_template=CHAT_TEMPLATE,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2_5_VLForConditionalGeneration(_config(tokenizer, hidden, layers, vision_hidden, vision_depth))
    model.generation_config = _generation_config(tokenizer)
    save(folder, model.eval(), processor)
    return model, processor


def make_tokenizer(corpus: Iterable[str], vocabulary: int) -> Qwen2Tokenizer:
    """Qwen's tokenizer with byte-level merges that were learnt from `corpus`, and Qwen's special tokens."""
    # an untrained tokenizer of Qwen's class lends its normaliser, its splitting into words and its decoder
    trained = Tokenizer.from_str(Qwen2Tokenizer().backend_tokenizer.to_str())
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, initial_alphabet=alphabet, show_progress=False)
    trained.train_from_iterator(corpus, trainer)
    learnt = json.loads(trained.to_str())["model"]
    return Qwen2Tokenizer(
        vocab=learnt["vocab"],
        merges=[tuple(pair) for pair in learnt["merges"]],
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=list(SPECIAL),
        model_max_length=4096,
    )


def _config(tokenizer, hidden: int, layers: int, vision_hidden: int, vision_depth: int) -> Qwen2_5_VLConfig:
    token = tokenizer.convert_tokens_to_ids
    heads = 4
    pairs = hidden // heads // 2  # of rotated numbers in a head, shared out to time, height and width
    sections = [pairs - 2 * (3 * pairs // 8), 3 * pairs // 8, 3 * pairs // 8]
    spread = 0.05  # Qwen's 0.02 suits its width of thousands
    return Qwen2_5_VLConfig(
        text_config={
            "hidden_size": hidden,
            "intermediate_size": 2 * hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": 2,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 4096,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": sections},
            "tie_word_embeddings": True,
            "initializer_range": spread,
            "bos_token_id": token(PAD),
            "eos_token_id": token(END),
            "pad_token_id": token(PAD),
        },
        vision_config={
            "depth": vision_depth,
            "hidden_size": vision_hidden,
            "num_heads": 4,
            "intermediate_size": 2 * vision_hidden,
            "out_hidden_size": hidden,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 112,
            "fullatt_block_indexes": [vision_depth - 1],
            "initializer_range": spread,
        },
        image_token_id=token(IMAGE),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=True,
        initializer_range=spread,
    )


def _generation_config(tokenizer) -> GenerationConfig:
    token = tokenizer.convert_tokens_to_ids
    return GenerationConfig(
        bos_token_id=token(PAD),
        eos_token_id=[token(END), token(PAD)],
        pad_token_id=token(PAD),
        do_sample=True,
        temperature=1.0,
        # one token in a few hundred is a picture's: sampled once, it has no picture to stand for and ends the run
        suppress_tokens=[token(name) for name in SPECIAL if name not in (END, PAD)],
    )


def save(folder: Path, model, processor) -> None:
    """Write what `from_pretrained` loads; equal weights give equal bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    processor.save_pretrained(folder)
    model.save_pretrained(folder)
