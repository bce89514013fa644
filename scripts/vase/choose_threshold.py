"""Choose the acceptance threshold: a fixed value, or the published percentile of a seeded sample.

Rule `vase_choose_threshold`; the target `vase_quality` ends here, as an analysis without filtering.
The published rule: the 25th percentile of at most 500 random scores of high-quality images, which
keeps about three quarters of them. Only the sides that settings name are sampled.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from scripts.common import artefacts, plots, step, tables
from scripts.common.errors import KilnError
from scripts.vase.settings import ThresholdSettings

PERCENTILES = (10, 25, 50, 75, 90)


def draw_sample(candidates: pd.DataFrame, size: int, seed: int) -> pd.DataFrame:
    """At most `size` rows, drawn without replacement from the rows sorted by path."""
    ordered = candidates.sort_values("path", ignore_index=True)
    if len(ordered) <= size:
        return ordered
    chosen = np.random.default_rng(seed).choice(len(ordered), size, replace=False)
    return ordered.iloc[np.sort(chosen)].reset_index(drop=True)


def percentile_table(scores: np.ndarray) -> pd.DataFrame:
    """For each of PERCENTILES the threshold there and the share of `scores` that it keeps."""
    thresholds = np.percentile(scores, PERCENTILES)
    kept = [(scores >= t).mean() for t in thresholds]
    return pd.DataFrame({"percentile": PERCENTILES, "threshold": thresholds, "share_kept": kept})


def main(argv: Sequence[str] | None = None) -> None:
    made = step.parser(__doc__, ThresholdSettings)
    made.add_argument("--scores", type=Path, required=True, help="table of rule vase_score_images")
    made.add_argument("--predictions", type=Path, required=True, help="predictions.parquet of rule vase_link_classes")
    made.add_argument("--splits", type=Path, required=True, help="splits.parquet of rule vase_split")
    made.add_argument("--output-folder", type=Path, required=True, help="where threshold.json and its companions go")
    run(made.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    """Choose a threshold from `args.scores`."""
    values = step.read_settings(args)
    inputs = {"scores": args.scores, "predictions": args.predictions, "splits": args.splits}
    record = step.record(args, "scripts.vase.choose_threshold", values, inputs)
    high = tables.read_table(args.predictions, ["path", "vase", "label"]).query("label == 1")
    frame = high.merge(tables.read_table(args.scores, ["path", "score"]), on="path", validate="1:1")
    frame = frame.merge(tables.read_table(args.splits, ["vase", "side"]), on="vase", validate="m:1")
    tables.reconcile("vase_choose_threshold, high-quality images", len(high), with_score_and_side=len(frame))
    candidates = frame[frame["side"].isin(values.sides)]
    if candidates.empty:
        raise KilnError(
            f"no high-quality image on side {' or '.join(values.sides)}: {len(high)} of all images are of high quality",
            "look at the classifier's metrics, or name more sides in vase.threshold.sides",
        )
    sample = draw_sample(candidates, values.sample_size, values.seed)
    scores = sample["score"].to_numpy()
    fixed = values.rule == "fixed"
    threshold = values.value if fixed else float(np.percentile(scores, values.percentile))
    outputs = [args.output_folder / n for n in ("threshold.json", "percentiles.csv", "sample.parquet", "scores.png")]
    kept = float((scores >= threshold).mean())
    artefacts.write_json(
        outputs[0],
        {"threshold": threshold, "rule": values.rule, "sampled_images": len(sample), "share_kept_of_sample": kept},
    )
    artefacts.write_text(outputs[1], percentile_table(scores).to_csv(index=False))
    tables.write_table(outputs[2], sample[["path", "vase", "side", "score"]], ["path"])
    title = "CLIP acceptance score of sampled high-quality images"
    plots.distribution(outputs[3], scores, title, "score", {f"threshold, keeps {kept:.0%}": threshold})
    step.log.info("threshold %.5f (%s), keeps %.1f %% of %d", threshold, values.rule, 100 * kept, len(sample))
    record.write(args.meta, outputs, items=len(sample))


if __name__ == "__main__":
    step.run(main)
