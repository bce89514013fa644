"""Draw the quality classifier's loss and accuracy while it trained, and its confusion matrix on the test side.

Rule `vase_draw_classifier`. Apart from the training, so that a better picture needs none.
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

from scripts.common import artefacts, histories, plots, step


def main(argv: Sequence[str] | None = None) -> None:
    made = step.parser(__doc__)
    made.add_argument("--metrics", type=Path, required=True, help="metrics.json of rule vase_train_classifier")
    made.add_argument("--output-folder", type=Path, required=True, help="loss.png, accuracy.png, confusion.png")
    run(made.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    """Draw what `args` name."""
    record = step.record(args, "scripts.vase.draw_classifier", None, {"metrics": args.metrics})
    metrics = artefacts.read_json(args.metrics)
    history, test = metrics["history"], metrics["test"]
    made = {name: args.output_folder / f"{name}.png" for name in ("loss", "accuracy", "confusion")}
    floors = {"loss": {"ln 2 (chance)": math.log(2)}, "accuracy": {"majority answer": test["accuracy"]["baseline"]}}
    for name, own in floors.items():
        lines = histories.by_epoch(history, {"train": f"train_{name}", "validation": f"val_{name}"})
        plots.curves(made[name], lines, "epoch", name, f"Quality classifier: {name}", own)
    title = f"Quality classifier, test side (n = {test['n']})"
    plots.confusion_matrix(made["confusion"], test["confusion_matrix"], test["classes"], title)
    record.write(args.meta, list(made.values()))


if __name__ == "__main__":
    step.run(main)
