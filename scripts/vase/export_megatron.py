"""Export the final model to Megatron-Core's format, by `megatron export` of ms-swift, with its precision test.

Rule `vase_export_megatron`; off by default (`vase.megatron.export`). It needs GPUs, megatron-core, mcore-bridge and
transformer-engine, which compiles against CUDA; without them it stops at once and says what is missing.
"""

import argparse
import importlib.util
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from scripts.common import artefacts, model_folders, step
from scripts.common.errors import KilnError
from scripts.common.launch import tied
from scripts.common.settings import Settings
from scripts.vase.settings import MegatronSettings, VlmSettings
from scripts.vase.swift_flags import as_arguments, model_flags

NEEDED = {"megatron.core": "megatron-core", "mcore_bridge": "mcore-bridge", "transformer_engine": "transformer-engine"}


class ExportSettings(Settings):
    """Settings of this step."""

    vlm: VlmSettings = VlmSettings()
    megatron: MegatronSettings = MegatronSettings()


def command(model: Path, output: Path, values: ExportSettings) -> list[str]:
    """The command line of the export."""
    flags = {
        **model_flags(values.vlm, model),
        "to_mcore": True,
        "torch_dtype": "bfloat16",
        "tensor_model_parallel_size": values.megatron.tensor_parallel,
        "output_dir": output,
        "test_convert_precision": values.megatron.test_precision,
    }
    return [sys.executable, "-m", "swift.cli._megatron.main", "export", *as_arguments(flags)]


def require_megatron(gpus: int) -> None:
    """Return where the export can work.

    Raises:
        KilnError: too few GPUs, or a package is missing.
    """
    import torch

    seen = torch.cuda.device_count()
    if seen < gpus:
        raise KilnError(
            f"the export needs {gpus} GPU(s), this process sees {seen}",
            "run it on a GPU machine, or leave vase.megatron.export false",
        )
    missing = []
    for module, package in NEEDED.items():
        try:
            if importlib.util.find_spec(module) is None:
                missing.append(package)
        except ModuleNotFoundError:  # of a parent package
            missing.append(package)
    if missing:
        raise KilnError(
            f"the export needs {', '.join(missing)}, not installed here",
            f"pip install {' '.join(missing)} into the rule's environment (transformer-engine compiles with nvcc)",
        )


def main(argv: Sequence[str] | None = None) -> None:
    made = step.parser(__doc__, ExportSettings)
    made.add_argument("--model", type=Path, required=True, help="folder of the final model")
    made.add_argument("--output-folder", type=Path, required=True, help="folder of Megatron's checkpoint")
    run(made.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    """Export what `args` name.

    Raises:
        KilnError: see `require_megatron`; or Megatron's command failed.
    """
    values = step.read_settings(args)
    record = step.record(args, "scripts.vase.export_megatron", values, model_folders.identity(args.model))
    require_megatron(values.megatron.tensor_parallel)
    folder = args.output_folder / "mcore"
    with artefacts.atomic_folder(folder) as temporary:
        temporary.rmdir()  # ms-swift skips what exists
        done = subprocess.run(tied(command(args.model, temporary, values)), check=False)
        if done.returncode or not temporary.is_dir():
            raise KilnError(f"`megatron export` ended with status {done.returncode}", "read what it said above")
        files = sorted(p for p in temporary.rglob("*") if p.is_file())
        listing = {}
        for path in files:
            listing[str(path.relative_to(temporary))] = artefacts.describe_files([path])[path.name]
        artefacts.write_json(temporary / "files.json", listing)
    record.write(args.meta, [folder / "files.json"])


if __name__ == "__main__":
    step.run(main)
