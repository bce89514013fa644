"""From settings to the flags and the environment of `swift sft`, `swift rlhf` and `swift export` (ms-swift 4)."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scripts.common import artefacts
from scripts.common.errors import KilnError
from scripts.vase.settings import GrpoSettings, RewardSettings, SftSettings, TunerSettings, VlmSettings

REWARDS = ("external_vase_acc", "external_vase_format")
CALLBACKS = ("kiln_checkpoints", "kiln_log")
_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def as_arguments(flags: Mapping[str, Any]) -> list[str]:
    """`{"lora_rank": 8, "eval": None, "callbacks": ("a", "b")}` as a command line; None is left out."""
    made: list[str] = []
    for name, value in flags.items():
        if value is None:
            continue
        values = value if isinstance(value, tuple | list) else (value,)
        made += [f"--{name}", *(str(v).lower() if isinstance(v, bool) else str(v) for v in values)]
    return made


def image_tokens(folder: Path, vlm: VlmSettings) -> dict[str, str]:
    """Environment that gives ms-swift's picture reader the limits of the model's processor, capped by `max_pixels`.

    Raises:
        KilnError: the folder has no processor.
    """
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        path = folder / "processor_config.json"
    if not path.is_file():
        raise KilnError(
            f"{folder}: no processor (preprocessor_config.json or processor_config.json)",
            "copy the processor's files of the published model beside the weights",
        )
    found = artefacts.read_json(path)
    found = found.get("image_processor", found)
    size = found.get("size") or {}
    least = size.get("shortest_edge") or found.get("min_pixels") or 4 * 28 * 28
    most = size.get("longest_edge") or found.get("max_pixels") or vlm.max_pixels
    area = (found.get("patch_size", 14) * found.get("merge_size", 2)) ** 2
    most = min(most, vlm.max_pixels)
    return {"IMAGE_MIN_TOKEN_NUM": str(max(1, min(least, most) // area)), "IMAGE_MAX_TOKEN_NUM": str(most // area)}


def with_extra(flags: Mapping[str, Any], extra: Sequence[str], section: str) -> list[str]:
    """The command line of `flags` and a user's further arguments.

    Raises:
        KilnError: the user gives a flag that is set already.
    """
    doubled = [one for one in extra if one.startswith("--") and one.removeprefix("--").partition("=")[0] in flags]
    if doubled:
        raise KilnError(
            f"{section}.extra_args holds {doubled[0]}, which is set already",
            f"use the key of section {section}, vase.vlm or vase.reward that sets it (config/default.yaml)",
        )
    return [*as_arguments(flags), *extra]


def tuner_flags(values: TunerSettings) -> dict[str, Any]:
    """Flags of a LoRA, or of training all weights that are not frozen."""
    frozen = {"tuner_type": values.tuner, "freeze_vit": values.freeze_vit, "freeze_aligner": values.freeze_aligner}
    if values.tuner == "full":
        return frozen
    return frozen | {
        "lora_rank": values.rank,
        "lora_alpha": values.alpha,
        "lora_dropout": values.dropout,
        "target_modules": values.target_modules,
    }


def model_flags(values: VlmSettings, model: Path) -> dict[str, Any]:
    """Flags that name the model; without its type and template ms-swift guesses by the folder's name."""
    return {"model": model, "model_type": values.model_type, "template": values.template}


def training_flags(
    values: SftSettings | GrpoSettings,
    vlm: VlmSettings,
    model: Path,
    train: Path,
    validation: Path,
    output: Path,
    precision: str,
    on_cpu: bool,
    processes: int,
    resumed: Path | None,
) -> dict[str, Any]:
    """Flags of a training; `reward_flags` come on top for GRPO.

    Args:
        precision: "fp32", "bf16" or "fp16".
        resumed: checkpoint to carry on from.
    """
    return {
        **model_flags(vlm, model),
        "dataset": train,
        "val_dataset": validation,
        "split_dataset_ratio": 0,  # the sides are by vase, decided long before
        "strict": True,  # else a row that cannot be encoded is replaced by another
        "load_from_cache_file": False,
        **tuner_flags(values.tuner),
        "torch_dtype": _DTYPES[precision],
        "fp16": precision == "fp16",
        "bf16": precision == "bf16",
        "num_train_epochs": values.epochs,
        "max_steps": values.max_steps,
        "per_device_train_batch_size": values.batch_size,
        "per_device_eval_batch_size": values.eval_batch_size,
        "gradient_accumulation_steps": values.accumulation,
        "learning_rate": values.lr,
        "lr_scheduler_type": values.schedule,
        "warmup_ratio": values.warmup,
        "weight_decay": values.weight_decay,
        "max_length": values.max_length,
        "gradient_checkpointing": values.gradient_checkpointing,
        "eval_strategy": "steps",
        "eval_steps": values.eval_steps,
        "save_strategy": "steps",
        "save_steps": values.save_steps,
        "logging_steps": 1,  # what is averaged over several steps would be lost when a training resumes between two
        "output_dir": output,
        "add_version": False,
        "check_model": False,  # would ask a hub
        "report_to": "none",  # curves are written by a callback, which takes back what a resumed run repeats
        "callbacks": CALLBACKS,
        "seed": values.seed,
        "data_seed": values.seed,
        "full_determinism": values.deterministic,
        "dataloader_num_workers": values.workers,
        "dataset_num_proc": values.dataset_processes,
        "deepspeed": None if values.deepspeed == "none" else values.deepspeed,
        "ddp_backend": "gloo" if on_cpu and processes > 1 else None,
        "ddp_find_unused_parameters": False if processes > 1 else None,
        "use_cpu": True if on_cpu else None,
        "resume_from_checkpoint": resumed,
    }


def reward_flags(values: GrpoSettings, reward: RewardSettings, system: Path | None) -> dict[str, Any]:
    """Flags of GRPO beside those of any training."""
    eval_generations = values.eval_generations or values.generations
    flags = {
        "rlhf_type": "grpo",
        "reward_funcs": REWARDS,
        "reward_weights": (1.0, reward.format_weight),
        "num_generations": values.generations,
        # a batch of validation holds whole groups too; the published size of 1 was never used, for want of rows
        "per_device_eval_batch_size": math.ceil(values.eval_batch_size / eval_generations) * eval_generations,
        "num_generations_eval": eval_generations,
        "num_iterations": values.iterations,
        "beta": values.beta,
        "temperature": values.temperature,
        "top_p": values.top_p,
        "top_k": values.top_k,
        "max_completion_length": values.max_completion_length,
        "log_completions": True,
        "async_generate": False,
        "system": system,
        "use_vllm": values.vllm != "none",
    }
    return flags | ({"vllm_mode": values.vllm} if values.vllm != "none" else {})


def export_flags(vlm: VlmSettings, model: Path, adapter: Path, output: Path, dtype: str) -> dict[str, Any]:
    """Flags of `swift export` that merge an adapter; `output` must not exist (ms-swift would skip, and exit with 0)."""
    return {
        **model_flags(vlm, model),
        "adapters": adapter,
        "merge_lora": True,
        "torch_dtype": dtype,
        "output_dir": output,
    }
