"""Draw the losses of an autoencoder's training beside those of a picture's mean colour and an undecided discriminator.

Rule `rae_draw_curves`. Apart from the training, so that a better picture needs none.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from scripts.common import artefacts, histories, plots, step

FLOORS = {"l1": "L1, a picture's mean colour", "discriminator": "discriminator, a guess"}


def main(argv: Sequence[str] | None = None) -> None:
    made = step.parser(__doc__)
    made.add_argument("--name", required=True, help="of the encoder")
    made.add_argument("--metrics", type=Path, required=True, help="metrics.json of rule rae_train_autoencoder")
    made.add_argument("--output-folder", type=Path, required=True, help="loss.png")
    run(made.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    """Draw what `args` name."""
    record = step.record(args, "scripts.rae.draw_curves", None, {"metrics": args.metrics})
    metrics, loss = artefacts.read_json(args.metrics), args.output_folder / "loss.png"
    lpips = "LPIPS (random features)" if metrics["random_features"] else "LPIPS"
    names = {"L1": "l1", lpips: "lpips", "discriminator (hinge)": "discriminator"}
    lines = histories.by_epoch(metrics["history"], names)
    floors = {FLOORS[name]: value for name, value in metrics["floors"].items()}
    plots.curves(loss, lines, "epoch", "loss", f"Autoencoder on {args.name}: losses", floors, logarithmic=True)
    record.write(args.meta, [loss])


if __name__ == "__main__":
    step.run(main)
