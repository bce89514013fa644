"""Draw the loss of SFT or the reward of GRPO, train and validation side, beside what a guess would reach.

Rule `vase_draw_curves`. Apart from the training, so that a better picture needs none.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from scripts.common import artefacts, histories, plots, step

DRAWN = {  # stage: what of its history, its unit, the title
    "sft": ("loss", "loss per answer token", "Vase SFT: loss"),
    "grpo": ("reward", "mean reward of a step's samples", "Vase GRPO: reward"),
}


def main(argv: Sequence[str] | None = None) -> None:
    made = step.parser(__doc__)
    made.add_argument("--stage", choices=DRAWN, required=True)
    made.add_argument(
        "--metrics", type=Path, required=True, help="metrics.json of rule vase_train_sft or vase_train_grpo"
    )
    made.add_argument("--output", type=Path, required=True, help="a PNG")
    run(made.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    """Draw what `args` name."""
    record = step.record(args, "scripts.vase.draw_curves", None, {"metrics": args.metrics})
    metrics = artefacts.read_json(args.metrics)
    name, unit, title = DRAWN[args.stage]
    plots.curves(args.output, histories.by_step(metrics, name), "optimiser step", unit, title, metrics["floors"])
    record.write(args.meta, [args.output])


if __name__ == "__main__":
    step.run(main)
