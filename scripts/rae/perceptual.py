"""LPIPS, the learned perceptual distance, over frozen VGG features (Zhang et al. 2018, arXiv:1801.03924, v0.1)."""

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.models.vgg import cfgs, make_layers

from scripts.common.errors import KilnError

SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
EPSILON, TINY = 1e-10, 1e-30


class Lpips(nn.Module):
    """Perceptual distance of two batches of images; frozen, but differentiable in the images.

    Args:
        weights: state dict of a VGG16 in torchvision's layout (.pth); the linear layers are those of the package
            `lpips`, which brings them along. Nothing is downloaded.
        backbone: channel widths of a small stack instead, two 3x3 convolutions each and a pooling between, with
            random weights and linear layers of 1/C: for trials, not comparable with anything published.
        seed: of the small stack's weights.

    Raises:
        KilnError: neither of the two is given, or both, or `weights` holds no VGG16.
    """

    def __init__(self, weights: Path | None = None, backbone: Sequence[int] | None = None, seed: int = 0):
        super().__init__()
        if (weights is None) == (backbone is None):
            raise KilnError(
                f"LPIPS got weights {weights} and backbone {backbone}: expected exactly one of them",
                "give a VGG16 state dict, or the widths of a small random stack",
            )
        if backbone is None:
            features = make_layers(cfgs["D"])
            load_state(features, weights, "features.", ("classifier.",))
            linear = _published_linear()
        else:
            features = make_layers([x for width in backbone for x in (width, width, "M")])
            _randomise(features, seed)
            linear = [torch.full((width,), 1 / width) for width in backbone]
        self.stages = _split_before_pools(features)
        for i, values in enumerate(linear):
            self.register_buffer(f"linear{i}", values.view(1, -1, 1, 1))
        self.register_buffer("shift", torch.tensor(SHIFT).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor(SCALE).view(1, 3, 1, 1))
        self.requires_grad_(False).eval()

    def features(self, images: Tensor) -> list[Tensor]:
        """Unit-length features [B,C,h,w] of every stage (relu1_2, ... relu5_3), from images [B,3,H,W] in [-1,1]."""
        found, x = [], (images - self.shift) / self.scale
        for stage in self.stages:
            x = stage(x)
            wide = x.to(torch.promote_types(x.dtype, torch.float32))
            # a processor takes 30 times as long for vector_norm along channels; at zero, the root has no gradient
            found.append(wide / (wide.square().sum(dim=1, keepdim=True).clamp_min(TINY).sqrt() + EPSILON))
        return found

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        """Distances [B], at least float32, of two batches [B,3,H,W] in [-1,1].

        Sum over stages of the mean over places of sum_c w_c (a_c - b_c)^2, with features of unit length.
        """
        total = 0.0
        for i, (a, b) in enumerate(zip(self.features(images), self.features(targets), strict=True)):
            total = total + ((a - b).square() * getattr(self, f"linear{i}")).sum(dim=1).mean(dim=(1, 2))
        return total


def load_state(module: nn.Module, path: Path, prefix: str = "", ignore: tuple[str, ...] = ()) -> None:
    """Load the tensors of a state-dict file whose names start with `prefix`, all of the module's and no others.

    Names that start with one of `ignore` may be there besides.

    Raises:
        KilnError: the file is missing, unreadable, or of another architecture.
    """
    given = {name: tensor for name, tensor in _read(path).items() if not name.startswith(ignore)}
    own = {prefix + name: tensor for name, tensor in module.state_dict().items()}
    missing, extra = sorted(own.keys() - given.keys()), sorted(given.keys() - own.keys())
    unlike = sorted(name for name in own.keys() & given.keys() if own[name].shape != given[name].shape)
    shown = [f"{len(missing)} tensors missing, such as {missing[0]}"] if missing else []
    shown += [f"{len(extra)} unknown, such as {extra[0]}"] if extra else []
    shown += [f"{k} is {list(given[k].shape)}, expected {list(own[k].shape)}" for k in unlike[:1]]
    if shown:
        raise KilnError(
            f"{path}: weights of another architecture: {'; '.join(shown)}",
            f"give weights for {type(module).__name__} with names such as {next(iter(own))}",
        )
    module.load_state_dict({name.removeprefix(prefix): tensor for name, tensor in given.items()})


def _read(path: Path) -> Mapping[str, Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise KilnError(f"{path}: no such weights", "check the path, or name a row of config/models.csv") from None
    except Exception as error:
        raise KilnError(f"{path}: unreadable weights: {error}", "expected a state dict of tensors (.pth)") from None
    if not isinstance(state, dict) or not all(isinstance(x, Tensor) for x in state.values()):
        raise KilnError(f"{path}: no state dict", "expected a plain dictionary of tensors (.pth)")
    return state


def _published_linear() -> list[Tensor]:
    folder = Path(importlib.util.find_spec("lpips").origin).parent
    state = _read(folder / "weights/v0.1/vgg.pth")
    return [state[f"lin{i}.model.1.weight"].flatten() for i in range(5)]


def _randomise(features: nn.Sequential, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for layer in features:
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, generator=generator)
            nn.init.zeros_(layer.bias)


def _split_before_pools(features: nn.Sequential) -> nn.ModuleList:
    """Stages that end in the last ReLU before a pooling; the last pooling is dropped."""
    stages = [nn.Sequential()]
    for layer in list(features)[:-1]:
        if isinstance(layer, nn.MaxPool2d):
            stages.append(nn.Sequential())
        stages[-1].append(layer)
    return nn.ModuleList(stages)
