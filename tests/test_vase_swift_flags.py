"""From settings to ms-swift's command lines: the published values, and what is refused before anything runs."""

from pathlib import Path

import pytest
from pydantic import ValidationError
from vase_fixtures import ROOT

from scripts import config
from scripts.common import artefacts
from scripts.common.errors import KilnError
from scripts.vase import export_megatron, swift_flags, swift_training
from scripts.vase.settings import GrpoSettings, MegatronSettings, RewardSettings, SftSettings, VaseSettings, VlmSettings

PLACES = {"model": Path("m"), "train": Path("t.jsonl"), "validation": Path("v.jsonl"), "output": Path("o")}


def flags(values, **changes) -> dict:
    given = {**PLACES, "precision": "bf16", "on_cpu": False, "processes": 1, "resumed": None, **changes}
    return swift_flags.training_flags(values, VlmSettings(), **given)


def test_the_published_sft_script():
    found = flags(SftSettings())
    published = {
        "tuner_type": "lora", "torch_dtype": "bfloat16", "num_train_epochs": 2, "per_device_train_batch_size": 1,
        "per_device_eval_batch_size": 1, "learning_rate": 1e-4, "lora_rank": 8, "lora_alpha": 32,
        "target_modules": ("all-linear",), "freeze_vit": True, "gradient_accumulation_steps": 16, "eval_steps": 100,
        "save_steps": 100, "max_length": 4096, "warmup_ratio": 0.05, "dataloader_num_workers": 4,
        "dataset_num_proc": 4,
    }  # fmt: skip
    assert {name: found[name] for name in published} == published
    assert SftSettings().save_total_limit == 5 and SftSettings().logging_steps == 5
    assert VlmSettings().max_pixels == 1280 * 28 * 28


def test_the_published_grpo_script():
    values = GrpoSettings()
    found = flags(values) | swift_flags.reward_flags(values, RewardSettings(), Path("prompt.txt"))
    published = {
        "rlhf_type": "grpo", "tuner_type": "full", "torch_dtype": "bfloat16", "max_completion_length": 256,
        "num_train_epochs": 1, "per_device_train_batch_size": 1, "learning_rate": 1e-6,
        "gradient_accumulation_steps": 4, "eval_strategy": "steps", "eval_steps": 1000, "save_strategy": "steps",
        "save_steps": 300, "warmup_ratio": 0.01, "dataloader_num_workers": 1, "num_generations": 4,
        "temperature": 1.0, "log_completions": True, "num_iterations": 1, "async_generate": False, "beta": 0.001,
        "system": Path("prompt.txt"), "gradient_checkpointing": False,
    }  # fmt: skip
    assert {name: found[name] for name in published} == published
    assert found["reward_funcs"][0] == "external_vase_acc"
    assert "lora_rank" not in found
    assert values.save_total_limit == 10 and values.logging_steps == 1
    assert found["per_device_eval_batch_size"] % values.generations == 0
    assert found["num_generations_eval"] == values.generations
    fewer = GrpoSettings(eval_generations=3, eval_batch_size=8)
    found = swift_flags.reward_flags(fewer, RewardSettings(), None)
    assert (found["num_generations_eval"], found["per_device_eval_batch_size"]) == (3, 9)
    eight = flags(values, processes=8)
    assert eight["ddp_find_unused_parameters"] is False and eight["ddp_backend"] is None


def test_a_command_line():
    made = swift_flags.as_arguments({"a": 1, "b": None, "c": True, "d": ("x", "y"), "e": Path("p q"), "f": False})
    assert made == ["--a", "1", "--c", "true", "--d", "x", "y", "--e", "p q", "--f", "false"]


@pytest.mark.parametrize("flag", ["--train_type", "--train_type=lora", "--sft_type"])
def test_a_flag_of_an_older_ms_swift_is_refused_with_its_new_name(flag):
    with pytest.raises(ValidationError, match="--tuner_type"):
        SftSettings(extra_args=(flag, "lora"))
    with pytest.raises(KilnError, match=r"vase\.grpo.*--tuner_type"):
        config.load({"vase": {"grpo": {"extra_args": [flag, "lora"]}}}, Path("none.yaml"))


def test_a_flag_that_is_set_already_is_refused():
    with pytest.raises(KilnError, match="vase.sft.extra_args holds --learning_rate") as error:
        swift_flags.with_extra(flags(SftSettings()), ("--learning_rate", "1e-3"), "vase.sft")
    assert "default.yaml" in error.value.hint
    made = swift_flags.with_extra(flags(SftSettings()), ("--neftune_noise_alpha", "5"), "vase.sft")
    assert made[-2:] == ["--neftune_noise_alpha", "5"]


def test_groups_must_be_whole_and_checkpoints_validated():
    with pytest.raises(ValidationError, match="must be a multiple of generations = 8"):
        GrpoSettings(generations=8)
    with pytest.raises(ValidationError, match="save_steps 50 must be a multiple of eval_steps 100"):
        SftSettings(save_steps=50)


@pytest.mark.parametrize(
    ("found", "least", "most"),
    [
        ({"size": {"shortest_edge": 3136, "longest_edge": 12845056}}, 4, 1280),  # capped by max_pixels
        ({"min_pixels": 3136, "max_pixels": 784 * 100}, 4, 100),
        ({"image_processor": {"size": {"shortest_edge": 12544, "longest_edge": 12544}}}, 16, 16),
        ({}, 4, 1280),
    ],
)
def test_pictures_have_the_size_that_the_models_processor_gives_them(tmp_path, found, least, most):
    artefacts.write_json(tmp_path / "preprocessor_config.json", found)
    made = swift_flags.image_tokens(tmp_path, VlmSettings())
    assert made == {"IMAGE_MIN_TOKEN_NUM": str(least), "IMAGE_MAX_TOKEN_NUM": str(most)}


def test_the_megatron_export_is_the_command_that_its_documentation_gives():
    values = export_megatron.ExportSettings(megatron=MegatronSettings(tensor_parallel=2))
    made = export_megatron.command(Path("model"), Path("out"), values)
    line = " ".join(made[1:])
    assert line.startswith("-m swift.cli._megatron.main export --model model")
    assert "--to_mcore true" in line and "--test_convert_precision true" in line
    assert "--tensor_model_parallel_size 2" in line


def test_the_megatron_export_refuses_where_it_cannot_work(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(KilnError, match=r"needs 1 GPU\(s\), this process sees 0"):
        export_megatron.require_megatron(1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    with pytest.raises(KilnError, match="megatron-core, mcore-bridge, transformer-engine") as error:
        export_megatron.require_megatron(1)
    assert "pip install" in error.value.hint


def test_the_default_configuration_names_every_published_value():
    text = (ROOT / "config/default.yaml").read_text()
    assert "qwen2.5-vl-7b-instruct" in text and VaseSettings().grpo.tuner.tuner == "full"


@pytest.mark.parametrize(
    ("error", "said", "hint"),
    [
        (OSError(28, "No space left on device"), "the disk is full", "free space"),
        (
            RuntimeError("[enforce fail] . PytorchStreamWriter failed writing file data/3"),
            "the disk is full",
            "results",
        ),
        (
            ValueError("Error while serializing: I/O error: No space left on device (os error 28)"),
            "the disk is full",
            "",
        ),
        (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"), "out of memory: CUDA", "max_pixels"),
        (MemoryError("Unable to allocate 8 GiB"), "out of memory", "vase.sft.batch_size"),
        (RuntimeError("size mismatch for q_proj"), "adapter and base do not fit", "base it was made for"),
    ],
)
def test_what_users_can_mend_is_said(tmp_path, error, said, hint):
    with pytest.raises(KilnError, match=said) as found, swift_training.explained("vase.sft", tmp_path / "state"):
        raise error
    assert hint in found.value.hint


def test_other_errors_keep_their_traceback(tmp_path):
    for error in (ValueError("something else"), FileNotFoundError(2, "No such file")):
        with pytest.raises(type(error)) as found, swift_training.explained("vase.sft", tmp_path):
            raise error
        assert found.value is error
