"""Score acceptance and view selection against known quality, on the test side.

Rule `vase_evaluate_filter`; needs a truth table (path, quality 0 or 1, view_quality in [0, 1]), so it
runs where `vase.truth` is set. Intervals resample vases, since views of one vase are alike.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from scripts.common import artefacts, statistics, step, tables, trivial
from scripts.common.errors import KilnError


def trivial_scores(images: Path, frame: pd.DataFrame) -> pd.Series:
    """Probability of good quality by a logistic regression on trivial features, fitted on the train side."""
    features = trivial.image_features([images / path for path in frame["path"]])
    train = (frame["side"] == "train").to_numpy()
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    model.fit(features[train], frame.loc[train, "quality"])
    return pd.Series(model.predict_proba(features)[:, 1], index=frame.index)


def accepted_quality(test: pd.DataFrame) -> dict:
    """Share of truly good images among the accepted ones, against the share before filtering."""
    accepted = test[test["accepted"]]
    keep = len(accepted)
    trivially = test.sort_values(["trivial", "path"], ascending=[False, True]).head(keep)
    return statistics.metric(
        float(accepted["quality"].mean()),
        n=keep,
        ci95=statistics.bootstrap_interval(accepted["quality"].to_numpy(float), groups=accepted["vase"].to_numpy()),
        baseline=float(test["quality"].mean()),
        baseline_kind="before_filtering",
        groups=accepted["vase"].nunique(),
        grouped_by="vase",
        trivial=float(trivially["quality"].mean()),
        auc_of_score=float(roc_auc_score(test["quality"], test["score"])),
    )


def best_view_quality(test: pd.DataFrame) -> dict:
    """Mean view quality of the chosen views, against a random view of the same vases."""
    chosen = test[test["chosen"]].set_index("vase")
    own = test[test["vase"].isin(chosen.index)]
    ordered = own.sort_values(["vase", "trivial", "path"], ascending=[True, False, True])
    trivially = ordered.drop_duplicates("vase")["view_quality"].mean()
    values = chosen["view_quality"].to_numpy(float)
    return statistics.metric(
        float(values.mean()),
        n=len(chosen),
        ci95=statistics.bootstrap_interval(values),
        baseline=float(own.groupby("vase")["view_quality"].mean().mean()),
        baseline_kind="random_view",
        trivial=float(trivially),
        vases_without_accepted_view=int(test.loc[~test["with_view"], "vase"].nunique()),
    )


def main(argv: Sequence[str] | None = None) -> None:
    made = step.parser(__doc__)
    made.add_argument("--images", type=Path, required=True, help="folder of raw images")
    made.add_argument("--truth", type=Path, required=True, help="table: path, quality, view_quality")
    made.add_argument("--manifest", type=Path, required=True, help="manifest of rule vase_list_images")
    made.add_argument("--splits", type=Path, required=True, help="splits.parquet of rule vase_split")
    made.add_argument("--scores", type=Path, required=True, help="table of rule vase_score_images")
    made.add_argument("--accepted", type=Path, required=True, help="accepted.parquet of rule vase_accept_images")
    made.add_argument("--best-views", type=Path, required=True, help="best_views.parquet of rule vase_select_views")
    made.add_argument("--output", type=Path, required=True, help="metrics.json")
    run(made.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    """Score the filter that `args` name.

    Raises:
        KilnError: the truth table knows no image of the test side, or only one quality there, or fewer than
            two vases with an accepted, or a chosen, image.
    """
    names = ("truth", "manifest", "splits", "scores", "accepted", "best_views")
    inputs = {name: getattr(args, name) for name in names}
    record = step.record(args, "scripts.vase.evaluate_filter", None, inputs)
    truth = tables.read_table(args.truth, ["path", "quality", "view_quality"])
    frame = tables.read_table(args.manifest, ["path", "vase"]).merge(truth, on="path", validate="1:1")
    frame = frame.merge(tables.read_table(args.splits, ["vase", "side"]), on="vase", validate="m:1")
    frame = frame.merge(tables.read_table(args.scores, ["path", "score"]), on="path", validate="1:1")
    accepted = tables.read_table(args.accepted, ["path", "accepted"]).query("accepted")["path"]
    best = tables.read_table(args.best_views, ["path", "vase"])
    frame = frame.assign(
        accepted=frame["path"].isin(accepted),
        chosen=frame["path"].isin(best["path"]),
        with_view=frame["vase"].isin(best["vase"]),  # also where the truth does not know the chosen view
    )
    test = frame["side"] == "test"
    if frame.loc[test, "quality"].nunique() < 2 or frame.loc[frame["side"] == "train", "quality"].nunique() < 2:
        raise KilnError(
            f"{args.truth}: sides train and test need known images of both qualities; {int(test.sum())} of test known",
            "list more images in vase.truth, or unset it",
        )
    for what in ("accepted", "chosen"):
        vases = frame.loc[test & frame[what], "vase"].nunique()
        if vases < 2:
            raise KilnError(
                f"{args.truth}: known {what} images of the test side come from {vases} vases, too few to score",
                "lower the threshold, put more vases on the test side, list more images in vase.truth, or unset it",
            )
    frame["trivial"] = trivial_scores(args.images, frame)
    metrics = {
        "accepted_quality": accepted_quality(frame[test]),
        "best_view_quality": best_view_quality(frame[test]),
    }
    artefacts.write_json(args.output, {"summary": metrics})
    for name, one in metrics.items():
        step.log.info("%s %.3f %s, baseline %.3f", name, one["value"], np.round(one["ci95"], 3), one["baseline"])
    record.write(args.meta, [args.output], items=int(test.sum()))


if __name__ == "__main__":
    step.run(main)
