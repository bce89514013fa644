"""Make one of open_clip's models with random weights, in a folder that open_clip loads as `local-dir:`.

Rule `demo_initialise_clip`, for config/smoke.yaml. Equal settings give equal bytes.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import open_clip
import torch
from open_clip.transform import PreprocessCfg
from safetensors.torch import save_file

from scripts.common import artefacts, step
from scripts.demo.settings import PublishedClipSettings

CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"


def build(values: PublishedClipSettings) -> torch.nn.Module:
    """The model of that name, float32; torch's global generator stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(values.seed)
        return open_clip.CLIP(**open_clip.get_model_config(values.name)).eval()


def main(argv: Sequence[str] | None = None) -> None:
    made = step.parser(__doc__, PublishedClipSettings)
    made.add_argument("--output-folder", type=Path, required=True, help="folder of the model, to make or replace")
    args = made.parse_args(argv)
    values = step.read_settings(args)
    record = step.record(args, "scripts.demo.initialise_clip", values, {})
    folder = args.output_folder
    with artefacts.atomic_folder(folder) as temporary:
        model = build(values)
        save_file(model.state_dict(), temporary / WEIGHTS)
        preprocess = dataclasses.asdict(PreprocessCfg(size=model.visual.image_size))
        artefacts.write_json(
            temporary / CONFIG, {"model_cfg": open_clip.get_model_config(values.name), "preprocess_cfg": preprocess}
        )
    record.write(args.meta, [folder / CONFIG, folder / WEIGHTS])


if __name__ == "__main__":
    step.run(main)
