"""Accept the high-quality images whose CLIP score reaches the threshold.

Rule `vase_accept_images`: `accepted/` and `rejected/` with relative links, `filtering_report.json`
with the published fields, a funnel and a sheet of samples.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from scripts.common import artefacts, plots, sheets, step, tables
from scripts.common.errors import KilnError
from scripts.vase.links import link_images

SAMPLES = 8
SIMILARITIES = ["high_quality_similarity", "low_quality_similarity"]


def filtering_report(frame: pd.DataFrame, threshold: float, folders: tuple[Path, Path], seconds: float) -> dict:
    """The original's report, field by field; `seconds` is the time that its records give the scoring."""
    accepted = int(frame["accepted"].sum())
    results = [
        {
            "filename": row.path,
            "quality_score": row.score,
            "high_quality_similarity": row.high_quality_similarity,
            "low_quality_similarity": row.low_quality_similarity,
            "accepted": bool(row.accepted),
        }
        for row in frame.itertuples(index=False)
    ]
    return {
        "input_directory": str(folders[0]),
        "output_directory": str(folders[1]),
        "total_images": len(frame),
        "accepted_images": accepted,
        "rejected_images": len(frame) - accepted,
        "acceptance_rate": accepted / len(frame),
        "threshold": threshold,
        "processing_time_seconds": round(seconds, 3),
        "results": results,
    }


def sample_sheet(path: Path, frame: pd.DataFrame, images: Path) -> None:
    """A picture of accepted and rejected images, evenly spread over their scores."""
    rows = []
    for name, part in (("accepted", frame[frame["accepted"]]), ("rejected", frame[~frame["accepted"]])):
        ordered = part.sort_values(["score", "path"], ascending=[False, True])
        picks = ordered.iloc[np.unique(np.linspace(0, len(ordered) - 1, SAMPLES).astype(int))] if len(part) else part
        mark = "good" if name == "accepted" else "bad"
        tiles = [(images / row.path, f"{row.score:+.3f}", mark) for row in picks.itertuples()]
        rows.append((f"{name} ({len(part)})", tiles))
    sheets.contact_sheet(path, rows, "Accepted and rejected images, by falling CLIP score")


def main(argv: Sequence[str] | None = None) -> None:
    made = step.parser(__doc__)
    made.add_argument("--images", type=Path, required=True, help="folder of raw images")
    made.add_argument("--manifest", type=Path, required=True, help="manifest of rule vase_list_images")
    made.add_argument("--predictions", type=Path, required=True, help="predictions.parquet of rule vase_link_classes")
    made.add_argument("--scores", type=Path, required=True, help="table of rule vase_score_images")
    made.add_argument("--threshold", type=Path, required=True, help="threshold.json of rule vase_choose_threshold")
    made.add_argument("--timed", type=Path, nargs="*", default=[], help="meta.json files whose times are reported")
    made.add_argument("--output-folder", type=Path, required=True, help="gets accepted/, rejected/, the report")
    run(made.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    """Accept or reject each high-quality image of `args.predictions`."""
    inputs = {n: getattr(args, n) for n in ("manifest", "predictions", "scores", "threshold")}
    record = step.record(args, "scripts.vase.accept_images", None, inputs)
    manifest = tables.read_table(args.manifest, ["path", "bytes", "sha256", "status"])
    predictions = tables.read_table(args.predictions, ["path", "vase", "view", "label"])
    scores = tables.read_table(args.scores, ["path", *SIMILARITIES, "score"])
    threshold = artefacts.read_json(args.threshold)["threshold"]
    scored = predictions.merge(scores, on="path", validate="1:1")
    frame = scored.query("label == 1").merge(manifest, on="path", validate="1:1").sort_values("path")
    frame = frame.assign(accepted=frame["score"] >= threshold)
    accepted = int(frame["accepted"].sum())
    counts = tables.reconcile(
        "vase_accept_images",
        len(manifest),
        accepted=accepted,
        rejected=len(frame) - accepted,
        low_quality=int((scored["label"] == 0).sum()),
        quarantined=int((manifest["status"] == "quarantined").sum()),
    )
    if accepted == 0:
        raise KilnError(
            f"threshold {threshold:.5f} accepts none of {len(frame)} high-quality images; "
            f"their scores go from {frame['score'].min():.5f} to {frame['score'].max():.5f}",
            "lower vase.threshold.value or vase.threshold.percentile; percentiles.csv of vase_choose_threshold helps",
        )
    folder = args.output_folder
    frame = frame.assign(name=frame["path"])  # before selecting: pandas fills an empty frame up to a column's length
    link_images(folder / "accepted", frame[frame["accepted"]], args.images)
    link_images(folder / "rejected", frame[~frame["accepted"]], args.images)
    names = ("accepted.parquet", "filtering_report.json", "summary.json", "funnel.png", "samples.png")
    outputs = [folder / name for name in names]
    columns = ["path", "vase", "view", *SIMILARITIES, "score", "accepted"]
    tables.write_table(outputs[0], frame[columns], ["path"])
    seconds = sum(artefacts.read_json(path)["wall_seconds"] for path in args.timed)
    artefacts.write_json(outputs[1], filtering_report(frame, threshold, (args.images, folder), seconds))
    artefacts.write_json(outputs[2], counts)
    left = counts["in"] - counts["quarantined"]
    stages = [("images", counts["in"]), ("readable", left), ("high quality", len(frame)), ("accepted", accepted)]
    plots.funnel(outputs[3], stages, "From raw images to accepted ones")
    sample_sheet(outputs[4], frame, args.images)
    step.log.info("%s", counts)
    listings = [folder / side / "files.json" for side in ("accepted", "rejected")]
    record.write(args.meta, [*outputs, *listings], items=len(frame))


if __name__ == "__main__":
    step.run(main)
