"""Optimisation of the adapters: all that decides their weights beside data, model and `lora`.

Messages, files and command line lie in `train_lora`, so that editing those retrains nothing.
"""

import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from scripts.busi.chat_examples import ChatExamples
from scripts.busi.settings import TrainSettings
from scripts.common.errors import KilnError
from scripts.common.vlm import Example, Family

# ZeRO-2 (Rajbhandari et al. 2020) with the optimiser on the CPU, as published; "auto" is filled in by the Trainer.
ZERO2 = {
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": "auto"},
    "zero_optimization": {
        "stage": 2,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "allgather_partitions": True,
        "allgather_bucket_size": 500_000_000,
        "overlap_comm": True,
        "reduce_scatter": True,
        "reduce_bucket_size": 500_000_000,
        "contiguous_gradients": True,
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
}


def total_steps(settings: TrainSettings, items: int, processes: int) -> int:
    """Optimiser steps of the whole training; an epoch's last, smaller group of batches is a step too."""
    if settings.max_steps:
        return settings.max_steps
    batches = math.ceil(math.ceil(items / settings.batch_size) / processes)
    return math.ceil(settings.epochs * math.ceil(batches / settings.accumulation))


def require_deepspeed(on_cpu: bool) -> None:
    """Stop now, and not when the optimiser is made, where DeepSpeed cannot work.

    Raises:
        KilnError: it is not installed, or training is on a CPU.
    """
    if importlib.util.find_spec("deepspeed") is None:
        raise KilnError(
            "busi.train.deepspeed is zero2, but deepspeed is not installed here",
            "use the rule's own environment (snakemake --sdm conda), or set busi.train.deepspeed=none",
        )
    if on_cpu:
        raise KilnError("busi.train.deepspeed is zero2 on a CPU", "set busi.train.deepspeed=none, or train on GPUs")


def training_arguments(
    settings: TrainSettings, folder: Path, precision: str, on_cpu: bool, items: int, processes: int
) -> TrainingArguments:
    """The Trainer's arguments; saves and curves are left to callbacks.

    Raises:
        KilnError: DeepSpeed is asked for, and is not there or has no GPU.
    """
    if settings.deepspeed != "none":
        require_deepspeed(on_cpu)
    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulation,
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps or -1,
        learning_rate=settings.lr,
        weight_decay=settings.weight_decay,
        lr_scheduler_type=settings.schedule,
        warmup_steps=math.ceil(settings.warmup * total_steps(settings, items, processes)),
        max_grad_norm=settings.clip,
        optim=settings.optimiser,
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        use_cpu=on_cpu,
        ddp_backend="gloo" if on_cpu and processes > 1 else None,
        ddp_find_unused_parameters=False if processes > 1 else None,
        deepspeed=ZERO2 if settings.deepspeed == "zero2" else None,
        gradient_checkpointing=False,  # switched on with the adapters, before the Trainer sees the model
        full_determinism=settings.deterministic,
        seed=settings.seed,
        data_seed=settings.seed,
        dataloader_num_workers=settings.workers,
        dataloader_pin_memory=not on_cpu,
        eval_strategy="epoch",
        prediction_loss_only=True,
        save_strategy="no",
        logging_strategy="steps",
        logging_steps=1,  # a mean over several steps would forget, at a resume, those before the save
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
    )


class ExampleTrainer(Trainer):
    """A Trainer whose batches may be errors: a worker's exception would lose its hint."""

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        if "error" in inputs:
            raise inputs["error"]
        return super()._prepare_inputs(inputs)


def make_trainer(
    model,
    family: Family,
    processor,
    arguments: TrainingArguments,
    train: ChatExamples,
    validation: ChatExamples,
    callbacks: Sequence[TrainerCallback],
) -> Trainer:
    """A Trainer over examples; the loss is the mean over all answer tokens of an optimiser step."""
    pad = processor.tokenizer.pad_token_id
    pad = processor.tokenizer.eos_token_id if pad is None else pad

    def collate(items: Sequence[Example | KilnError]) -> dict[str, Any]:
        errors = [item for item in items if isinstance(item, KilnError)]
        return {"error": errors[0]} if errors else family.collate(config, items, pad)

    config = model.config
    trainer = ExampleTrainer(
        model=model,
        args=arguments,
        train_dataset=train,
        eval_dataset=validation,
        data_collator=collate,
        callbacks=list(callbacks),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def trainable(model: torch.nn.Module) -> tuple[int, int]:
    """(trained, all) parameters; a 4-bit weight counts as the parameters that it stands for."""
    sizes = [
        (p.requires_grad, p.numel() * (2 if p.__class__.__name__ == "Params4bit" else 1)) for p in model.parameters()
    ]
    return sum(n for t, n in sizes if t), sum(n for _, n in sizes)
