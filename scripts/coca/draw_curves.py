"""Draw a CoCa training's weighted losses and its recalls on validation, beside those of a guess.

Rule `coca_draw_curves`. Apart from the training, so that a better picture needs none.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from scripts.common import artefacts, histories, plots, step


def main(argv: Sequence[str] | None = None) -> None:
    made = step.parser(__doc__)
    made.add_argument("--metrics", type=Path, required=True, help="metrics.json of rule coca_train")
    made.add_argument("--output-folder", type=Path, required=True, help="loss.png, retrieval.png")
    run(made.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    """Draw what `args` name."""
    record = step.record(args, "scripts.coca.draw_curves", None, {"metrics": args.metrics})
    metrics = artefacts.read_json(args.metrics)
    history, chosen = metrics["history"], f"epoch {metrics['chosen']['epoch']} chosen"
    loss, retrieval = (args.output_folder / name for name in ("loss.png", "retrieval.png"))
    names = {f"{name}, {side}": key + name for name in ("caption", "contrastive")
             for side, key in (("train", ""), ("validation", "val_"))}  # fmt: skip
    floors = {f"{name}, a guess": value for name, value in metrics["guess_losses"].items()}
    plots.curves(loss, histories.by_epoch(history, names), "epoch", "loss", f"CoCa: weighted losses ({chosen})", floors)
    chance = metrics["chance_recalls"]
    recalls = histories.by_epoch(history, {f"R@{k}": f"val_r{k}" for k in chance})
    guesses = {f"R@{k}, a guess": recall for k, recall in chance.items()}
    title = f"CoCa: retrieval on validation, both ways (n = {metrics['sides']['validation']['pairs']}, {chosen})"
    plots.curves(retrieval, recalls, "epoch", "recall", title, guesses)
    record.write(args.meta, [loss, retrieval])


if __name__ == "__main__":
    step.run(main)
