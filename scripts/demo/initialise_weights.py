"""Make VGG16 (for LPIPS) or Inception (for rFID) with random weights, as the published files hold them.

Rule `demo_initialise_weights`, for config/smoke.yaml. He-normal weights: with torch's own start all features would be
alike. Equal settings give equal tensors.
"""

import unittest.mock
from collections.abc import Sequence
from pathlib import Path

import torch
import torchvision
from torch import nn
from torch_fidelity import feature_extractor_inceptionv3

from scripts.common import artefacts, step
from scripts.demo.settings import PublishedWeightsSettings

NAMES = ("vgg16", "inception")


def build(name: str, seed: int) -> nn.Module:
    """The network of that name; torch's global generator stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = torchvision.models.vgg16(weights=None) if name == "vgg16" else _inception()
        torch.manual_seed(seed)  # whatever its own start has drawn
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    return model


def _inception() -> nn.Module:
    """torch-fidelity's Inception, whose constructor would download its weights."""
    module, own = feature_extractor_inceptionv3, feature_extractor_inceptionv3.FeatureExtractorInceptionV3
    with (
        unittest.mock.patch.object(module, "load_state_dict_from_url", lambda *_, **__: {}),
        unittest.mock.patch.object(own, "load_state_dict", lambda *_, **__: None),
    ):
        return own("inception-v3-compat", ["2048"])


def main(argv: Sequence[str] | None = None) -> None:
    made = step.parser(__doc__, PublishedWeightsSettings)
    made.add_argument("--name", choices=NAMES, required=True, help="which network")
    made.add_argument("--output", type=Path, required=True, help="state dict (.pth) to write")
    args = made.parse_args(argv)
    values = step.read_settings(args)
    record = step.record(args, "scripts.demo.initialise_weights", values, {})
    with artefacts.atomic_path(args.output) as temporary:
        torch.save(build(args.name, values.seed).state_dict(), temporary)
    record.write(args.meta, [args.output])


if __name__ == "__main__":
    step.run(main)
