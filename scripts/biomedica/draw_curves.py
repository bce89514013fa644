"""Draw a CLIP training's contrastive loss and its recalls on validation, beside those of a guess.

Rule `biomedica_draw_curves`. Apart from the training, so that a better picture needs none.
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

from scripts.common import artefacts, histories, plots, step

WAYS = ("image_to_text", "text_to_image")


def main(argv: Sequence[str] | None = None) -> None:
    made = step.parser(__doc__)
    made.add_argument("--metrics", type=Path, required=True, help="metrics.json of rule biomedica_train_clip")
    made.add_argument("--output-folder", type=Path, required=True, help="loss.png, retrieval.png")
    run(made.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    """Draw what `args` name."""
    record = step.record(args, "scripts.biomedica.draw_curves", None, {"metrics": args.metrics})
    metrics = artefacts.read_json(args.metrics)
    history, size, pairs = metrics["history"], metrics["batch_size"], metrics["validation_pairs"]
    chosen = f"epoch {metrics['chosen']['epoch']} chosen"
    loss, retrieval = (args.output_folder / name for name in ("loss.png", "retrieval.png"))
    floors = {f"a guess, ln({size})": metrics["guess_loss"]}
    if pairs < size:
        floors[f"a guess on validation, ln({pairs})"] = math.log(pairs)
    lines = histories.by_epoch(history, {"train": "loss", "validation": "val_loss"})
    plots.curves(loss, lines, "epoch", "contrastive loss", f"CLIP: loss ({chosen})", floors)
    chance = metrics["chance_recalls"]
    names = {f"{way.replace('_', ' ')}, R@{k}": f"val_{way}_r{k}" for way in WAYS for k in chance}
    guesses = {f"R@{k}, a guess": recall for k, recall in chance.items()}
    title = f"CLIP: retrieval on validation (n = {pairs}, {chosen})"
    plots.curves(retrieval, histories.by_epoch(history, names), "epoch", "recall", title, guesses)
    record.write(args.meta, [loss, retrieval])


if __name__ == "__main__":
    step.run(main)
