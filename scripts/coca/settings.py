"""Settings of pipeline `coca`."""

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from scripts.common.errors import KilnError
from scripts.common.settings import Settings, execution
from scripts.common.variants import VariedSettings

EXTENSIONS = (".h5", ".hdf5")  # of slide files


class ListSettings(Settings):
    """Which slides there are, and what is known of them."""

    tile_dim: int = Field(2560, gt=0, description="features per tile (Virchow: CLS and mean patch, 1280 each)")
    keys: tuple[str, ...] = Field(
        ("embeddings", "features", "feats"), min_length=1, description="HDF5 data sets to take, the first that is there"
    )
    max_tiles: int = Field(1_000_000, gt=0, description="a slide with more is quarantined")
    patients: str | None = Field(
        None, description="CSV with columns slide,patient; null: each slide is its own patient"
    )
    processes: int = execution(8, ge=1, description="processes that read slides")


class SplitSettings(Settings):
    """Sides by patient."""

    validation: float = Field(0.1, gt=0, lt=1, description="share of patients; chooses the best epoch")
    test: float = Field(0.1, gt=0, lt=1, description="share of patients; scores only")
    seed: int = Field(42, ge=0, description="of the deal of patients to sides")

    @model_validator(mode="after")
    def _leaves_train(self):
        if self.validation + self.test >= 1:
            raise ValueError(f"validation {self.validation} and test {self.test} leave nothing to train on")
        return self


class TokenizerSettings(Settings):
    """Byte-level BPE on the training texts, or a tokenizer that exists."""

    path: str | None = Field(None, description="folder of a Hugging Face tokenizer; it gets the marks that it lacks")
    vocabulary: int = Field(8000, ge=260, description="greatest count of tokens, with 256 bytes and three marks")


class EncoderSettings(Settings):
    """The slide encoder: a Perceiver in Prism's layout, from tiles to 1 + `latents` vectors."""

    weights: str | None = Field(
        None, description="Prism's published weights or another slide encoder's (.safetensors, .bin), your own copy"
    )
    frozen: bool | None = Field(None, description="null: frozen exactly if `weights` are given")
    latents: int = Field(512, gt=0, description="beside the first, which stands for the slide")
    dim: int = Field(1280, gt=0, description="width of latents; the image dim of the CoCa model")
    depth: int = Field(8, gt=0, description="cross-attentions; from the second on they share weights and keys")
    transformer_depth: int = Field(6, gt=0, description="self-attention blocks after each, one stack for all")
    heads: int = Field(8, gt=0, description="of self-attention; cross-attention has one")
    mlp_ratio: int = Field(1, gt=0, description="width of the feed-forward layers, in units of dim")
    chunk_tiles: int = execution(4096, gt=0, description="tiles that are looked at at a time, when nothing is trained")

    @property
    def is_frozen(self) -> bool:
        """As set, or exactly if weights are given."""
        return self.weights is not None if self.frozen is None else self.frozen

    @model_validator(mode="after")
    def _not_frozen_and_random(self):
        if self.is_frozen and self.weights is None:
            raise ValueError("a frozen slide encoder with random weights tells nothing of a slide: give weights")
        if self.dim % self.heads:
            raise ValueError(f"dim {self.dim} must be a multiple of heads {self.heads}")
        return self


class ModelSettings(Settings):
    """CoCa (Yu et al. 2022), in the layout of CoCa-pytorch."""

    dim: int = Field(1024, gt=0, description="width of the text layers")
    unimodal_depth: int = Field(6, gt=0, description="layers that see text alone")
    multimodal_depth: int = Field(6, gt=0, description="layers that see the slide as well")
    dim_latents: int = Field(5120, gt=0, description="of the contrastive space")
    image_queries: int = Field(256, gt=0, description="of the attention pooler, beside the contrastive one")
    dim_head: int = Field(64, gt=0, multiple_of=2, description="width of an attention head")
    heads: int = Field(8, gt=0, description="of attention; they share one head of keys and values")
    ff_mult: int = Field(4, gt=0, description="width of the feed-forward layers, in units of dim")


class TrainSettings(Settings):
    """Caption and contrastive losses."""

    epochs: int = Field(10, gt=0, description="passes over the training pairs")
    batch_size: int = Field(4, gt=1, description="pairs per optimiser step over all processes: the contrastive batch")
    max_tiles: int = Field(200_000, gt=0, description="padded tiles of a forward pass; more passes make up a batch")
    max_tokens: int = Field(16_384, gt=0, description="padded tokens of a forward pass")
    tiles_per_slide: int | None = Field(
        None, gt=0, description="a seeded draw of so many where the encoder is trained; null: all"
    )
    max_seq_len: int = Field(512, gt=2, description="tokens of a text with its two marks; longer ones are cut, counted")
    lr: float = Field(1e-4, gt=0, description="AdamW's highest learning rate")
    encoder_lr: float | None = Field(None, gt=0, description="of the slide encoder where it is trained; null: lr")
    final_lr: float = Field(0.0, ge=0, description="of the cosine's last step")
    warmup: float = Field(0.05, ge=0, lt=1, description="share of steps with a growing learning rate")
    betas: tuple[float, float] = Field((0.9, 0.98), description="AdamW's two")
    weight_decay: float = Field(0.01, ge=0, description="on matrices; not on norms, biases, embeddings, temperature")
    clip_grad: float = Field(1.0, ge=0, description="greatest norm of the gradient; 0 is off")
    caption_weight: float = Field(1.0, ge=0, description="of the caption loss")
    contrastive_weight: float = Field(1.0, ge=0, description="of the contrastive loss")
    temperature: float = Field(1.0, description="initial logit scale as a logarithm, as published; CLIP's is 2.6593")
    same_text_negatives: bool = Field(
        False, description="count pairs of equal texts as negatives, as the original does"
    )
    loss_plugin: str | None = Field(
        None, description="a .py file whose function loss_terms takes the place of that in scripts/coca/losses.py"
    )
    init_from: str | None = Field(None, description="a model.safetensors to start from")
    best_by: Literal["retrieval", "loss"] = Field(
        "retrieval", description="validation score that chooses the best epoch"
    )
    precision: Literal["fp32", "bf16", "fp16"] = Field("bf16", description="autocast type on a GPU")
    compile: bool = Field(False, description="torch.compile of the model")
    deterministic: bool = Field(False, description="deterministic GPU kernels, for byte-identical GPU runs")
    seed: int = Field(42, ge=0, description="of new weights, order and draws of tiles")
    save_every: int = Field(5, ge=0, description="epochs between kept checkpoints, beside best and last; 0: none")
    workers: int = execution(4, ge=0, description="processes that read slides")
    save_minutes: float = execution(10.0, ge=0, description="time between saves of the training state")
    budget_minutes: float | None = execution(None, ge=0, description="save and exit non-zero after this time")
    stall_minutes: float | None = execution(30.0, gt=0, description="without a step in this time: exit non-zero")
    tracker: Literal["tensorboard", "wandb", "none"] = execution(
        "tensorboard", description="where curves go, beside metrics.json; it decides no number"
    )


class EncodeSettings(Settings):
    """Latents of every slide, once."""

    precision: Literal["fp32", "bf16", "fp16"] = Field("fp32", description="autocast type; fp16 needs a GPU")
    dtype: Literal["float16", "float32"] = Field("float16", description="of the stored latents")
    slides_per_shard: int = Field(256, gt=0, description="slides in a file of latents")
    workers: int = execution(4, ge=0, description="processes that read slides")


class CaptionSettings(Settings):
    """Captions: greedy, by beam search, or drawn."""

    max_length: int = Field(100, gt=0, description="new tokens")
    beams: int = Field(1, gt=0, description="texts kept at each place, the likeliest is taken; 1: greedy")
    top_k: int | None = Field(None, gt=0, description="draw each token from so many likeliest; null: greedy or beams")
    temperature: float = Field(1.0, gt=0, description="of draws; lower is closer to greedy")
    seed: int = Field(42, ge=0, description="of draws")
    batch_size: int = Field(32, gt=0, description="slides captioned at a time")
    precision: Literal["fp32", "bf16", "fp16"] = Field("fp32", description="autocast type; fp16 needs a GPU")

    @model_validator(mode="after")
    def _beams_or_draws(self):
        if self.beams > 1 and self.top_k:
            raise ValueError(f"beams {self.beams} and top_k {self.top_k}: give one of them")
        return self


class EvaluateSettings(Settings):
    """Scores of captions and retrieval on the test side."""

    ks: tuple[int, ...] = Field((1, 5, 10), min_length=1, description="of recall at k")
    classes: dict[str, list[str]] = Field(
        {}, description="{class: terms}: a text is of the class whose term it holds; their texts also prompt zero-shot"
    )
    prompts: dict[str, list[str]] = Field({}, description="{class: prompts} of zero-shot; empty: the terms themselves")

    @model_validator(mode="after")
    def _tells_classes_apart(self):
        seen: dict[str, str] = {}
        for name, terms in self.classes.items():
            for term in terms:
                if not term.strip():
                    raise ValueError(f"class {name!r} has an empty term")
                if seen.setdefault(term.casefold(), name) != name:
                    raise ValueError(f"{term!r} is a term of {seen[term.casefold()]!r} and of {name!r}")
            if not terms:
                raise ValueError(f"class {name!r} has no terms")
        if len(self.classes) == 1:
            raise ValueError(f"one class, {next(iter(self.classes))!r}: give two or more, or none")
        return self

    @model_validator(mode="after")
    def _prompts_are_of_classes(self):
        for name, prompts in self.prompts.items():
            if name not in self.classes:
                raise ValueError(f"prompts of {name!r}, which is none of the classes {', '.join(self.classes)}")
            if not prompts or not all(one.strip() for one in prompts):
                raise ValueError(f"class {name!r} has no prompts, or an empty one")
        return self

    @model_validator(mode="after")
    def _cut_offs_are_counts(self):
        if min(self.ks) < 1 or len(set(self.ks)) < len(self.ks):
            raise ValueError(f"ks {list(self.ks)}: expected distinct numbers from 1")
        return self


class PredictSettings(Settings):
    """Captions of new slides, by rule `coca_predict`."""

    slides: str | None = Field(None, description="folder of new slides; null: nothing is predicted")
    texts: tuple[str, ...] = Field((), description="texts to compare each new slide with")
    model: str | None = Field(
        None, description="folder with model.safetensors and tokenizer/, as a model card's; null: the one trained here"
    )

    @model_validator(mode="after")
    def _texts_say_something(self):
        if not all(one.strip() for one in self.texts):
            raise ValueError("texts holds a blank one")
        return self


class CocaSettings(VariedSettings):
    """Pipeline `coca`: slide embeddings and report texts to a CoCa model, its captions and retrieval scores."""

    stages: ClassVar[dict[str, tuple[str, ...]]] = {"encode": ("encoder",), "train": ("model", "train")}
    seeded: ClassVar[tuple[str, ...]] = ("train.seed",)

    slides: str = Field("data/slides", description="folder of tile embeddings, one .h5 per slide, at any depth")
    labels: str = Field("data/slides/labels.json", description="{slide: text}, UTF-8")
    list: ListSettings = ListSettings()
    split: SplitSettings = SplitSettings()
    tokenizer: TokenizerSettings = TokenizerSettings()
    encoder: EncoderSettings = EncoderSettings()
    model: ModelSettings = ModelSettings()
    train: TrainSettings = TrainSettings()
    encode: EncodeSettings = EncodeSettings()
    caption: CaptionSettings = CaptionSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    predict: PredictSettings = PredictSettings()
    resources: Literal["gpu_single", "gpu_node", "multi_node"] = execution(
        "gpu_single", description="class of the rules that train and encode"
    )


def slides_to_predict(coca: CocaSettings) -> str:
    """The folder of new slides.

    Raises:
        KilnError: none is set.
    """
    if coca.predict.slides is None:
        raise KilnError("coca.predict.slides is not set", "set it to the folder of the slides to be captioned")
    return coca.predict.slides
