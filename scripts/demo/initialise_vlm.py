"""Make a Qwen2.5-VL of a published size with random weights: shapes, memory and speed as of the real one, no download.

Rule `demo_initialise_vlm`, for config/smoke.yaml. The real classes of transformers, in bfloat16. The tokenizer's words
are learnt from a few texts, and as many unused ones follow as bring the special tokens to Qwen's own numbers. Equal
settings give equal bytes.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import (
    GenerationConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from scripts.common import artefacts, step, tiny_vlm
from scripts.demo.settings import DemoVlmSettings, PublishedVlmSettings

SPARE = 421  # of Qwen's 152,064 rows, those from its first special token on
PIXELS = {"min_pixels": 56 * 56, "max_pixels": 12845056}  # of Qwen's preprocessor_config.json
FULL_ATTENTION = 8  # every so many vision blocks, one looks beyond its window


def config(values: PublishedVlmSettings) -> Qwen2_5_VLConfig:
    """The configuration, with Qwen's numbering of special tokens for a vocabulary of Qwen's size."""
    first = values.vocabulary - SPARE
    token = {name: first + i for i, name in enumerate(tiny_vlm.SPECIAL)}
    pairs = values.hidden // values.heads // 2  # of rotated numbers in a head, shared out to time, height and width
    sections = [pairs - 2 * (3 * pairs // 8), 3 * pairs // 8, 3 * pairs // 8]
    return Qwen2_5_VLConfig(
        text_config={
            "hidden_size": values.hidden,
            "intermediate_size": values.mlp,
            "num_hidden_layers": values.layers,
            "num_attention_heads": values.heads,
            "num_key_value_heads": values.kv_heads,
            "vocab_size": values.vocabulary,
            "max_position_embeddings": 128000,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections},
            "tie_word_embeddings": values.tied,
            "bos_token_id": token[tiny_vlm.PAD],
            "eos_token_id": token[tiny_vlm.END],
            "pad_token_id": token[tiny_vlm.PAD],
        },
        vision_config={
            "depth": values.vision_depth,
            "hidden_size": values.vision_hidden,
            "num_heads": values.vision_heads,
            "intermediate_size": values.vision_mlp,
            "out_hidden_size": values.hidden,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 112,
            "fullatt_block_indexes": list(range(FULL_ATTENTION - 1, values.vision_depth, FULL_ATTENTION)),
        },
        image_token_id=token[tiny_vlm.IMAGE],
        video_token_id=token["<|video_pad|>"],
        vision_start_token_id=token["<|vision_start|>"],
        vision_end_token_id=token["<|vision_end|>"],
        tie_word_embeddings=values.tied,
    )


def build(values: PublishedVlmSettings, dtype: torch.dtype = torch.bfloat16) -> Qwen2_5_VLForConditionalGeneration:
    """The model with random weights, on torch's default device; torch's global state stays as it was."""
    before = torch.get_default_dtype()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(values.seed)
        torch.set_default_dtype(dtype)
        try:
            return Qwen2_5_VLForConditionalGeneration(config(values)).eval()
        finally:
            torch.set_default_dtype(before)


def tokenizer(values: PublishedVlmSettings) -> Qwen2Tokenizer:
    """A tokenizer whose special tokens have the numbers that `config` gives them."""
    words = DemoVlmSettings()
    learnt = tiny_vlm.make_tokenizer([*words.texts, *words.words], (values.vocabulary - SPARE) // 2)
    model = json.loads(learnt.backend_tokenizer.to_str())["model"]
    vocabulary = {word: number for word, number in model["vocab"].items() if word not in tiny_vlm.SPECIAL}
    first = values.vocabulary - SPARE
    vocabulary |= {f"unused{number}": number for number in range(len(vocabulary), first)}
    vocabulary |= {name: first + i for i, name in enumerate(tiny_vlm.SPECIAL)}  # else numbered as they come below
    return Qwen2Tokenizer(
        vocab=vocabulary,
        merges=[tuple(pair) for pair in model["merges"]],
        eos_token=tiny_vlm.END,
        pad_token=tiny_vlm.PAD,
        additional_special_tokens=list(tiny_vlm.SPECIAL),
        model_max_length=4096,
    )


def processor(values: PublishedVlmSettings) -> Qwen2_5_VLProcessor:
    """Pictures in Qwen's sizes, its chat, and `tokenizer`."""
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(**PIXELS),
        tokenizer=tokenizer(values),
        video_processor=Qwen2VLVideoProcessor(**PIXELS),
        chat_template=tiny_vlm.CHAT_TEMPLATE,
    )


def main(argv: Sequence[str] | None = None) -> None:
    made = step.parser(__doc__, PublishedVlmSettings)
    made.add_argument("--output-folder", type=Path, required=True, help="folder of the model, to make or replace")
    args = made.parse_args(argv)
    values = step.read_settings(args)
    record = step.record(args, "scripts.demo.initialise_vlm", values, {})
    torch.set_num_threads(step.threads(args))
    folder = args.output_folder
    with artefacts.atomic_folder(folder) as temporary:
        reader, model = processor(values), build(values)
        token = reader.tokenizer.convert_tokens_to_ids
        model.generation_config = GenerationConfig(
            bos_token_id=token(tiny_vlm.PAD),
            eos_token_id=[token(tiny_vlm.END), token(tiny_vlm.PAD)],
            pad_token_id=token(tiny_vlm.PAD),
            do_sample=True,
            # a picture's token that is sampled has no picture to stand for, and ends the run
            suppress_tokens=[token(name) for name in tiny_vlm.SPECIAL if name not in (tiny_vlm.END, tiny_vlm.PAD)],
        )
        tiny_vlm.save(temporary, model, reader)
        names = [path.name for path in artefacts.write_listing(temporary)]
    record.write(args.meta, [folder / name for name in [*names, "files.json"]])


if __name__ == "__main__":
    step.run(main)
