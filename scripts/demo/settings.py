"""Settings of the embedded demo data."""

from pydantic import Field

from scripts.common.settings import Settings
from scripts.demo.vase_shapes import SHAPES


class DrawSettings(Settings):
    """The vases that are drawn; no vase is in two of raw-only, labelled-only and CLIP pictures."""

    seed: int = Field(0, ge=0)
    vases: int = Field(110, gt=0, description="raw vases, six views each")
    labelled_vases: int = Field(220, gt=0, description="vases with labels for the quality classifier only")
    shared_vases: int = Field(30, ge=0, description="raw vases that have labels too, as the same files")
    clip_vases: int = Field(280, gt=0, description="vases of the pictures that the demo's CLIP learns from")
    shapes: tuple[str, ...] = Field(tuple(SHAPES), min_length=1, description="shapes to draw from")
    image_size: int = Field(128, ge=32, description="square pictures, in pixels")
    flawed: float = Field(0.35, ge=0, le=1, description="share of views of low quality")


class DemoClipSettings(Settings):
    """The demo's own CLIP, trained from scratch."""

    seed: int = Field(0, ge=0)
    image_size: int = Field(64, ge=32, multiple_of=32, description="square input in pixels")
    vision_width: int = Field(16, ge=8, multiple_of=8, description="channels of the ResNet's first stage")
    vision_layers: tuple[int, int, int, int] = Field((1, 1, 1, 1), description="blocks of the ResNet's stages")
    text_width: int = Field(64, ge=32, multiple_of=32)
    text_layers: int = Field(2, gt=0)
    embed_dim: int = Field(64, gt=0)
    context_length: int = Field(24, ge=16, description="tokens per caption or prompt; longer ones are cut")
    epochs: int = Field(28, gt=0)
    batch_size: int = Field(96, gt=1)
    lr: float = Field(2e-3, gt=0, description="AdamW's highest learning rate")
    weight_decay: float = Field(0.05, ge=0)
    warmup: float = Field(0.1, ge=0, lt=1, description="share of steps with a growing learning rate")
    held_out: float = Field(0.1, gt=0, lt=1, description="share of vases kept for the retrieval metrics")


class DemoSettings(Settings):
    """The embedded demo."""

    draw: DrawSettings = DrawSettings()
    clip: DemoClipSettings = DemoClipSettings()
