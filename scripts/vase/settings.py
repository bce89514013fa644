"""Settings of pipeline `vase`; the defaults are the published values of VaseVQA-3D's filter stage and train scripts."""

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from scripts.common.settings import Settings, execution
from scripts.common.variants import VariedSettings

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
    seed: int = Field(42, ge=0, description="of the deal of vases to sides")
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
    epochs: int = Field(200, gt=0, description="passes over the labelled training images")
    batch_size: int = Field(256, gt=0, description="images per optimiser step over all processes")
    lr: float = Field(1e-3, gt=0, description="Adam's learning rate")
    weight_decay: float = Field(1e-4, ge=0, description="Adam's L2 penalty")
    schedule: Literal["step", "cosine"] = Field(
        "step", description="step: x gamma every step_epochs as published; it freezes training after about 40 epochs"
    )
    step_epochs: int = Field(10, gt=0, description="epochs between two drops of schedule step")
    gamma: float = Field(0.1, gt=0, le=1, description="factor of each drop")
    class_weights: Literal["balanced", "none"] = Field("balanced", description="cross-entropy weights")
    augment: bool = Field(True, description="flip 0.5, rotation 10 degrees, colour jitter 0.2/0.2/0.2/0.1")
    precision: Literal["fp32", "bf16", "fp16"] = Field("fp32", description="autocast type on a GPU")
    decode: Literal["full", "reduced"] = Field("reduced", description="reduced: JPEGs at 1/2..1/8, >= 2x image_size")
    deterministic: bool = Field(False, description="deterministic GPU kernels, for byte-identical GPU runs")
    seed: int = Field(42, ge=0, description="of new weights, order and augmentation")
    workers: int = execution(4, ge=0, description="processes that decode images")
    save_minutes: float = execution(10.0, ge=0, description="time between saves of the training state")
    budget_minutes: float | None = execution(None, ge=0, description="save and exit non-zero after this time")
    stall_minutes: float | None = execution(30.0, gt=0, description="without a step in this time: exit non-zero")
    tracker: Literal["tensorboard", "wandb", "none"] = execution(
        "tensorboard", description="where curves go, beside metrics.json; it decides no number"
    )


class ClassifySettings(Settings):
    """Prediction by the classifier."""

    batch_size: int = Field(64, gt=0, description="batches are padded to this size: it enters the last digits")
    precision: Literal["fp32", "bf16", "fp16"] = Field("fp32", description="autocast type on a GPU")
    workers: int = execution(4, ge=0, description="processes that read images")


class ClipSettings(Settings):
    """The CLIP model behind acceptance and view selection."""

    model: str = Field(
        "clip-vit-b-32-openai",
        description="a name in config/models.csv, or a folder that open_clip loads as local-dir",
    )
    batch_size: int = Field(64, gt=0, description="batches are padded to this size: it enters the last digits")
    precision: Literal["fp32", "bf16", "fp16"] = Field("fp32", description="autocast type on a GPU")
    decode: Literal["full", "reduced"] = Field("reduced", description="reduced: JPEGs at 1/2..1/8, >= 2x the input")
    workers: int = execution(4, ge=0, description="processes that read images")


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
        description="what a good view is called",
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
        description="what a bad one is called",
    )


class ThresholdSettings(Settings):
    """Which score is enough."""

    rule: Literal["percentile", "fixed"] = Field(
        "percentile", description="percentile: of scores of a sample; fixed: value"
    )
    percentile: float = Field(25.0, ge=0, le=100, description="of the sampled scores; 25 keeps about 75 %")
    value: float | None = Field(None, ge=-2, le=2, description="the threshold of rule `fixed`")
    sample_size: int = Field(500, gt=0, description="images that rule `percentile` looks at")
    sides: tuple[Literal["train", "validation", "test"], ...] = Field(
        ("train", "validation"), min_length=1, description="sides to sample; the original sampled all, test too"
    )
    seed: int = Field(42, ge=0, description="of the sample")

    @model_validator(mode="after")
    def _fixed_needs_value(self):
        if self.rule == "fixed" and self.value is None:
            raise ValueError("rule `fixed` needs `value`")
        return self


DIMENSIONS = ("fabric", "technique", "shape", "dating", "decoration", "attribution")
CAPTION = "caption"  # the dimension of rows that ask for a whole description

# what ms-swift 2 and 3 called by other names, or no longer know
RENAMED_FLAGS = {
    "--train_type": "--tuner_type",
    "--sft_type": "--tuner_type",
    "--lora_target_modules": "--target_modules",
    "--lora_dropout_p": "--lora_dropout",
    "--dataset_test_ratio": "--split_dataset_ratio",
    "--model_id_or_path": "--model",
    "--num_infer_workers": "--use_vllm with --vllm_mode",
    "--vllm_device": "--vllm_mode",
}


class DatasetSettings(Settings):
    """Rows for training and scoring, from published JSON files."""

    captions: str | None = Field(
        None, description="JSON: a list of {images, caption, conversations}; images are file names below vase.images"
    )
    questions: str | None = Field(
        None,
        description="JSON or JSONL: rows of question, answer, dimension, and images or vase (its best view is shown)",
    )
    caption_question: str = Field("Describe the vase.", description="what is asked for a published caption")
    sft_share: float = Field(1.0, gt=0, le=1, description="share of the train side's vases whose rows SFT sees")
    seed: int = Field(42, ge=0, description="of the draw of vases for SFT")


class VlmSettings(Settings):
    """The vision-language model that is fine-tuned."""

    model: str = Field(
        "qwen2.5-vl-7b-instruct", description="a name in config/models.csv, or a folder that transformers loads"
    )
    model_type: str = Field("qwen2_5_vl", description="ms-swift's name of the architecture")
    template: str = Field("qwen2_5_vl", description="ms-swift's name of the chat template")
    max_pixels: int = Field(1_003_520, gt=0, description="larger pictures are reduced; 1280 tokens of 28 x 28")


class TunerSettings(Settings):
    """What is trained: a LoRA, or all of the language model."""

    tuner: Literal["lora", "full"] = Field(
        "lora", description="lora: low-rank adapters; full: all weights that are not frozen"
    )
    rank: int = Field(8, gt=0, description="LoRA rank")
    alpha: int = Field(32, gt=0, description="LoRA alpha: updates are scaled by alpha / rank")
    dropout: float = Field(0.05, ge=0, lt=1, description="ms-swift's default; the published scripts do not set it")
    target_modules: tuple[str, ...] = Field(
        ("all-linear",), min_length=1, description="linear layers that get an adapter; all-linear: all but the head"
    )
    freeze_vit: bool = Field(True, description="the vision tower stays as it is")
    freeze_aligner: bool = Field(True, description="so does the projector; ms-swift's default")


class SwiftTrainSettings(Settings):
    """What SFT and GRPO have in common; a field means what ms-swift's flag of that meaning does."""

    epochs: float = Field(gt=0, description="passes over the training rows")
    max_steps: int | None = Field(None, gt=0, description="optimiser steps, in place of epochs")
    batch_size: int = Field(1, gt=0, description="rows (GRPO: completions) per process and forward pass")
    eval_batch_size: int = Field(1, gt=0, description="rows per process and forward pass of validation")
    accumulation: int = Field(gt=0, description="forward passes per optimiser step")
    lr: float = Field(gt=0, description="AdamW's highest learning rate")
    schedule: Literal["cosine", "linear", "constant_with_warmup"] = Field(
        "cosine", description="course of the learning rate after warm-up"
    )
    warmup: float = Field(ge=0, lt=1, description="share of steps with a growing learning rate")
    weight_decay: float = Field(0.1, ge=0, description="ms-swift's default")
    max_length: int = Field(4096, gt=0, description="tokens; longer rows are refused by ms-swift")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="auto: bf16 (as published) where the GPU has it, else fp16; fp32 on a CPU"
    )
    gradient_checkpointing: bool = Field(description="less memory for a third more time")
    deepspeed: Literal["none", "zero2", "zero3"] = Field("none", description="needs deepspeed beside ms-swift")
    eval_steps: int = Field(gt=0, description="optimiser steps between validations")
    save_steps: int = Field(gt=0, description="optimiser steps between checkpoints; SFT: a multiple of eval_steps")
    save_total_limit: int = Field(
        gt=0, description="complete checkpoints that are kept while training, the best beside"
    )
    deterministic: bool = Field(False, description="deterministic GPU kernels, for byte-identical GPU runs")
    seed: int = Field(42, ge=0, description="of adapters, order and samples")
    extra_args: tuple[str, ...] = Field((), description="more flags for ms-swift 4, such as --neftune_noise_alpha, 5")
    workers: int = execution(1, ge=0, description="processes that read images")
    dataset_processes: int = execution(1, gt=0, description="processes that encode rows before training")
    logging_steps: int = execution(1, gt=0, description="optimiser steps between two lines of the log")
    budget_minutes: float | None = execution(None, ge=0, description="save and exit non-zero after this time")
    stall_minutes: float | None = execution(30.0, gt=0, description="without a step in this time: exit non-zero")
    tracker: Literal["tensorboard", "wandb", "none"] = execution(
        "tensorboard", description="where curves go, beside metrics.json; it decides no number"
    )

    @model_validator(mode="after")
    def _flags_that_ms_swift_knows(self):
        for flag in self.extra_args:
            name = flag.partition("=")[0]
            if name in RENAMED_FLAGS:
                raise ValueError(f"extra_args: ms-swift 4 does not know {name}; its name is {RENAMED_FLAGS[name]}")
        return self


class SftSettings(SwiftTrainSettings):
    """Supervised fine-tuning."""

    tuner: TunerSettings = TunerSettings()
    epochs: float = Field(2, gt=0, description="passes over the training rows")
    accumulation: int = Field(16, gt=0, description="forward passes per optimiser step")
    lr: float = Field(1e-4, gt=0, description="AdamW's highest learning rate")
    warmup: float = Field(0.05, ge=0, lt=1, description="share of steps with a growing learning rate")
    gradient_checkpointing: bool = Field(True, description="less memory for a third more time")
    eval_steps: int = Field(100, gt=0, description="optimiser steps between validations")
    save_steps: int = Field(100, gt=0, description="optimiser steps between checkpoints; a multiple of eval_steps")
    save_total_limit: int = Field(5, gt=0, description="complete checkpoints that are kept, the best beside them")
    workers: int = execution(4, ge=0, description="processes that read images")
    dataset_processes: int = execution(4, gt=0, description="processes that encode rows before training")
    logging_steps: int = execution(5, gt=0, description="optimiser steps between two lines of the log")

    @model_validator(mode="after")
    def _checkpoints_are_validated(self):
        if self.save_steps % self.eval_steps:
            raise ValueError(
                f"save_steps {self.save_steps} must be a multiple of eval_steps {self.eval_steps}: the best checkpoint "
                "is chosen by its validation loss"
            )
        return self


class GrpoSettings(SwiftTrainSettings):
    """Group relative policy optimisation (Shao et al. 2024, DeepSeekMath)."""

    tuner: TunerSettings = TunerSettings(tuner="full")
    epochs: float = Field(1, gt=0, description="passes over the training prompts")
    accumulation: int = Field(4, gt=0, description="forward passes per optimiser step")
    lr: float = Field(1e-6, gt=0, description="AdamW's highest learning rate")
    warmup: float = Field(0.01, ge=0, lt=1, description="share of steps with a growing learning rate")
    gradient_checkpointing: bool = Field(False, description="less memory for a third more time")
    eval_steps: int = Field(1000, gt=0, description="optimiser steps between validations")
    save_steps: int = Field(300, gt=0, description="optimiser steps between checkpoints")
    save_total_limit: int = Field(10, gt=0, description="complete checkpoints that are kept, the best beside them")
    workers: int = execution(1, ge=0, description="processes that read images")
    logging_steps: int = execution(1, gt=0, description="optimiser steps between two lines of the log")
    generations: int = Field(4, gt=1, description="completions of a prompt, which form a group")
    eval_generations: int | None = Field(
        None, gt=0, description="completions of a prompt in validation; null: as many as generations"
    )
    iterations: int = Field(1, gt=0, description="updates per batch of completions")
    beta: float = Field(0.001, ge=0, description="weight of the KL term; 0 needs no reference model")
    temperature: float = Field(1.0, gt=0, description="of sampled completions")
    top_p: float = Field(
        1.0, gt=0, le=1, description="completions are sampled from the likeliest tokens of so much probability; 1: all"
    )
    top_k: int = Field(-1, ge=-1, description="-1: all tokens")
    max_completion_length: int = Field(256, gt=0, description="tokens")
    system: str | None = Field(
        None, description="file with the system prompt; null: the text that the format of vase.reward asks for"
    )
    vllm: Literal["none", "colocate"] = Field("none", description="rollouts by vLLM in the training processes")

    @model_validator(mode="after")
    def _whole_groups(self):
        if self.batch_size * self.accumulation % self.generations:
            raise ValueError(
                f"batch_size x accumulation = {self.batch_size * self.accumulation} must be a multiple of "
                f"generations = {self.generations}, so that groups are whole"
            )
        return self


class RewardSettings(Settings):
    """R = sum of w_i r_i over the dimensions, minus a penalty, plus a bonus, plus a format part.

    The paper publishes this form and neither weights, penalty nor bonus: these are ours.
    """

    plugin: str | None = Field(
        None,
        description="a user's own reward in place of ours: a .py file with an ORM class registered as "
        "external_vase_acc, or with a function external_vase_acc(responses, references) -> list of floats",
    )
    weights: dict[str, float] = Field(
        dict.fromkeys(DIMENSIONS, 1 / 6),
        description="w_i; a row that asks for one dimension gives that one all the weight",
    )
    penalty: float = Field(0.1, ge=0, description="P: taken off for an answer that names rivals or repeats itself")
    bonus: float = Field(0.1, ge=0, description="B: added when every dimension that is asked for is right")
    format_weight: float = Field(0.1, ge=0, description="weight of the format part, a reward of its own beside R")
    format: Literal["think_answer", "plain"] = Field(
        "think_answer", description="think_answer: <think>..</think><answer>..</answer>; plain: one line"
    )
    max_words: int = Field(64, gt=0, description="an answer of more words has no good format")
    synonyms: dict[str, str] = Field(
        {}, description="more synonyms, from a spelling to the canonical one, beside those of the code"
    )
    check_prompts: int = Field(16, gt=0, description="prompts that are sampled before training to see rewards vary")

    @model_validator(mode="after")
    def _known_weights(self):
        unknown = set(self.weights) - set(DIMENSIONS)
        if unknown:
            raise ValueError(
                f"weights: {', '.join(sorted(unknown))} is no dimension; these are {', '.join(DIMENSIONS)}"
            )
        if any(value < 0 for value in self.weights.values()) or sum(self.weights.values()) <= 0:
            raise ValueError("weights: expected none below 0 and a sum above 0")
        return self


class MergeSettings(Settings):
    """Merging, and the gate that the merged model must pass."""

    prompts: int = Field(8, gt=0, description="validation rows whose logits are compared")


class VqaPredictSettings(Settings):
    """Answers of base, SFT and GRPO model on the test side."""

    batch_size: int = Field(16, gt=0, description="prompts per forward pass; it enters the last digits")
    max_new_tokens: int = Field(256, gt=0, description="of an answer")
    samples: int = Field(4, ge=0, description="completions per prompt at temperature 1, for the mean reward")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="auto: bf16 where the GPU has it, else fp16; fp32 on a CPU"
    )
    seed: int = Field(0, ge=0, description="of the samples, and of which picture stands in for a row's own")
    save_minutes: float = execution(5.0, ge=0, description="time between saves of what is answered")


class VqaEvaluateSettings(Settings):
    """Scores of the answers."""

    retrieval_ks: tuple[int, ...] = Field((1, 5, 10), description="cut-offs of image-caption retrieval")
    seed: int = Field(0, ge=0, description="of the resampling behind intervals")


class MegatronSettings(Settings):
    """Export to Megatron-Core's format; it needs GPUs, megatron-core and transformer-engine."""

    export: bool = Field(False, description="export the final model")
    tensor_parallel: int = Field(1, gt=0, description="GPUs that each layer is spread over")
    test_precision: bool = Field(True, description="compare logits of both formats")


class VaseSettings(VariedSettings):
    """Pipeline `vase`."""

    stages: ClassVar[dict[str, tuple[str, ...]]] = {
        "classifier": ("classifier",),
        "sft": ("sft",),
        "grpo": ("reward", "grpo"),
    }
    seeded: ClassVar[tuple[str, ...]] = ("classifier.seed", "sft.seed", "grpo.seed")

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
    dataset: DatasetSettings = DatasetSettings()
    vlm: VlmSettings = VlmSettings()
    sft: SftSettings = SftSettings()
    reward: RewardSettings = RewardSettings()
    grpo: GrpoSettings = GrpoSettings()
    train_resources: Literal["gpu_single", "gpu_node", "multi_node"] = execution(
        "gpu_single", description="resource class of SFT and GRPO"
    )
    merge: MergeSettings = MergeSettings()
    predict: VqaPredictSettings = VqaPredictSettings()
    evaluate: VqaEvaluateSettings = VqaEvaluateSettings()
    megatron: MegatronSettings = MegatronSettings()
