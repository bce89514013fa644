"""Feature extractors for rFID, from local files alone: torch-fidelity's Inception, and a small one for demos."""

import hashlib
import io
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch_fidelity import register_feature_extractor
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from scripts.common.errors import KilnError

INCEPTION, RANDOM = "inception-v3-compat", "kiln-random"
RANDOM_LABEL = "random features, not comparable"
# weights-inception-2015-12-05-6726825d.pth of torch-fidelity's release v0.2.0
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
RANDOM_WIDTHS, RANDOM_SEED = (16, 16, 32), 0


class RandomFeatures(FeatureExtractorBase):
    """Three convolutions with He-normal weights of a fixed seed; the means of all their rectified maps, '64'.

    Such features tell blurred pictures from sharp ones, no more: uint8 [B,3,H,W] -> ([B,64] float32,).
    """

    def __init__(self, name: str, features_list: list[str], feature_extractor_internal_dtype=None, **_):
        super().__init__(name, features_list)
        draws = np.random.Generator(np.random.Philox(key=RANDOM_SEED))  # unlike torch's, the same on every processor
        self.layers = nn.ModuleList()
        for i, (wide_in, wide_out) in enumerate(zip((3, *RANDOM_WIDTHS), RANDOM_WIDTHS, strict=False)):
            layer = nn.Conv2d(wide_in, wide_out, 3, stride=1 if i == 0 else 2, padding=1, bias=False)
            drawn = draws.standard_normal(layer.weight.shape) * (2 / (9 * wide_in)) ** 0.5
            layer.weight.data = torch.from_numpy(drawn).float()
            self.layers.append(layer)
        self.to(getattr(torch, feature_extractor_internal_dtype or "float32"))
        self.requires_grad_(False).eval()

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor]:
        maps, means = images.to(self.layers[0].weight.dtype) / 127.5 - 1, []
        for layer in self.layers:
            maps = layer(maps).relu()
            means.append(maps.mean(dim=(2, 3)))
        return (torch.cat(means, dim=1).float(),)

    @staticmethod
    def get_provided_features_list() -> tuple[str]:
        return (str(sum(RANDOM_WIDTHS)),)

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return str(sum(RANDOM_WIDTHS))

    @staticmethod
    def can_be_compiled() -> bool:
        return True

    @staticmethod
    def get_dummy_input_for_compile() -> torch.Tensor:
        return torch.zeros(1, 3, 8, 8, dtype=torch.uint8)


register_feature_extractor(RANDOM, RandomFeatures)


class Extractor:
    """uint8 [B,3,H,W] on any device -> float64 [B,dim] on the CPU, without autocast or TF32.

    Attributes: name; dim; weights_sha256; label: why scores do not compare with published ones, or ""; comparable.
    """

    def __init__(self, model: FeatureExtractorBase, weights_sha256: str, label: str, device: torch.device):
        self.model, self.device = model.to(device), device
        if device.type == "cpu":  # twice as fast: pooling and norms run over channels
            self.model.to(memory_format=torch.channels_last)
        self.name, self.dim = model.get_name(), int(model.get_requested_features_list()[0])
        self.weights_sha256, self.label, self.comparable = weights_sha256, label, not label

    @torch.inference_mode()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise KilnError(
                f"pictures {list(images.shape)} {images.dtype} for {self.name}; expected uint8 [B,3,H,W]",
                "pass them through quality.to_uint8",
            )
        # the size of a batch must not choose another algorithm or precision
        exact = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
        with exact, torch.autocast(self.device.type, enabled=False):
            (features,) = self.model(images.to(self.device))
        return features.cpu().double()


def load_extractor(
    name: str, weights: Path | None, device: torch.device | str = "cpu", dtype: str = "float32"
) -> Extractor:
    """The extractor called `name`; the network is never used.

    Args:
        name: "inception-v3-compat" (2048 dimensions) or "kiln-random" (64).
        weights: Inception's state dict (.pth); None for kiln-random, which draws its own.
        dtype: precision of the inner layers, "float32" as published or "float64", in which features depend less on the
            batch size. Features are rounded to float32 by torch-fidelity either way.

    Raises:
        KilnError: unknown name or dtype; weights that are missing, unsafe, damaged or of another network.
    """
    if dtype not in ("float32", "float64"):
        raise KilnError(f"extractor dtype {dtype!r}, expected float32 or float64", "use float32, the published one")
    device = torch.device(device)
    if name == RANDOM:
        if weights is not None:
            raise KilnError(f"{weights}: {RANDOM} draws its own weights", f"leave the file out, or use {INCEPTION}")
        model = RandomFeatures(name, ["64"], feature_extractor_internal_dtype=dtype)
        drawn = b"".join(layer.weight.detach().float().numpy().tobytes() for layer in model.layers)
        return Extractor(model, hashlib.sha256(drawn).hexdigest(), RANDOM_LABEL, device)
    if name != INCEPTION:
        raise KilnError(f"unknown feature extractor {name!r}", f"use {INCEPTION} or {RANDOM}")
    if weights is None:
        raise KilnError(f"{INCEPTION} needs a file of weights", "give torch-fidelity's file, see config/models.csv")
    state, sha256 = _read_state(weights)
    try:
        model = FeatureExtractorInceptionV3(
            name, ["2048"], feature_extractor_weights_path=state, feature_extractor_internal_dtype=dtype
        )
    except (RuntimeError, TypeError) as error:
        reason = str(error).strip().splitlines()
        raise KilnError(
            f"{weights}: not the weights of {INCEPTION}: {' '.join(reason[:2])}",
            "give torch-fidelity's weights-inception-2015-12-05-6726825d.pth",
        ) from None
    label = "" if sha256 == INCEPTION_SHA256 else "Inception weights other than torch-fidelity's, not comparable"
    return Extractor(model, sha256, label, device)


def _read_state(path: Path) -> tuple[io.BytesIO, str]:
    """The state dict of `path`, written anew from checked tensors, and the sha256 of the file.

    torch-fidelity unpickles whatever it is given; it is given nothing but what a safe load let through.
    """
    try:
        data = path.read_bytes()
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise KilnError(f"{path}: no such weights", "run the rule that retrieves them, or mend the path") from None
    except Exception as error:  # torch.load raises many kinds
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise KilnError(
            f"{path}: unreadable weights: {reason}", "expected a state dict (.pth); fetch it again"
        ) from None
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return buffer, hashlib.sha256(data).hexdigest()
