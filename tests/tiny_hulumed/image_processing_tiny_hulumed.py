"""Pictures to flat patches, as Hulu-Med wants them."""

import numpy as np
from PIL import Image
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's


class TinyHulumedImageProcessor(BaseImageProcessor):
    model_input_names = ["pixel_values", "grid_sizes", "merge_sizes"]

    def __init__(self, patch_size=14, min_tokens=4, max_tokens=64, **kwargs):
        super().__init__(**kwargs)
        self.patch_size, self.min_tokens, self.max_tokens = patch_size, min_tokens, max_tokens

    def grid(self, width, height, merge):
        """Rows and columns of patches: the picture's own proportions, between the least and the most tokens."""
        side = self.patch_size * merge
        scale = 1.0
        tokens = width * height / side**2
        if tokens > self.max_tokens:
            scale = (self.max_tokens / tokens) ** 0.5
        elif tokens < self.min_tokens:
            scale = (self.min_tokens / tokens) ** 0.5
        rounded = np.floor if scale < 1 else np.ceil if scale > 1 else np.round
        return tuple(merge * max(1, int(rounded(length * scale / side))) for length in (height, width))

    def preprocess(self, images, merge_size=1, return_tensors=None, **kwargs):
        patches, grids = [], []
        for image in images:
            rows, columns = self.grid(*image.size, merge_size)
            side = self.patch_size
            resized = image.convert("RGB").resize((columns * side, rows * side), Image.Resampling.BICUBIC)
            pixels = (np.asarray(resized, dtype=np.float32) / 255 - MEAN) / STD
            blocks = pixels.astype(np.float32).reshape(
                rows // merge_size, merge_size, side, columns // merge_size, merge_size, side, 3
            )
            patches.append(blocks.transpose(0, 3, 1, 4, 6, 2, 5).reshape(rows * columns, -1))
            grids.append((1, rows, columns))
        data = {
            "pixel_values": np.concatenate(patches),
            "grid_sizes": np.array(grids),
            "merge_sizes": np.full(len(grids), merge_size),
        }
        return BatchFeature(data=data, tensor_type=return_tensors)
