"""A folder that is called like Hulu-Med: remote code from tests/tiny_hulumed, random weights, a small vocabulary.

The folder is written file by file, in a form that transformers 4.51 and 5 read alike.
"""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from scripts.busi.settings import PROMPT

CODE = Path(__file__).parent / "tiny_hulumed"
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>")
ANSWERS = ("Normal", "Benign", "Malignant")


def tiny_hulumed(folder: Path, seed: int = 0, corpus: Iterable[str] = (PROMPT, " ".join(ANSWERS)), **config) -> Path:
    """Write the model and its processor to `folder`; `config` overrides values of its config.json."""
    folder.mkdir(parents=True)
    for path in CODE.glob("*.py"):
        shutil.copy(path, folder)
    token = tokenizer(folder, corpus)
    write(
        folder / "config.json",
        {
            "model_type": "tiny_hulumed",
            "architectures": ["TinyHulumedForCausalLM"],
            "auto_map": {
                "AutoConfig": "configuration_tiny_hulumed.TinyHulumedConfig",
                "AutoModelForCausalLM": "modeling_tiny_hulumed.TinyHulumedForCausalLM",
            },
            "torch_dtype": "float32",
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "sliding_window": None,
            "max_position_embeddings": 4096,
            "rope_theta": 10000.0,
            "tie_word_embeddings": True,
            "initializer_range": 0.15,
            "vocab_size": len(token),
            "bos_token_id": token["<|endoftext|>"],
            "eos_token_id": token["<|im_end|>"],
            "pad_token_id": token["<|endoftext|>"],
            "image_token_index": token["<image>"],
            "use_token_compression": True,
            **config,
        },
    )
    ends = [token["<|im_end|>"], token["<|endoftext|>"]]
    write(folder / "generation_config.json", {"eos_token_id": ends, "pad_token_id": token["<|endoftext|>"]})
    auto_map = {
        "AutoProcessor": "processing_tiny_hulumed.TinyHulumedProcessor",
        "AutoImageProcessor": "image_processing_tiny_hulumed.TinyHulumedImageProcessor",
    }
    names = {"processor_class": "TinyHulumedProcessor", "auto_map": auto_map}
    write(folder / "processor_config.json", names)
    write(folder / "preprocessor_config.json", {**names, "image_processor_type": "TinyHulumedImageProcessor"})
    weights(folder, seed)
    return folder


def write(path: Path, value: dict) -> None:
    """A JSON file."""
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")


def tokenizer(folder: Path, corpus: Iterable[str]) -> dict[str, int]:
    """Write a byte-level tokenizer that was learnt from `corpus`; its {token: id}."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=list(SPECIAL), initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )  # fmt: skip
    made.train_from_iterator([text for text in corpus for _ in range(3)], trainer)
    made.save(str(folder / "tokenizer.json"))
    values = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": 4096,
        "clean_up_tokenization_spaces": False,
    }
    write(folder / "tokenizer_config.json", values)
    return made.get_vocab()


def weights(folder: Path, seed: int) -> None:
    """Write random weights; the global random state of torch stays as it was."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
