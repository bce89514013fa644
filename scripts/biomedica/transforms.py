"""From pictures to what a CLIP model sees: open_clip's own transforms, cut where readers end and the device begins.

Readers give uint8 [3,H,W], a quarter of float32, which is normalised on the device.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import Tensor
from torchvision.transforms import Compose, Normalize, PILToTensor, RandomResizedCrop, functional


def evaluation_transform(preprocess: Mapping[str, Any]) -> Compose:
    """open_clip's evaluation transform without normalisation: PIL image -> uint8 [3,H,W]."""
    made = image_transform_v2(PreprocessCfg(**preprocess), is_train=False)
    return Compose([*made.transforms[:-2], PILToTensor()])  # without the last two, to float and Normalize


class TrainTransform:
    """open_clip's training transform without normalisation: PIL image, seed -> uint8 [3,H,W].

    Args:
        preprocess: `preprocess_cfg` of the model.
        crop_scale: least and greatest share of the image's area in a crop.

    Attributes:
        size: (H, W).
    """

    def __init__(self, preprocess: Mapping[str, Any], crop_scale: Sequence[float]):
        made = image_transform_v2(PreprocessCfg(**preprocess), is_train=True, aug_cfg={"scale": tuple(crop_scale)})
        self.crop: RandomResizedCrop = made.transforms[0]
        self.size = tuple(self.crop.size)
        self.rest = Compose([*made.transforms[1:-2], PILToTensor()])

    def __call__(self, image: Image.Image, seed: int) -> Tensor:
        crop = self.crop
        top, left, height, width = crop_box(image, crop.scale, crop.ratio, torch.Generator().manual_seed(seed))
        cut = functional.resized_crop(image, top, left, height, width, crop.size, crop.interpolation)
        return self.rest(cut)


def crop_box(
    image: Image.Image, scale: Sequence[float], ratio: Sequence[float], generator: torch.Generator
) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a random crop: `RandomResizedCrop.get_params`, draw by draw.

    Written again because torchvision draws from the process's generator, which reading threads share.
    """
    width, height = image.size
    low, high = torch.log(torch.tensor(ratio))
    for _ in range(10):
        area = width * height * torch.empty(1).uniform_(*scale, generator=generator).item()
        aspect = torch.exp(torch.empty(1).uniform_(low, high, generator=generator)).item()
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top = torch.randint(0, height - h + 1, (1,), generator=generator).item()
            return top, torch.randint(0, width - w + 1, (1,), generator=generator).item(), h, w
    w, h = width, height  # too long for its area: the middle
    if width / height < min(ratio):
        h = round(width / min(ratio))
    elif width / height > max(ratio):
        w = round(height * max(ratio))
    return (height - h) // 2, (width - w) // 2, h, w


def normalise(images: Tensor, preprocess: Mapping[str, Any]) -> Tensor:
    """uint8 [n,3,H,W] -> float32 of the same shape and device, by mean and std of `preprocess`."""
    return Normalize(preprocess["mean"], preprocess["std"])(images.float() / 255)
