"""Pictures and models that the benchmarks of pipeline `rae` measure with: drawn JPEGs, and weights that no one trained,
in the real layouts."""

import functools
from pathlib import Path

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torchvision.models.vgg import cfgs, make_layers
from transformers import BitImageProcessor, Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from benchmarks import pictures
from scripts.demo import initialise_weights
from scripts.rae import checkpoints
from scripts.rae.decoder import Decoder, Size
from scripts.rae.discriminator import RECIPES
from scripts.rae.encoder import Encoder

WIDTH, HEIGHT = 500, 375  # about ImageNet's size, 106 KB
DISTINCT, CLASSES = 64, 10


def draw_images(folder: Path, train: int, validation: int, width: int = WIDTH, height: int = HEIGHT) -> int:
    """Class folders below train/ and validation/; returns all bytes.

    After the first 64 pictures come copies, each with a comment of its own, so that no two files are equal.
    """
    drawn = [pictures.draw_jpeg(number, width, height) for number in range(min(train + validation, DISTINCT))]
    total = 0
    for number in range(train + validation):
        split = "validation" if number < validation else "train"
        data = pictures.with_note(drawn[number % len(drawn)], number)
        path = folder / split / f"class{number % CLASSES}" / f"{number:08d}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        total += len(data)
    return total


def write_encoder(folder: Path, **changes) -> None:
    """A DINOv2 with registers, of base size but for `changes`."""
    torch.manual_seed(0)
    config = {"image_size": 518, "patch_size": 14, "num_register_tokens": 4} | changes
    Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**config)).save_pretrained(folder)
    BitImageProcessor().save_pretrained(folder)


def write_vgg(path: Path) -> None:
    """VGG16 in torchvision's layout, without its classifier."""
    torch.manual_seed(0)
    features = make_layers(cfgs["D"])
    _he_normal(features)
    torch.save({f"features.{name}": tensor for name, tensor in features.state_dict().items()}, path)


def write_dino(path: Path, recipe: str = "S_8") -> None:
    """The DINO ViT of a published recipe, as timm saves it."""
    torch.manual_seed(0)
    one = RECIPES[recipe]
    norm = functools.partial(nn.LayerNorm, eps=1e-6)
    vit = VisionTransformer(
        img_size=one.size, patch_size=one.patch, num_classes=0, embed_dim=one.dim, depth=one.depth,
        num_heads=one.heads, norm_layer=norm,
    )  # fmt: skip
    torch.save(vit.state_dict(), path)


def write_inception(path: Path) -> None:
    """torch-fidelity's Inception; with the default start all its features would be alike."""
    torch.save(initialise_weights.build("inception", 0).state_dict(), path)


def write_checkpoint(path: Path, encoder_folder: Path, input_size: int, image_size: int, size: Size) -> None:
    """An autoencoder whose pictures have a grain, so that they cost a PNG about as much as photographs do."""
    torch.manual_seed(0)
    encoder = Encoder(encoder_folder, input_size)
    decoder = Decoder(encoder.dim, encoder.grid, image_size, size)
    with torch.no_grad():
        decoder.decoder_pred.weight *= 0.15
    shape = (encoder.dim, encoder.grid, encoder.grid)
    facts = checkpoints.Facts("dinov2", checkpoints.identity(encoder_folder), input_size, image_size, size, 0.0, 0)
    checkpoints.save(path, decoder, torch.zeros(shape), torch.ones(shape), facts)


def _he_normal(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
