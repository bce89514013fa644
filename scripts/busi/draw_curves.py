"""Draw the loss of a fine-tuning, train and validation side, beside that of a guess.

Rule `busi_draw_curves`. Apart from the training, so that a better picture needs none.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from scripts.common import artefacts, histories, plots, step, trivial


def main(argv: Sequence[str] | None = None) -> None:
    made = step.parser(__doc__)
    made.add_argument("--method", choices=("lora", "qlora"), required=True)
    made.add_argument("--metrics", type=Path, required=True, help="metrics.json of rule busi_train_lora")
    made.add_argument("--output-folder", type=Path, required=True, help="loss.png")
    run(made.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    """Draw what `args` name."""
    record = step.record(args, "scripts.busi.draw_curves", None, {"metrics": args.metrics})
    metrics, loss = artefacts.read_json(args.metrics), args.output_folder / "loss.png"
    lines, floors = histories.by_step(metrics, "loss"), {trivial.GUESS: metrics["guess_loss"]}
    title = f"BUSI fine-tune ({args.method}): loss"
    plots.curves(loss, lines, "optimiser step", "loss per answer token", title, floors)
    record.write(args.meta, [loss])


if __name__ == "__main__":
    step.run(main)
