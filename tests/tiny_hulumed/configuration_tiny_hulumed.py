"""Configuration of a tiny model with Hulu-Med's calling convention."""

from transformers import Qwen3Config


class TinyHulumedConfig(Qwen3Config):
    model_type = "tiny_hulumed"

    def __init__(
        self,
        vision_width=64,
        vision_depth=2,
        vision_heads=4,
        patch_size=14,
        image_token_index=0,
        use_token_compression=True,
        mm_projector_type="mlp2x_gelu",
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.vision_width = vision_width
        self.vision_depth = vision_depth
        self.vision_heads = vision_heads
        self.patch_size = patch_size
        self.image_token_index = image_token_index
        self.use_token_compression = use_token_compression
        self.mm_projector_type = mm_projector_type
