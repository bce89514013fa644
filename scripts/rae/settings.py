"""Settings of pipeline `rae`."""

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from scripts.common.errors import KilnError
from scripts.common.settings import Settings, execution
from scripts.common.variants import VariedSettings

CUT_FROM_TRAIN = "cut from train"  # what a dataset's summary calls a validation split of that origin
VALIDATION = ("validation", "val")  # what the split is called, unless `validation_split` says so


class DatasetSettings(Settings):
    """How raw images become the Arrow dataset."""

    source: Literal["folders", "arrow", "hub"] = Field(
        "folders",
        description="folders: class folders of images; arrow: a folder that datasets.load_from_disk reads, used as it "
        "is; hub: parquet files of a data set of the Hugging Face hub, which rule retrieve_dataset brings",
    )
    repo: str = Field(
        "ILSVRC/imagenet-1k",
        pattern=r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$",
        description="of source hub: owner/name",
    )
    revision: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9][\w./-]*$",
        description="of source hub: a branch, tag or commit; null: the default branch. Locked at first retrieval",
    )
    parquet: str = Field(
        "data/{split}-*.parquet",
        pattern=r"^[\w./*?+-]*\{split\}[\w./*?+-]*$",
        description="of source hub: a split's files in the repo; * and ? match within one folder's name",
    )
    train_split: str = Field("train", min_length=1, description="folder, or split, to train on")
    validation_split: str | None = Field(
        None, description="that to validate on; null: validation or val, and without them a share cut from train"
    )
    labels: str | None = Field(
        None, description="of a flat validation folder: a file of lines `name label`, by class folder or its index"
    )
    train_share: float = Field(0.95, gt=0, lt=1, description="of each class, where validation is cut from train")
    seed: int = Field(42, ge=0, description="of that cut")
    images_per_shard: int = Field(2000, gt=0, description="of source folders")
    max_pixels: int = Field(89_478_485, gt=0, description="larger images are quarantined as decompression bombs")
    verify: Literal["headers", "full"] = Field(
        "headers",
        description="headers: header, size and end marker of each image; full: every image is decoded, too, "
        "which finds damage inside PNGs; JPEG decoders pass over it",
    )
    processes: int = execution(8, ge=1, description="processes that read and check images, one shard each")

    def parquet_files(self, split: str) -> str:
        """The pattern of a split's files in the repo."""
        return self.parquet.replace("{split}", split)

    def wanted(self) -> dict[str, str | list[str]]:
        """What rule retrieve_dataset is to bring."""
        files = [self.parquet_files(split) for split in (self.train_split, self.validation_split) if split]
        optional = [] if self.validation_split else [self.parquet_files(split) for split in VALIDATION]
        return {"source": self.repo, "revision": self.revision or "", "files": files, "optional": optional}


class EncoderSettings(Settings):
    """A frozen encoder; its width, patch and grid are read from the model itself."""

    model: str = Field(description="a name in config/models.csv, or a folder that transformers loads")
    input_size: int = Field(gt=0, description="side in pixels of what it sees; a multiple of its patch")


class DecoderSettings(Settings):
    """The trained decoder, a ViT; its patch follows from `rae.image_size` and the encoder's grid."""

    size: Literal["ViT-B", "ViT-L", "ViT-XL", "free"] = Field("ViT-XL", description="free: the four numbers below")
    layers: int = Field(4, gt=0, description="of a free size")
    width: int = Field(128, gt=0, multiple_of=4, description="of a free size")
    mlp: int = Field(512, gt=0, description="of a free size")
    heads: int = Field(4, gt=0, description="of a free size")

    @model_validator(mode="after")
    def _whole_heads(self):
        if self.width % self.heads:
            raise ValueError(f"width {self.width} must be a multiple of heads {self.heads}")
        return self


class LatentStatsSettings(Settings):
    """Mean and variance of clean latents over the train split, from centre crops."""

    flip: bool = Field(True, description="take in each image and its mirror image, as published runs do at random")
    batch_size: int = Field(256, gt=0, description="it enters the last digits")
    images_per_part: int = Field(10_000, gt=0, description="images whose moments are kept apart, and resumed from")
    precision: Literal["fp32", "bf16", "fp16"] = Field("fp32", description="autocast type; fp16 needs a GPU")
    workers: int = execution(8, ge=0, description="processes that decode images")


class PerceptualSettings(Settings):
    """LPIPS."""

    weights: str | None = Field(
        "vgg16-imagenet1k-v1", description="VGG16 in torchvision's layout: a name in config/models.csv or a .pth file"
    )
    backbone: tuple[int, ...] | None = Field(
        None, description="in place of VGG16: widths of a small stack with random weights; not comparable"
    )


class DiscriminatorSettings(Settings):
    """The discriminator: light heads over a frozen DINO ViT."""

    recipe: Literal["S_8", "S_16", "B_16", "free"] = Field("S_8", description="free: the six values below, random")
    weights: str | None = Field(
        "dino-vit-small-patch8-224", description="of S_8, S_16, B_16: a name in config/models.csv or a .pth file"
    )
    kernel: int = Field(9, gt=0, description="odd width of the heads' second convolution")
    norm: Literal["bn", "gn"] = Field("bn", description="bn: per-sample statistics over tokens; gn: 32 groups")
    cutout: float = Field(0.0, ge=0, le=1, description="DiffAugment's box, as a share of the sides; 0 is off")
    augment_prob: float = Field(1.0, ge=0, le=1, description="of each kind of DiffAugment, once per batch")
    patch: int = Field(8, gt=0, description="of a free recipe")
    dim: int = Field(32, gt=0, description="of a free recipe")
    depth: int = Field(3, gt=0, description="of a free recipe")
    heads: int = Field(2, gt=0, description="of a free recipe")
    taps: tuple[int, ...] = Field((0, 2), description="of a free recipe: blocks whose tokens heads read")
    size: int = Field(64, gt=0, description="of a free recipe: side that images are resized to")


class RfidSettings(Settings):
    """rFID while training, by the features of `rae.evaluate.extractor`; as a whole it decides no weight."""

    every_n_steps: int = Field(1000, ge=0, description="optimiser steps between scores; 0 is off")
    every_epoch: bool = Field(False, description="score at the end of each epoch, too")
    num_samples: int = Field(1000, gt=1, description="pictures, spread through the classes; all where there are fewer")
    batch_size: int = Field(64, gt=0, description="pictures per forward pass")
    save_samples: bool = Field(False, description="with each score a sheet of its pictures beside reconstructions")
    save_count: int = Field(64, gt=0, description="pictures of that sheet")
    on_train: bool = Field(False, description="of training pictures, not validation's; the tag is rfid_train/score")


class AutoencoderSettings(Settings):
    """Stage 1: L1 + LPIPS + adaptive hinge GAN on a frozen encoder's noisy latents (arXiv:2510.11690)."""

    original_names: ClassVar[dict[str, str]] = {
        "pretrained_decoder_path": "init_from",
        "noise_tau": "tau",
        "global_batch_size": "batch_size",
        "perceptual_weight": "lpips_weight",
        "disc_weight": "gan_weight",
        "disc_start": "gan_start",
        "disc_upd_start": "discriminator_start",
    }

    tau: float = Field(0.8, ge=0, description="greatest standard deviation of the latents' noise, U(0, tau) per sample")
    epochs: int = Field(16, gt=0, description="passes over the train split")
    batch_size: int = Field(512, gt=0, description="images per optimiser step over all processes")
    accumulation: int = Field(1, gt=0, description="forward passes per optimiser step")
    lr: float = Field(2e-4, gt=0, description="AdamW's highest learning rate for the decoder")
    final_lr: float = Field(2e-5, ge=0, description="of the cosine's last step")
    warmup_epochs: float = Field(1, ge=0, description="epochs with a growing learning rate")
    betas: tuple[float, float] = Field((0.9, 0.95), description="AdamW's two")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's")
    discriminator_lr: float = Field(
        2e-4, gt=0, description="AdamW's highest learning rate for the discriminator's heads"
    )
    ema_decay: float = Field(0.9978, gt=0, lt=1, description="of the decoder's moving average, once per optimiser step")
    clip_grad: float = Field(0.0, ge=0, description="greatest norm of the decoder's gradient; 0 is off")
    lpips_weight: float = Field(1.0, ge=0, description="of LPIPS beside L1")
    lpips_start: int = Field(0, ge=0, description="first epoch with LPIPS, counted from 0")
    gan_weight: float = Field(0.75, ge=0, description="times the adaptive weight")
    gan_start: int = Field(8, ge=0, description="first epoch whose generator loss counts")
    discriminator_start: int = Field(6, ge=0, description="first epoch in which the discriminator learns")
    init_from: str | None = Field(
        None,
        description="decoder to start from: an autoencoder.safetensors, or a published model.pt, by its path or its "
        "name in config/models.csv",
    )
    precision: Literal["fp32", "bf16", "fp16"] = Field("bf16", description="autocast type on a GPU")
    compile: bool = Field(False, description="torch.compile of encoder and decoder")
    deterministic: bool = Field(False, description="deterministic GPU kernels, for byte-identical GPU runs")
    seed: int = Field(42, ge=0, description="of new weights, order, crops and noise")
    workers: int = execution(8, ge=0, description="processes that decode images")
    save_minutes: float = execution(10.0, ge=0, description="time between saves of the training state")
    budget_minutes: float | None = execution(None, ge=0, description="save and exit non-zero after this time")
    stall_minutes: float | None = execution(30.0, gt=0, description="without a step in this time: exit non-zero")
    tracker: Literal["tensorboard", "wandb", "none"] = execution(
        "tensorboard", description="where curves go, beside metrics.json; it decides no number"
    )
    sample_every: int = execution(
        2500, ge=0, description="optimiser steps between sheets of validation pictures beside reconstructions; 0 is off"
    )
    rfid: RfidSettings = execution(RfidSettings(), description="rFID while training")

    def check_share(self, processes: int) -> None:
        """Refuse a batch that processes and passes cannot share evenly.

        Raises:
            KilnError: names the multiple that they can.
        """
        share = processes * self.accumulation
        if self.batch_size % share:
            raise KilnError(
                f"rae.autoencoder.batch_size {self.batch_size} over {processes} processes, one per GPU, and "
                f"{self.accumulation} passes is no whole number",
                f"set it to a multiple of {share}, or change the count of GPUs in the class that rae.resources names",
            )

    @model_validator(mode="after")
    def _whole_steps(self):
        if self.batch_size % self.accumulation:
            raise ValueError(f"batch_size {self.batch_size} must be a multiple of accumulation {self.accumulation}")
        if self.gan_start < self.discriminator_start:
            raise ValueError(
                f"gan_start {self.gan_start} must not be before discriminator_start {self.discriminator_start}: "
                "the generator would learn from a discriminator that never did"
            )
        if not self.warmup_epochs < self.epochs:
            raise ValueError(f"warmup_epochs {self.warmup_epochs} must be fewer than epochs {self.epochs}")
        return self


class EvaluateSettings(Settings):
    """Scores on the validation split."""

    extractor: Literal["inception-v3-compat", "kiln-random"] = Field(
        "inception-v3-compat", description="of rFID's features; kiln-random is for trials, not comparable"
    )
    inception: str | None = Field(
        "inception-v3-compat", description="its weights: a name in config/models.csv or a .pth file"
    )
    max_images: int | None = Field(None, ge=4, description="score these many alone; null: all, as the paper does")
    batch_size: int = Field(64, gt=0, description="pictures per forward pass")
    images_per_part: int = Field(2000, gt=0, description="images whose scores are kept apart, and resumed from")
    precision: Literal["fp32", "bf16", "fp16"] = Field("fp32", description="autocast type; fp16 needs a GPU")
    sheet: int = Field(16, gt=0, description="pictures of the sheet beside their reconstructions")
    workers: int = execution(8, ge=0, description="processes that decode images")


class ByEncoder(Settings):
    """Sections by encoder with defaults of their own, which stay where a user sets some of their keys."""

    @model_validator(mode="before")
    @classmethod
    def _keep_defaults(cls, values):
        if not isinstance(values, dict):
            return values
        fields = cls.model_fields
        return {
            name: fields[name].default.model_dump() | one if isinstance(one, dict) and name in fields else one
            for name, one in values.items()
        }


class EncodersSettings(ByEncoder):
    """The encoders that `rae.use` may name."""

    dinov2: EncoderSettings = EncoderSettings(model="dinov2-with-registers-base", input_size=224)
    siglip2: EncoderSettings = EncoderSettings(model="siglip2-base-patch16-256", input_size=256)
    siglip_so400m: EncoderSettings = Field(
        EncoderSettings(model="siglip-so400m-patch14-384", input_size=378),
        description="SigLIP, version 1, at 378 pixels, the largest multiple of its patch below 384",
    )


class PublishedSettings(Settings):
    """A decoder that others trained and published with its latent statistics, to evaluate as it is."""

    decoder: str | None = Field(None, description="model.pt: a name in config/models.csv, or a file")
    stats: str | None = Field(None, description="stat.pt: a name in config/models.csv, or a file")
    heads: int | None = Field(None, gt=0, description="of its attention, where its size is none of the published ones")
    tau: float = Field(0.8, ge=0, description="greatest noise that it was trained with; kept as information")

    @model_validator(mode="after")
    def _both(self):
        if (self.decoder is None) != (self.stats is None):
            raise ValueError("decoder and stats belong together: set both or none")
        return self


class PublishedEncodersSettings(ByEncoder):
    """What `rae_evaluate_published` evaluates for each encoder that `rae.use` names."""

    dinov2: PublishedSettings = PublishedSettings(
        decoder="rae-decoder-dinov2-base-vitxl", stats="rae-stats-dinov2-base"
    )
    siglip2: PublishedSettings = PublishedSettings(
        decoder="rae-decoder-siglip2-base-vitxl", stats="rae-stats-siglip2-base"
    )
    siglip_so400m: PublishedSettings = Field(PublishedSettings(), description="none is published")


class RaeSettings(VariedSettings):
    """Pipeline `rae`: image folders to a representation autoencoder and its rFID."""

    stages: ClassVar[dict[str, tuple[str, ...]]] = {"train": ("decoder", "perceptual", "discriminator", "autoencoder")}
    seeded: ClassVar[tuple[str, ...]] = ("autoencoder.seed",)

    images: str = Field("data/imagenet", description="folder with train/ and val/, or class folders alone")
    dataset: DatasetSettings = DatasetSettings()
    use: list[Literal["dinov2", "siglip2", "siglip_so400m"]] = Field(
        ["dinov2", "siglip2"], min_length=1, description="encoders to build autoencoders for"
    )
    encoders: EncodersSettings = EncodersSettings()
    image_size: int = Field(256, gt=0, description="side in pixels of the pictures; a multiple of each encoder's grid")
    decoder: DecoderSettings = DecoderSettings()
    latent_stats: LatentStatsSettings = LatentStatsSettings()
    perceptual: PerceptualSettings = PerceptualSettings()
    discriminator: DiscriminatorSettings = DiscriminatorSettings()
    autoencoder: AutoencoderSettings = AutoencoderSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    published: PublishedEncodersSettings = PublishedEncodersSettings()
    resources: Literal["gpu_single", "gpu_node", "multi_node"] = execution(
        "gpu_node", description="class of the rules with a model"
    )


def published_encoders(rae: RaeSettings) -> list[str]:
    """The encoders in use, each of which has a published decoder.

    Raises:
        KilnError: one has none.
    """
    for name in rae.use:
        if getattr(rae.published, name).decoder is None:
            raise KilnError(
                f"rae.published.{name}: no published decoder is known for encoder {name}",
                f"set rae.published.{name}.decoder and .stats to files, or take {name} off rae.use",
            )
    return rae.use
