"""Adapters on the language model, and the 4-bit base of QLoRA."""

import re
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import nn

from scripts.busi.settings import LoraSettings
from scripts.common.errors import KilnError
from scripts.common.vlm import Family


def quantisation(settings: LoraSettings, family: Family, dtype: torch.dtype):
    """nf4 as in QLoRA (Dettmers et al. 2023); the language-model head stays as it is."""
    from transformers import BitsAndBytesConfig

    kept = [*family.frozen] if not settings.quantise_vision else []
    if settings.train_projector:
        kept.append(family.projector)
    kept = ["lm_head", *kept, *(f"model.{name}" for name in kept)]  # transformers matches them from the left
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_use_double_quant=settings.double_quantisation,
        llm_int8_skip_modules=kept,
    )


def language_linears(model: nn.Module, family: Family) -> list[str]:
    """Full names of the language model's linear layers (4-bit ones too), its head excepted."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and not any(part in name.split(".") for part in (*family.frozen, "lm_head"))
    ]  # fmt: skip


def target_pattern(model: nn.Module, family: Family, settings: LoraSettings) -> str:
    """The regular expression on full names of the layers that get an adapter.

    Raises:
        KilnError: a target that the language model lacks (names those it has), or nothing is left.
    """
    linears = language_linears(model, family)
    ends = sorted({name.rpartition(".")[2] for name in linears})
    lacking = [name for name in settings.target_modules if name not in ends]
    if lacking:
        raise KilnError(
            f"busi.lora.target_modules: the language model has no {', '.join(lacking)}; "
            f"its linear layers end in {', '.join(ends) or 'nothing'}",
            "name layers that it has",
        )
    frozen = "|".join(map(re.escape, family.frozen))
    targets = "|".join(map(re.escape, settings.target_modules))
    excluded = f"(?!(?:{settings.exclude_modules})$)" if settings.exclude_modules else ""
    pattern = rf"{excluded}(?!(.*\.)?({frozen})\.).*\.({targets})"
    if not any(re.fullmatch(pattern, name) for name in linears):
        raise KilnError(
            f"busi.lora.exclude_modules {settings.exclude_modules!r} leaves no layer of {len(linears)}",
            "make it match fewer full names, such as " + linears[0],
        )
    return pattern


def add_adapters(
    model: nn.Module,
    family: Family,
    settings: LoraSettings,
    quantised: bool,
    checkpointing: bool,
    init_from: str | None,
) -> PeftModel:
    """The model with fresh adapters, or with those of `init_from`; only they (and the projector) are trained.

    Raises:
        KilnError: `init_from` is no adapter of this form.
    """
    pattern = target_pattern(model, family, settings)
    if quantised:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        for module in model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                # else a validation on the CPU packs the weights into a form that passes no gradient on
                module.support_avx512bf16_for_cpu = False
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.config.use_cache = False
    if init_from:
        if not Path(init_from, "adapter_config.json").is_file():
            raise KilnError(f"{init_from}: no adapter (no adapter_config.json there)", "give a final_model folder")
        return PeftModel.from_pretrained(model, init_from, is_trainable=True)
    return get_peft_model(
        model,
        LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,
            lora_dropout=settings.dropout,
            target_modules=pattern,
            modules_to_save=[family.projector] if settings.train_projector else None,
            bias="none",
            task_type="CAUSAL_LM",
        ),
    )
