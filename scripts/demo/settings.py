"""Settings of the embedded demo data."""

from pydantic import Field, model_validator

from scripts.busi.settings import PROMPT, ListSettings
from scripts.common.settings import Settings
from scripts.demo.vase_questions import DESCRIBE, QUESTIONS
from scripts.demo.vase_shapes import SHAPES

# every word that is true of a drawn vase
TECHNIQUES = ("black-figure", "red-figure")
VASE_ANSWERS = (
    *TECHNIQUES,
    *SHAPES,
    *(f"{technique} {shape}" for technique in TECHNIQUES for shape in SHAPES),
    *("Athenian", "Corinthian", "Apulian", "warriors", "dancers", "riders", "athletes"),
    *("meander", "dots", "tongues", "waves", "chevrons", "checkers"),
    *("Key Painter", "Pearl Painter", "Tongue Painter", "Harbour Painter", "Zigzag Painter", "Chessboard Painter"),
    "unattributed",
    *(f"{year} to {year + 25}" for year in range(-575, -425, 25)),
)
BUSI_ANSWERS = ListSettings().classes


class DrawSettings(Settings):
    """The vases that are drawn; no vase is in two of raw-only, labelled-only and CLIP pictures."""

    seed: int = Field(0, ge=0, description="of all that is drawn here")
    vases: int = Field(110, gt=0, description="raw vases, six views each")
    labelled_vases: int = Field(220, gt=0, description="vases with labels for the quality classifier only")
    shared_vases: int = Field(30, ge=0, description="raw vases that have labels too, as the same files")
    clip_vases: int = Field(280, gt=0, description="vases of the pictures that the demo's CLIP learns from")
    shapes: tuple[str, ...] = Field(tuple(SHAPES), min_length=1, description="shapes to draw from")
    image_size: int = Field(128, ge=32, description="square pictures, in pixels")
    flawed: float = Field(0.35, ge=0, le=1, description="share of views of low quality")


class DemoClipSettings(Settings):
    """The demo's own CLIP, trained from scratch."""

    seed: int = Field(0, ge=0, description="of new weights and order")
    image_size: int = Field(64, ge=32, multiple_of=32, description="square input in pixels")
    vision_width: int = Field(16, ge=8, multiple_of=8, description="channels of the ResNet's first stage")
    vision_layers: tuple[int, int, int, int] = Field((1, 1, 1, 1), description="blocks of the ResNet's stages")
    text_width: int = Field(64, ge=32, multiple_of=32, description="width of the text layers")
    text_layers: int = Field(2, gt=0, description="layers of the text tower")
    embed_dim: int = Field(64, gt=0, description="width of what both towers give")
    context_length: int = Field(24, ge=16, description="tokens per caption or prompt; longer ones are cut")
    epochs: int = Field(28, gt=0, description="passes over the pictures")
    batch_size: int = Field(96, gt=1, description="pictures per optimiser step")
    lr: float = Field(2e-3, gt=0, description="AdamW's highest learning rate")
    weight_decay: float = Field(0.05, ge=0, description="AdamW's")
    warmup: float = Field(0.1, ge=0, lt=1, description="share of steps with a growing learning rate")
    held_out: float = Field(0.1, gt=0, lt=1, description="share of vases kept for the retrieval metrics")


class DemoVlmSettings(Settings):
    """The demo's own vision-language model: a tiny Qwen2.5-VL, pre-trained on pictures of shapes."""

    seed: int = Field(0, ge=0, description="of pictures, new weights and order")
    hidden: int = Field(64, ge=64, multiple_of=64, description="width of the language model")
    layers: int = Field(2, gt=0, description="layers of the transformer")
    vision_hidden: int = Field(64, ge=64, multiple_of=64, description="width of the vision encoder")
    vision_depth: int = Field(2, gt=0, description="layers of the vision encoder")
    image_side: int = Field(112, ge=56, multiple_of=14, description="pictures have about its square in pixels")
    pictures: int = Field(4000, gt=0, description="pictures to learn from")
    coloured: float = Field(0.3, gt=0, lt=1, description="share of coloured forms; the others are grey blobs")
    held_out: int = Field(400, gt=0, description="further pictures, for the metrics only")
    steps: int = Field(900, gt=0, description="optimiser steps")
    batch_size: int = Field(16, gt=0, description="pictures per optimiser step")
    lr: float = Field(3e-3, gt=0, description="AdamW's highest learning rate")
    warmup: float = Field(0.1, gt=0, lt=1, description="share of steps with a growing learning rate")
    classify: float = Field(
        1.0,
        ge=0,
        description="weight of the loss of linear classifiers on the vision encoder, beside the answers' loss",
    )
    say: float = Field(0.5, ge=0, le=1, description="further questions, which only ask to repeat a word, per question")
    words: tuple[str, ...] = Field(
        VASE_ANSWERS + BUSI_ANSWERS,
        min_length=1,
        description="what the pipelines' answers are made of; to be repeated, since a LoRA cannot learn new embeddings",
    )
    texts: tuple[str, ...] = Field(
        (PROMPT, *QUESTIONS.values(), DESCRIBE),
        description="prompts of the pipelines; with words and questions, what tokens are made of",
    )


class UltrasoundSettings(Settings):
    """The breast ultrasound pictures that are drawn, their planted twins among them."""

    seed: int = Field(0, ge=0, description="of all that is drawn here")
    normal: int = Field(130, gt=0, description="pictures, twins included")
    benign: int = Field(180, gt=0, description="pictures, twins included")
    malignant: int = Field(140, gt=0, description="pictures, twins included")
    image_size: int = Field(144, ge=48, description="mean side in pixels; widths and heights vary by 18 %")
    ambiguous: float = Field(0.2, ge=0, le=1, description="share of lesions with few signs of their class")
    second_lesion: float = Field(0.1, ge=0, le=1, description="share of lesion pictures with two lesions")
    identical: int = Field(12, ge=0, description="twins with the same pixels, every third with other bytes")
    near: int = Field(36, ge=0, description="twins of the same class with almost the same pixels")
    conflicts: int = Field(2, ge=0, description="almost the same pixels, once benign and once malignant")
    published_test: float = Field(0.2, gt=0, lt=1, description="test share of the leaky split that goes with them")


class DigitsSettings(Settings):
    """The pictures of handwritten digits among drawn shapes, a class folder for each digit."""

    seed: int = Field(0, ge=0, description="of all that is drawn here")
    pictures: int = Field(1797, gt=0, le=1797, description="of scikit-learn's 1,797 digits, one in each")
    image_size: int = Field(64, ge=32, description="square pictures, in pixels")


class SlidesSettings(Settings):
    """The slides that are drawn: tile embeddings, report sentences, patients."""

    seed: int = Field(0, ge=0, description="of all that is drawn here")
    slides: int = Field(400, gt=0, description="slides that are drawn")
    patients: int = Field(250, gt=0, description="each has a slide at least")
    dim: int = Field(2560, gt=0, description="features per tile")
    min_tiles: int = Field(50, gt=0, description="tiles of the smallest slides")
    max_tiles: int = Field(3000, gt=0, description="tiles of the largest slides; small ones are more common")

    @model_validator(mode="after")
    def _fits(self):
        if self.slides < self.patients:
            raise ValueError(f"slides {self.slides} must be at least patients {self.patients}")
        if self.max_tiles < self.min_tiles:
            raise ValueError(f"max_tiles {self.max_tiles} must be at least min_tiles {self.min_tiles}")
        return self


class FiguresSettings(Settings):
    """The figures that are drawn, in tar shards: a part of their articles here, the others on the demo's hub."""

    seed: int = Field(0, ge=0, description="of all that is drawn here")
    figures: int = Field(2500, gt=0, description="pairs of figure and caption, in articles of one to four")
    local: float = Field(0.2, gt=0, lt=1, description="share of articles in local shards")
    min_side: int = Field(96, ge=32, description="pixels of the shortest side of a figure")
    max_side: int = Field(128, ge=32, description="pixels of the longest side")
    samples_per_shard: int = Field(200, gt=1, description="pairs of a shard")
    flawed: float = Field(
        0.02, ge=0, lt=1, description="share of pairs that cannot be used, or lack their json, by turns"
    )
    repo: str = Field("kiln/figures", pattern=r"^[\w.-]+/[\w.-]+$", description="data set on the demo's hub")

    @model_validator(mode="after")
    def _fits(self):
        if self.max_side < self.min_side:
            raise ValueError(f"max_side {self.max_side} must be at least min_side {self.min_side}")
        return self


class EncoderModelSettings(Settings):
    """A frozen encoder with random weights, in the real class."""

    seed: int = Field(0, ge=0, description="of the random weights")
    input_size: int = Field(gt=0, description="side in pixels; a multiple of patch")
    patch: int = Field(gt=0, description="side in pixels")
    width: int = Field(192, gt=0, description="of the latents; a multiple of heads")
    layers: int = Field(2, gt=0, description="layers of the transformer")
    heads: int = Field(4, gt=0, description="attention heads")


class DemoEncodersSettings(Settings):
    """The demo's encoders; both have a grid of 8 x 8 patches."""

    dinov2: EncoderModelSettings = EncoderModelSettings(input_size=56, patch=7)
    siglip2: EncoderModelSettings = EncoderModelSettings(input_size=64, patch=8)


class PublishedVlmSettings(Settings):
    """A Qwen2.5-VL with random weights; the defaults are the published 7B's shapes."""

    seed: int = Field(0, ge=0, description="of the random weights")
    hidden: int = Field(3584, gt=0, description="width of the language model; a multiple of heads")
    layers: int = Field(28, gt=0, description="of the language model; fewer of the same width take less time and disk")
    heads: int = Field(28, gt=0, description="attention heads")
    kv_heads: int = Field(4, gt=0, description="heads of keys and values")
    mlp: int = Field(18944, gt=0, description="width of the feed-forward layers")
    vocabulary: int = Field(152064, ge=1000, description="rows of the embedding; words that no text has fill them up")
    tied: bool = Field(False, description="the head has the embedding's weights")
    vision_hidden: int = Field(1280, gt=0, description="width of the vision encoder; a multiple of vision_heads")
    vision_depth: int = Field(32, gt=0, description="layers of the vision encoder")
    vision_heads: int = Field(16, gt=0, description="attention heads of the vision encoder")
    vision_mlp: int = Field(3420, gt=0, description="width of the feed-forward layers of the vision encoder")


class PublishedClipSettings(Settings):
    """One of open_clip's models with random weights; the default is OpenAI's ViT-B/32."""

    seed: int = Field(0, ge=0, description="of the random weights")
    name: str = Field("ViT-B-32-quickgelu", description="open_clip's name of the architecture")


class PublishedWeightsSettings(Settings):
    """VGG16 and Inception with random weights."""

    seed: int = Field(0, ge=0, description="of the random weights")


class PublishedSettings(Settings):
    """Published architectures with random weights, for config/smoke.yaml."""

    vlm: PublishedVlmSettings = PublishedVlmSettings()
    clip: PublishedClipSettings = PublishedClipSettings()
    weights: PublishedWeightsSettings = PublishedWeightsSettings()


class DemoSettings(Settings):
    """The embedded demo."""

    draw: DrawSettings = DrawSettings()
    clip: DemoClipSettings = DemoClipSettings()
    vlm: DemoVlmSettings = DemoVlmSettings()
    ultrasound: UltrasoundSettings = UltrasoundSettings()
    digits: DigitsSettings = DigitsSettings()
    slides: SlidesSettings = SlidesSettings()
    figures: FiguresSettings = FiguresSettings()
    encoders: DemoEncodersSettings = DemoEncodersSettings()
    published: PublishedSettings = PublishedSettings()
