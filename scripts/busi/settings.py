"""Settings of pipeline `busi`; the defaults are the published values of the Hulu-Med fine-tune on BUSI."""

import re
from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from scripts.common.settings import Settings, execution
from scripts.common.variants import VariedSettings

PROMPT = (
    "Carefully examine the image to determine the diagnostic result for breast cancer. "
    "Please answer 'Normal', 'Benign', or 'Malignant'."
)


class ListSettings(Settings):
    """How the class folders are read."""

    classes: tuple[str, ...] = Field(
        ("Normal", "Benign", "Malignant"),
        min_length=2,
        description="names of the class folders, in any letter case, in the order of the labels 0, 1, 2; also the "
        "answers that the model learns to give",
    )
    max_pixels: int = Field(89_478_485, gt=0, description="larger images are quarantined as decompression bombs")

    @field_validator("classes")
    @classmethod
    def _distinct(cls, value):
        if len({name.casefold() for name in value}) != len(value) or not all(name.strip() for name in value):
            raise ValueError("class names must differ, whatever their letter case, and none may be empty")
        return value


class DuplicatesSettings(Settings):
    """What counts as the same picture."""

    threshold: float = Field(
        0.98, gt=0, le=1, description="least normalised correlation of 64x64 grey thumbnails that makes near-twins"
    )
    block: int = execution(1024, gt=0, description="thumbnails compared at a time: memory grows with its square")


class SplitSettings(Settings):
    """Sides by duplicate group, stratified by class."""

    train: float = Field(0.7, gt=0, lt=1, description="share of images")
    validation: float = Field(0.1, gt=0, lt=1, description="share of images")
    test: float = Field(0.2, gt=0, lt=1, description="share of images")
    seed: int = Field(42, ge=0, description="of the deal of duplicate groups to sides")
    conflicts: Literal["keep", "drop", "quarantine"] = Field(
        "quarantine", description="what happens to groups of near-twins with different labels"
    )

    @model_validator(mode="after")
    def _shares_add_up(self):
        if abs(self.train + self.validation + self.test - 1) > 1e-9:
            raise ValueError("train + validation + test must be 1")
        return self


class PublishedSplit(Settings):
    """A split that somebody else made: JSON rows (image, text, answer, label) or CSV with the same columns."""

    train: str = Field(description="table of the train side (.json, .jsonl, .csv)")
    test: str = Field(description="table of the test side (.json, .jsonl, .csv)")


class AuditSettings(Settings):
    """How splits are audited for leaks."""

    thresholds: tuple[Annotated[float, Field(gt=0, le=1)], ...] = Field(
        (0.97, 0.98, 0.99), min_length=1, description="correlations to report"
    )


class ConversationSettings(Settings):
    """From a split to chat rows."""

    split: Literal["ours"] | PublishedSplit = Field(
        "ours", description="ours, or {train: file, test: file}: a published split is then trained on as it is"
    )
    prompts: tuple[str, ...] = Field(
        (PROMPT,), min_length=1, description="phrasings; training draws one per image, scoring uses the first"
    )
    validation_share: float = Field(
        0.1, gt=0, lt=1, description="of a published train side, cut off by duplicate group, since it has none"
    )
    seed: int = Field(42, ge=0, description="of the draw of prompts and of the validation that is cut off")


class BaseSettings(Settings):
    """The vision-language model to start from."""

    model: str = execution(  # its files' hashes are what counts, not where they lie
        "hulu-med-4b", description="a name in config/models.csv, or a folder with a model"
    )
    family: Literal["hulumed", "qwen"] = Field(
        "hulumed", description="hulumed: by its own remote code; qwen: Qwen2.5-VL and Qwen3-VL"
    )
    code_sha256: str | None = Field(
        None,
        pattern=r"^[0-9a-f]{64}$",
        description="remote code of a model given as a folder runs only if its *.py files have this digest; a model "
        "of config/models.csv is pinned by its locked revision instead",
    )


class LoraSettings(Settings):
    """Low-rank adapters, and the quantised base of QLoRA."""

    rank: int = Field(64, gt=0, description="LoRA rank")
    alpha: int = Field(128, gt=0, description="LoRA alpha: updates are scaled by alpha / rank")
    dropout: float = Field(0.05, ge=0, lt=1, description="on the input of the adapters")
    target_modules: tuple[str, ...] = Field(
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        min_length=1,
        description="linear layers of the language model that get an adapter, by the last part of their names",
    )
    exclude_modules: str | None = Field(None, description="regular expression on full names: these get none")
    train_projector: bool = Field(
        False, description="train the projector in full too; the original's README says no, its code yes"
    )
    double_quantisation: bool = Field(True, description="QLoRA: quantise the quantisation constants (nf4) as well")
    quantise_vision: bool = Field(True, description="QLoRA: the frozen vision encoder is 4-bit too, as published")


class TrainSettings(Settings):
    """Fine-tuning; the same for LoRA and QLoRA."""

    epochs: float = Field(3, gt=0, description="passes over the training images")
    max_steps: int | None = Field(None, gt=0, description="optimiser steps, in place of epochs")
    batch_size: int = Field(2, gt=0, description="images per process and forward pass")
    accumulation: int = Field(8, gt=0, description="forward passes per optimiser step")
    lr: float = Field(2e-4, gt=0, description="AdamW's highest learning rate")
    weight_decay: float = Field(0.01, ge=0, description="AdamW's")
    schedule: Literal["cosine", "linear", "constant_with_warmup"] = Field(
        "cosine", description="course of the learning rate after warm-up"
    )
    warmup: float = Field(0.03, ge=0, lt=1, description="share of steps with a growing learning rate")
    clip: float = Field(1.0, gt=0, description="largest norm of the gradient")
    optimiser: Literal["adamw_torch", "adamw_8bit", "paged_adamw_8bit"] = Field(
        "adamw_torch", description="the 8-bit ones are bitsandbytes'"
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="auto: bf16 where the GPU has it, else fp16; fp32 on a CPU"
    )
    gradient_checkpointing: bool = Field(True, description="less memory for a third more time")
    deepspeed: Literal["none", "zero2"] = Field("none", description="zero2: needs environment envs/deepspeed.yaml")
    init_from: str | None = Field(None, description="a folder with an adapter of an earlier run to start from")
    deterministic: bool = Field(False, description="deterministic GPU kernels, for byte-identical GPU runs")
    seed: int = Field(42, ge=0, description="of adapters and order")
    workers: int = execution(4, ge=0, description="processes that read images")
    log_steps: int = execution(10, gt=0, description="optimiser steps between two lines of the log")
    save_minutes: float = execution(10.0, ge=0, description="time between saves of the training state")
    save_total_limit: int = execution(1, gt=0, description="complete saves that are kept")
    budget_minutes: float | None = execution(None, ge=0, description="save and exit non-zero after this time")
    stall_minutes: float | None = execution(30.0, gt=0, description="without a step in this time: exit non-zero")
    tracker: Literal["tensorboard", "wandb", "none"] = execution(
        "tensorboard", description="where curves go, beside metrics.json; it decides no number"
    )


class TrainLoraSettings(Settings):
    """Settings of step train_lora."""

    base: BaseSettings = BaseSettings()
    lora: LoraSettings = LoraSettings()
    train: TrainSettings = TrainSettings()


class MergeSettings(Settings):
    """Merging, and the gate that the merged model must pass."""

    prompts: int = Field(8, gt=0, description="validation images whose logits are compared")


class PredictSettings(Settings):
    """Scoring and answering."""

    batch_size: int = Field(8, gt=0, description="images per forward pass; it enters the last digits")
    normalisation: Literal["mean", "sum"] = Field(
        "mean",
        description="an answer's score: mean log-likelihood of its tokens (end token included), or their sum. Answers "
        "differ in tokens: the sum favours short ones in a model that was not fine-tuned",
    )
    max_new_tokens: int = Field(16, gt=0, description="of the greedy text answer")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="auto: bf16 where the GPU has it, else fp16; fp32 on a CPU"
    )
    workers: int = execution(4, ge=0, description="processes that read images")


class EvaluateSettings(Settings):
    """Metrics of the predictions."""

    leak_threshold: float = Field(0.98, gt=0, le=1, description="test images with such a near-twin in train are apart")
    calibration_bins: int = Field(10, gt=1, description="bins of the calibration error and its picture")
    seed: int = Field(0, ge=0, description="of the resampling behind intervals")


class BusiSettings(VariedSettings):
    """Pipeline `busi`."""

    stages: ClassVar[dict[str, tuple[str, ...]]] = {"train": ("lora", "train")}
    seeded: ClassVar[tuple[str, ...]] = ("train.seed",)

    images: str = Field("data/busi", description="folder with one folder of images per class; masks beside them")
    list: ListSettings = ListSettings()
    duplicates: DuplicatesSettings = DuplicatesSettings()
    split: SplitSettings = SplitSettings()
    audit: AuditSettings = AuditSettings()
    audits: dict[str, PublishedSplit] = Field({}, description="published splits to audit beside ours, by a short name")
    conversations: ConversationSettings = ConversationSettings()
    base: BaseSettings = BaseSettings()
    methods: tuple[Literal["lora", "qlora"], ...] = Field(
        ("lora",), min_length=1, description="what to train; headline numbers are the first one's"
    )
    resources: Literal["gpu_single", "gpu_node", "multi_node"] = execution(
        "gpu_single", description="resource class of training"
    )
    lora: LoraSettings = LoraSettings()
    train: TrainSettings = TrainSettings()
    merge: MergeSettings = MergeSettings()
    predict: PredictSettings = PredictSettings()
    evaluate: EvaluateSettings = EvaluateSettings()

    @model_validator(mode="after")
    def _leak_threshold_is_audited(self):
        if self.evaluate.leak_threshold not in self.audit.thresholds:
            raise ValueError(f"evaluate.leak_threshold {self.evaluate.leak_threshold} must be among audit.thresholds")
        if {"ours", "published"} & self.audits.keys():
            raise ValueError("audits: the names ours and published are taken")
        return self

    @model_validator(mode="after")
    def _prompts_offer_the_classes(self):
        wanted = {name.casefold() for name in self.list.classes}
        for prompt in self.conversations.prompts:
            offered = {name.casefold() for name in re.findall(r"(?<!\w)['\"]([^'\"]+)['\"]", prompt)}
            if offered and offered != wanted:
                raise ValueError(
                    f"busi.conversations.prompts offer the answers {', '.join(sorted(offered))}, but "
                    f"busi.list.classes are {', '.join(self.list.classes)}: write prompts for "
                    f"your classes, instead of {prompt!r}"
                )
        return self
