"""Make an encoder with random weights for the demo's autoencoders: DINOv2 with registers, or SigLIP2's vision tower.

Rule `demo_initialise_encoder`. The real classes of transformers, small; a real run takes published weights, without
which no latent means anything. Writes what `from_pretrained` reads, and `files.json`. Equal settings give equal bytes.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import (
    BitImageProcessor,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from scripts.common import artefacts, step
from scripts.demo.settings import EncoderModelSettings


def build(name: str, values: EncoderModelSettings):
    """(model, image processor) of "dinov2" or "siglip2"."""
    sizes = {
        "image_size": values.input_size, "patch_size": values.patch, "hidden_size": values.width,
        "num_hidden_layers": values.layers, "num_attention_heads": values.heads,
    }  # fmt: skip
    torch.manual_seed(values.seed)
    if name == "dinov2":
        return Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**sizes)), BitImageProcessor()
    return SiglipVisionModel(SiglipVisionConfig(intermediate_size=4 * values.width, **sizes)), SiglipImageProcessor()


def main(argv: Sequence[str] | None = None) -> None:
    made = step.parser(__doc__, EncoderModelSettings)
    made.add_argument("--name", choices=("dinov2", "siglip2"), required=True, help="which encoder")
    made.add_argument("--output-folder", type=Path, required=True, help="folder of the model, to make or replace")
    args = made.parse_args(argv)
    values = step.read_settings(args)
    record = step.record(args, "scripts.demo.initialise_encoder", values, {})
    folder = args.output_folder
    with artefacts.atomic_folder(folder) as temporary:
        for part in build(args.name, values):
            part.save_pretrained(temporary)
        names = [path.name for path in artefacts.write_listing(temporary)]
    record.write(args.meta, [folder / name for name in [*names, "files.json"]])


if __name__ == "__main__":
    step.run(main)
