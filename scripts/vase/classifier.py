"""The image-quality classifier: a torchvision ResNet with the published head, and its transforms.

Head (VaseVQA-3D, Train/filter/model.py): Linear d->512, ReLU, Dropout 0.5, 512->256, ReLU,
Dropout 0.3, 256->2; class 0 is low quality, 1 high quality.
"""

import json
from collections.abc import Callable
from pathlib import Path

import torch
import torchvision
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision.transforms import v2

from scripts.common.errors import KilnError
from scripts.vase.settings import ClassifierSettings

CLASSES = ("low quality", "high quality")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def build(settings: ClassifierSettings) -> nn.Module:
    """A classifier with random weights: [B,3,S,S] float -> [B,2] logits."""
    model = getattr(torchvision.models, settings.arch)(weights=None)
    wide, narrow = settings.hidden
    drop_wide, drop_narrow = settings.dropout
    model.fc = nn.Sequential(
        nn.Linear(model.fc.in_features, wide),
        nn.ReLU(),
        nn.Dropout(drop_wide),
        nn.Linear(wide, narrow),
        nn.ReLU(),
        nn.Dropout(drop_narrow),
        nn.Linear(narrow, len(CLASSES)),
    )
    return model


def load_backbone(model: nn.Module, path: Path) -> None:
    """Put ImageNet weights (.pth or .safetensors, torchvision's names) into all but the head.

    Raises:
        KilnError: the file is of another architecture, or unreadable.
    """
    state = {k: v for k, v in _read_state(path).items() if not k.startswith("fc.")}
    own = {k: v for k, v in model.state_dict().items() if not k.startswith("fc.")}
    # torchvision's older files do not count the batches that a batch norm has seen; nothing here needs that
    counts = {k: v for k, v in own.items() if k.endswith(".num_batches_tracked")}
    state = counts | state
    _check_state(own, state, path)
    model.load_state_dict(state, strict=False)


def _read_state(path: Path) -> dict[str, torch.Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict):
            raise TypeError(f"it holds a {type(state).__name__}")
        return state
    except FileNotFoundError:
        raise KilnError(f"{path}: no such weights", "check the path, or name a row of config/models.csv") from None
    except Exception as error:
        raise KilnError(f"{path}: unreadable weights: {error}", "expected a state dict, .pth or .safetensors") from None


def _check_state(own: dict, given: dict, path: Path) -> None:
    missing, extra = sorted(own.keys() - given.keys()), sorted(given.keys() - own.keys())
    unlike = [k for k in sorted(own.keys() & given.keys()) if own[k].shape != given[k].shape]
    if missing or extra or unlike:
        shown = [f"{len(missing)} tensors missing, such as {missing[0]}"] if missing else []
        shown += [f"{len(extra)} unknown, such as {extra[0]}"] if extra else []
        if unlike:
            k = unlike[0]
            shown.append(f"{k} is {list(given[k].shape)}, expected {list(own[k].shape)}")
        raise KilnError(f"{path}: weights of another architecture: {'; '.join(shown)}", "check vase.classifier.arch")


def save(model: nn.Module, settings: ClassifierSettings, path: Path) -> None:
    """Weights as safetensors; one metadata key holds what is needed to load them again."""
    facts = settings.model_dump(mode="json", include={"arch", "image_size", "hidden", "dropout", "decode"})
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, path, metadata={"kiln": json.dumps(facts, sort_keys=True)})


def load(path: Path) -> tuple[nn.Module, ClassifierSettings]:
    """A classifier that `save` wrote, in evaluation mode, and the settings that describe it.

    Raises:
        KilnError: it is no such file.
    """
    try:
        with safe_open(path, framework="pt") as handle:
            facts = json.loads((handle.metadata() or {})["kiln"])
    except (OSError, KeyError, ValueError) as error:
        raise KilnError(f"{path}: no Kiln classifier: {error}", "give classifier.safetensors") from None
    except Exception as error:  # safetensors raises an error class of its own
        raise KilnError(f"{path}: unreadable: {error}", "give classifier.safetensors of a finished run") from None
    settings = ClassifierSettings(**facts)
    model = build(settings)
    state = load_file(path)
    _check_state(model.state_dict(), state, path)
    model.load_state_dict(state)
    return model.eval(), settings


def decode_size(settings: ClassifierSettings) -> int | None:
    """Least side of a decoded JPEG in pixels, None for a full decode; see `images.open_rgb`."""
    return 2 * settings.image_size if settings.decode == "reduced" else None


def evaluation_transform(size: int) -> Callable[[Image.Image], torch.Tensor]:
    """RGB image -> [3,size,size] float32, ImageNet-normalised."""
    return v2.Compose([*_to_square(size), *_to_normalised()])


def training_transform(size: int) -> Callable[[Image.Image], torch.Tensor]:
    """The published augmentation, then as in evaluation; draws from torch's global generator."""
    return v2.Compose(
        [
            *_to_square(size),
            v2.RandomHorizontalFlip(0.5),
            v2.RandomRotation(10),
            v2.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2, hue=0.1),
            *_to_normalised(),
        ]
    )


def _to_square(size: int) -> list[nn.Module]:
    return [v2.ToImage(), v2.Resize((size, size), antialias=True)]


def _to_normalised() -> list[nn.Module]:
    return [v2.ToDtype(torch.float32, scale=True), v2.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
