"""Settings of pipeline `vase`; the defaults are the published values of VaseVQA-3D's filter stage."""

from typing import Literal

from pydantic import Field, model_validator

from scripts.common.settings import Settings, execution

Share = Field(ge=0, le=1)


class InspectSettings(Settings):
    """How files are listed and checked."""

    max_pixels: int = Field(89_478_485, gt=0, description="larger images are quarantined as decompression bombs")


class ListSettings(Settings):
    """How file names become vases and views."""

    view_pattern: str | None = Field(
        r"(?i)^(?P<vase>[A-F0-9-]+)_(?P<view>\d+)_ac001001\.jpg$",
        description="regular expression on the file name with groups vase and view; null: each file is a vase",
    )


class SplitSettings(Settings):
    """Sides by vase, decided once for every later step."""

    train: float = Field(0.8, gt=0, lt=1, description="share of vases")
    validation: float = Field(0.1, gt=0, lt=1, description="share of vases")
    test: float = Field(0.1, gt=0, lt=1, description="share of vases")
    seed: int = Field(42, ge=0)
    stratify: tuple[str, ...] = Field((), description="columns of `attributes` to stratify by, beside the labels")

    @model_validator(mode="after")
    def _shares_add_up(self):
        if abs(self.train + self.validation + self.test - 1) > 1e-9:
            raise ValueError("train + validation + test must be 1")
        return self


class ClassifierSettings(Settings):
    """Training of the image-quality classifier."""

    arch: Literal["resnet50", "resnet18"] = Field("resnet50", description="torchvision backbone")
    weights: str | None = Field(
        "resnet50-imagenet1k-v1",
        description="initial backbone: a name in config/models.csv; a .pth or .safetensors file, such as torchvision's "
        "~/.cache/torch/hub/checkpoints/resnet50-0676ba61.pth; or null for scratch",
    )
    init_from: str | None = Field(None, description="a classifier.safetensors of an earlier run to start from")
    image_size: int = Field(224, ge=32, description="square input in pixels")
    hidden: tuple[int, int] = Field((512, 256), description="widths of the head's two hidden layers")
    dropout: tuple[float, float] = Field((0.5, 0.3), description="dropout after each hidden layer")
    epochs: int = Field(200, gt=0)
    batch_size: int = Field(256, gt=0, description="images per optimiser step over all processes")
    lr: float = Field(1e-3, gt=0, description="Adam's learning rate")
    weight_decay: float = Field(1e-4, ge=0)
    schedule: Literal["step", "cosine"] = Field(
        "step", description="step: x gamma every step_epochs as published; it freezes training after about 40 epochs"
    )
    step_epochs: int = Field(10, gt=0)
    gamma: float = Field(0.1, gt=0, le=1)
    class_weights: Literal["balanced", "none"] = Field("balanced", description="cross-entropy weights")
    augment: bool = Field(True, description="flip 0.5, rotation 10 degrees, colour jitter 0.2/0.2/0.2/0.1")
    precision: Literal["fp32", "bf16", "fp16"] = Field("fp32", description="autocast type on a GPU")
    decode: Literal["full", "reduced"] = Field("reduced", description="reduced: JPEGs at 1/2..1/8, >= 2x image_size")
    deterministic: bool = Field(False, description="deterministic GPU kernels, for byte-identical GPU runs")
    seed: int = Field(42, ge=0)
    workers: int = execution(4, ge=0, description="processes that decode images")
    save_minutes: float = execution(10.0, ge=0, description="time between saves of the training state")
    budget_minutes: float | None = execution(None, ge=0, description="save and exit non-zero after this time")
    tracker: Literal["tensorboard", "wandb", "none"] = execution("tensorboard")


class ClassifySettings(Settings):
    """Prediction by the classifier."""

    batch_size: int = Field(64, gt=0, description="batches are padded to this size: it enters the last digits")
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    workers: int = execution(4, ge=0)


class ClipSettings(Settings):
    """The CLIP model behind acceptance and view selection."""

    model: str = Field(
        "clip-vit-b-32-openai",
        description="a name in config/models.csv, or a folder that open_clip loads as local-dir",
    )
    batch_size: int = Field(64, gt=0, description="batches are padded to this size: it enters the last digits")
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    decode: Literal["full", "reduced"] = Field("reduced", description="reduced: JPEGs at 1/2..1/8, >= 2x the input")
    workers: int = execution(4, ge=0)


class PromptSettings(Settings):
    """The two sides of the acceptance score; the views are ranked by the positive side alone."""

    positive: tuple[str, ...] = Field(
        (
            "a photo of a complete, intact ancient vase",
            "a clear frontal view of a whole vase",
            "an undamaged ancient Greek vase",
            "a well-preserved vase seen from the front",
            "a full view of an intact pottery vessel",
            "a sharp museum photograph of a complete vase",
            "a whole vase centred in the picture",
            "the front of an intact painted vase",
        ),
        min_length=1,
    )
    negative: tuple[str, ...] = Field(
        (
            "a photo of a broken vase",
            "fragments of ancient pottery",
            "shards of a broken vessel",
            "a damaged, incomplete vase",
            "a blurred picture of a vase",
            "a cropped picture showing part of a vase",
            "a dark picture of a vase",
            "pieces of a shattered vase",
        ),
        min_length=1,
    )


class ThresholdSettings(Settings):
    """Which score is enough."""

    rule: Literal["percentile", "fixed"] = "percentile"
    percentile: float = Field(25.0, ge=0, le=100, description="of the sampled scores; 25 keeps about 75 %")
    value: float | None = Field(None, ge=-2, le=2, description="the threshold of rule `fixed`")
    sample_size: int = Field(500, gt=0, description="images that rule `percentile` looks at")
    sides: tuple[Literal["train", "validation", "test"], ...] = Field(
        ("train", "validation"), min_length=1, description="sides to sample; the original sampled all, test too"
    )
    seed: int = Field(42, ge=0)

    @model_validator(mode="after")
    def _fixed_needs_value(self):
        if self.rule == "fixed" and self.value is None:
            raise ValueError("rule `fixed` needs `value`")
        return self


class VaseSettings(Settings):
    """Pipeline `vase`."""

    images: str = Field("data/vase/images", description="folder of raw photographs, any depth")
    labelled: str = Field("data/vase/labelled", description="folder with 0/ (low quality) and 1/ (high quality)")
    attributes: str | None = Field(None, description="table (.csv, .parquet) by vase, for stratification")
    truth: str | None = Field(None, description="table (path, quality, view_quality) to score the filter against")
    images_per_shard: int = Field(4096, gt=0, description="files per shard; only new shards heed a change")
    inspect: InspectSettings = InspectSettings()
    list: ListSettings = ListSettings()
    split: SplitSettings = SplitSettings()
    classifier: ClassifierSettings = ClassifierSettings()
    classify: ClassifySettings = ClassifySettings()
    clip: ClipSettings = ClipSettings()
    prompts: PromptSettings = PromptSettings()
    threshold: ThresholdSettings = ThresholdSettings()
