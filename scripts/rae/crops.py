"""From RGB pictures of any size to squares: the evaluation's centre crop and the training's random crop."""

import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, functional


def center_crop_arr(image: Image.Image, size: int) -> Image.Image:
    """The centre square of side `size`, as ADM takes it (Dhariwal & Nichol 2021, `image_datasets.py`).

    The picture is halved (BOX, sides rounded down) while its shorter side is at least 2 * size, resized (BICUBIC) to a
    shorter side of `size`, and cut in the middle; of an odd surplus the smaller half goes left and top.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def to_tensor(image: Image.Image) -> torch.Tensor:
    """RGB picture -> [3,H,W] float32 in [0,1]."""
    return functional.to_tensor(image)


def random_crop(image: Image.Image, size: int, generator: torch.Generator) -> torch.Tensor:
    """RAE's published training transform: RGB picture -> [3,size,size] float32 in [0,1].

    The shorter side is resized to 1.5 * size (384 for 256; bicubic, antialiased) and a square is cut out at a place
    that `generator` draws, top before left; there is no flip.
    """
    image = functional.resize(image, int(1.5 * size), InterpolationMode.BICUBIC)
    top, left = (int(torch.randint(side - size + 1, (1,), generator=generator)) for side in (image.height, image.width))
    return to_tensor(functional.crop(image, top, left, size, size))
