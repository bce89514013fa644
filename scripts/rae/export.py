"""Export a trained autoencoder: decoder and statistics as safetensors and in the published layout, in one folder.

Rule `rae_export`. The folder is whole but for the encoder, which its config.json identifies.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from scripts.common import artefacts, cards, model_folders, step
from scripts.common.errors import KilnError
from scripts.rae import checkpoints, exports


def main(argv: Sequence[str] | None = None) -> None:
    made = step.parser(__doc__)
    made.add_argument("--checkpoint", type=Path, required=True, help="autoencoder.safetensors")
    made.add_argument("--training-meta", type=Path, required=True, help="meta.json of rule rae_train_autoencoder")
    made.add_argument("--encoder", type=Path, required=True, help="folder of its encoder")
    made.add_argument("--output-folder", type=Path, required=True, help="becomes the exported folder")
    run(made.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    """Export what `args` name.

    Raises:
        KilnError: the checkpoint is damaged or of another encoder, or the record is none of a training.
    """
    inputs = {"checkpoint": args.checkpoint, "training": args.training_meta} | model_folders.identity(args.encoder)
    record = step.record(args, "scripts.rae.export", None, inputs)
    trained = artefacts.read_json(args.training_meta)
    missing = [key for key in ("settings", "code", "git_commit") if key not in trained]
    if missing:
        raise KilnError(
            f"{args.training_meta}: no {', '.join(missing)}", "give meta.json of rule rae_train_autoencoder"
        )
    model, facts = checkpoints.load(args.checkpoint, args.encoder)
    how = {
        "settings": cards.without_paths(trained["settings"]), "code": trained["code"],
        "git_commit": trained["git_commit"], "checkpoint_sha256": record.inputs["checkpoint"]["sha256"],
    }  # fmt: skip
    exports.save(args.output_folder, model, facts, {"training": how})
    listing = args.output_folder / "files.json"
    for name, one in artefacts.read_json(listing).items():
        step.log.info("%s: %.1f MB", name, one["bytes"] / 1e6)
    record.write(args.meta, [listing])


if __name__ == "__main__":
    step.run(main)
