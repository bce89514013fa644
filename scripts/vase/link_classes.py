"""The classes as folders that one can look at: `0/` and `1/` with relative links to the raw images.

Rule `vase_link_classes`. Links keep the raw folder's subfolders, so two files of one name both survive.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from scripts.common import artefacts, step, tables
from scripts.vase.links import link_images


def read_predictions(shards: Sequence[Path]) -> pd.DataFrame:
    """All shards' predictions (path, probability, label), sorted by path."""
    parts = [tables.read_table(path, ["path", "probability", "label"]) for path in shards]
    return pd.concat(parts, ignore_index=True).sort_values("path", ignore_index=True)


def main(argv: Sequence[str] | None = None) -> None:
    made = step.parser(__doc__)
    made.add_argument("--images", type=Path, required=True, help="folder of raw images")
    made.add_argument("--manifest", type=Path, required=True, help="manifest of rule vase_list_images")
    made.add_argument("--predictions", type=Path, nargs="+", required=True, help="tables of rule vase_classify_images")
    made.add_argument("--output-folder", type=Path, required=True, help="gets classes/0 and classes/1, predictions")
    run(made.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    """Link the images of `args.predictions` by class."""
    inputs = {"manifest": args.manifest} | {p.stem: p for p in args.predictions}
    record = step.record(args, "scripts.vase.link_classes", None, inputs)
    manifest = tables.read_table(args.manifest, ["path", "status", "bytes", "sha256", "vase", "view"])
    frame = read_predictions(args.predictions).merge(manifest, on="path", how="left", validate="1:1")
    frame["name"] = frame["label"].astype(str) + "/" + frame["path"]
    outputs = [args.output_folder / "predictions.parquet", args.output_folder / "summary.json"]
    counts = tables.reconcile(
        "vase_link_classes",
        len(manifest),
        high_quality=int((frame["label"] == 1).sum()),
        low_quality=int((frame["label"] == 0).sum()),
        quarantined=int((manifest["status"] == "quarantined").sum()),
    )
    link_images(args.output_folder / "classes", frame, args.images)
    tables.write_table(outputs[0], frame[["path", "vase", "view", "probability", "label"]], ["path"])
    artefacts.write_json(outputs[1], counts)
    step.log.info("%s", counts)
    record.write(args.meta, [*outputs, args.output_folder / "classes" / "files.json"], items=len(frame))


if __name__ == "__main__":
    step.run(main)
