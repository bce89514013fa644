"""Settings of pipeline `biomedica`."""

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from scripts.common.settings import Settings, execution
from scripts.common.variants import VariedSettings

ARMS = ("hybrid", "local")  # what a run trains on: local and streamed pairs, or local ones alone


class IndexSettings(Settings):
    """Which pairs of the local shards may be used; streamed ones are held to the same rules."""

    min_side: int = Field(21, gt=0, description="pixels; images with a shorter side are rejected")
    max_pixels: int = Field(100_000_000, gt=0, description="larger images are quarantined")
    no_caption: tuple[str, ...] = Field(
        ("No caption found",), description="captions that say nothing, beside empty ones"
    )
    processes: int = execution(8, ge=1, description="processes that read shards")


class RemoteSettings(Settings):
    """The repo on the Hugging Face hub, and how patiently it is read; HF_ENDPOINT and proxy variables hold."""

    original_names: ClassVar[dict[str, str]] = {"hf_repo": "repo", "repo_id": "repo"}
    repo: str | None = Field(
        "BIOMEDICA/biomedica_webdataset_24M", description="data set of tar shards; null: nothing is streamed"
    )
    revision: str | None = Field(
        None, description="commit, tag or branch; null: the default branch as it is when listed"
    )
    pattern: str = Field("*.tar", description="of shard names in the repo")
    attempts: int = execution(8, gt=0, description="without a single new byte, before a shard counts as unreachable")
    wait_seconds: float = execution(
        1.0, gt=0, description="before the second attempt; each later one waits twice as long"
    )
    max_wait_seconds: float = execution(120.0, gt=0, description="the longest wait, whatever a busy server asks for")
    connect_seconds: float = execution(10.0, gt=0, description="patience for a connection")
    read_seconds: float = execution(60.0, gt=0, description="a connection that is silent for longer counts as broken")
    cache_folder: str | None = execution(None, description="folder that keeps shards read whole; null: nothing is kept")
    cache_gb: float = execution(100.0, gt=0, description="size of that folder; the longest unused shards make room")


class HeldOutSettings(Settings):
    """Articles that no training sees, chosen by their accession alone, wherever their pairs lie."""

    validation: float = Field(0.02, gt=0, lt=1, description="share of articles; chooses the best epoch")
    test: float = Field(0.02, gt=0, lt=1, description="share of articles; scores only")
    max_pairs: int = Field(2000, gt=1, description="of each side, the rest is left out; local shards come first")
    seed: int = Field(42, ge=0, description="of the hash that gives an article its side")

    @model_validator(mode="after")
    def _leaves_train(self):
        if self.validation + self.test >= 1:
            raise ValueError(f"validation {self.validation} and test {self.test} leave nothing to train on")
        return self


class PlanSettings(Settings):
    """How many pairs an epoch has, and where they come from."""

    original_names: ClassVar[dict[str, str]] = {"target_samples": "samples", "num_epochs": "epochs"}
    samples: int = Field(50_000, gt=1, description="pairs of an epoch; local ones first, the others are streamed")
    epochs: int = Field(10, gt=0, description="passes; each has samples pairs")
    batch_size: int = Field(256, gt=1, description="pairs per optimiser step over all processes: the contrastive batch")
    lanes: int = Field(8, gt=0, description="shards that are read side by side; a multiple of the number of processes")
    shuffle_buffer: int = Field(256, gt=0, description="streamed pairs of a lane that are shuffled at a time")
    shortfall: Literal["fail", "fewer"] = Field(
        "fail", description="if all shards hold less than is planned: fail, or end epochs earlier, said so"
    )
    unreachable: Literal["fail", "others"] = Field(
        "fail",
        description="if a shard stays unreachable: fail, or make it up from shards that were not planned, said so",
    )
    seed: int = Field(42, ge=0, description="of the order of shards and pairs, where no run gives its own")


class ModelSettings(Settings):
    """The CLIP model, one of open_clip's."""

    name: str = Field("ViT-B-32", description="open_clip's name of the architecture")
    config: dict[str, Any] | None = Field(
        None, description="open_clip's model_cfg, for an architecture of your own; takes the place of name"
    )
    weights: str | None = Field(
        None,
        description="a model of config/models.csv, or your folder with open_clip_config.json and weights, which "
        "gives the architecture too; null: random weights",
    )


class TrainSettings(Settings):
    """Optimisation of the contrastive loss."""

    original_names: ClassVar[dict[str, str]] = {"learning_rate": "lr"}
    micro_batch: int | None = Field(
        None, gt=0, description="pairs of a process in one forward pass; more passes make up a batch; null: all at once"
    )
    lr: float = Field(1e-4, gt=0, description="AdamW's highest learning rate")
    final_lr: float = Field(0.0, ge=0, description="of the cosine's last step")
    warmup_steps: int = Field(100, ge=0, description="steps with a growing learning rate")
    betas: tuple[float, float] = Field((0.9, 0.98), description="AdamW's two")
    eps: float = Field(1e-6, gt=0, description="AdamW's")
    weight_decay: float = Field(0.2, ge=0, description="on matrices; not on norms, biases, gains, the logit scale")
    clip_grad: float = Field(1.0, ge=0, description="greatest norm of the gradient; 0 is off")
    max_logit_scale: float = Field(100.0, gt=1, description="the logit scale is kept between 1 and this")
    crop_scale: tuple[float, float] = Field((0.9, 1.0), description="share of the image's area in a random crop")
    gradient_checkpointing: bool = Field(False, description="less memory for a third more time")
    best_by: Literal["retrieval", "loss"] = Field(
        "retrieval", description="validation score that chooses the best epoch"
    )
    precision: Literal["fp32", "bf16", "fp16"] = Field("bf16", description="autocast type on a GPU")
    deterministic: bool = Field(False, description="deterministic GPU kernels, for byte-identical GPU runs")
    seed: int = Field(42, ge=0, description="of new weights, order and crops")
    workers: int = execution(4, ge=0, description="processes that read, of each training process")
    prefetch: int = execution(64, gt=0, description="streamed pairs of a lane read ahead of its shuffle buffer")
    save_minutes: float = execution(10.0, ge=0, description="time between saves of the training state")
    budget_minutes: float | None = execution(None, ge=0, description="save and exit non-zero after this time")
    stall_minutes: float | None = execution(30.0, gt=0, description="without a step in this time: exit non-zero")
    tracker: Literal["tensorboard", "wandb", "none"] = execution(
        "tensorboard", description="where curves go, beside metrics.json; it decides no number"
    )

    @model_validator(mode="after")
    def _crops_are_shares(self):
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise ValueError(f"crop_scale {[low, high]}: expected 0 < least <= greatest <= 1")
        return self


class EvaluateSettings(Settings):
    """Scores on the test side."""

    ks: tuple[int, ...] = Field((1, 5, 10), min_length=1, description="of recall at k")
    prompts: tuple[str, ...] = Field(
        ("{}", "a figure with a {}", "a {} from a biomedical article"),
        min_length=1,
        description="templates of zero-shot classification by panel type; {} stands for its name",
    )
    names: dict[str, str] = Field({}, description="{panel type: its name in prompts}; others in their own words")
    batch_size: int = Field(256, gt=0, description="pairs per forward pass")

    @model_validator(mode="after")
    def _templates_take_a_name(self):
        for one in self.prompts:
            if one.count("{}") != 1:
                raise ValueError(f"prompt {one!r}: expected one {{}}, for the name of the class")
        return self

    @model_validator(mode="after")
    def _cut_offs_are_counts(self):
        if min(self.ks) < 1 or len(set(self.ks)) < len(self.ks):
            raise ValueError(f"ks {list(self.ks)}: expected distinct numbers from 1")
        return self


class BiomedicaSettings(VariedSettings):
    """Pipeline `biomedica`: local and streamed figures with captions to a CLIP model and its retrieval scores."""

    original_names: ClassVar[dict[str, str]] = {"local_dir": "shards"}
    stages: ClassVar[dict[str, tuple[str, ...]]] = {"plan": ("plan",), "train": ("model", "train")}
    seeded: ClassVar[tuple[str, ...]] = ("train.seed",)
    shards: str | None = Field(
        "data/biomedica", description="folder of local tar shards; null or empty: all is streamed"
    )
    index: IndexSettings = IndexSettings()
    remote: RemoteSettings = RemoteSettings()
    held_out: HeldOutSettings = HeldOutSettings()
    plan: PlanSettings = PlanSettings()
    model: ModelSettings = ModelSettings()
    train: TrainSettings = TrainSettings()
    compare_seeds: tuple[int, ...] = Field(
        (), description="seeds of further runs, on hybrid and on local data with as many steps, to be compared"
    )
    evaluate: EvaluateSettings = EvaluateSettings()
    resources: Literal["gpu_single", "gpu_node", "multi_node"] = execution(
        "gpu_single", description="class of the rule that trains"
    )
