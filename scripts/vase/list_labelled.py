"""The labelled images of the two quality classes, inspected like the raw ones.

Rule `vase_list_labelled`. The folder holds `0/` (low quality) and `1/` (high quality), any depth below.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from scripts.common import artefacts, images, shards, step, tables
from scripts.common.errors import KilnError
from scripts.common.inspection import inspect_files
from scripts.vase.list_images import add_views
from scripts.vase.settings import InspectSettings, ListSettings, Settings

CLASSES = ("0", "1")


class LabelledSettings(Settings):
    """Settings of this step."""

    inspect: InspectSettings = InspectSettings()
    list: ListSettings = ListSettings()


def label_of(path: str, folder: Path) -> int:
    """0 or 1, from the first folder of a relative path.

    Raises:
        KilnError: the file lies in neither class folder.
    """
    top = path.partition("/")[0]
    if top not in CLASSES or "/" not in path:
        raise KilnError(
            f"{folder / path}: not below 0/ or 1/", f"{folder} must hold 0/ (low quality) and 1/ (high quality) only"
        )
    return int(top)


def main(argv: Sequence[str] | None = None) -> None:
    made = step.parser(__doc__, LabelledSettings)
    made.add_argument("--images", type=Path, required=True, help="folder with 0/ and 1/")
    made.add_argument("--output-folder", type=Path, required=True, help="where labelled.parquet goes")
    run(made.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    """List the labelled images below `args.images`."""
    values = step.read_settings(args)
    record = step.record(args, "scripts.vase.list_labelled", values, {})
    paths = [item.path for item in shards.scan(args.images, images.EXTENSIONS).items]
    labels = {path: label_of(path, args.images) for path in paths}
    rows = inspect_files(args.images, paths, values.inspect.max_pixels, step.threads(args))
    frame = pd.DataFrame(rows)
    frame["label"] = frame["path"].map(labels)
    pattern = values.list.view_pattern
    frame = add_views(frame, pattern)
    ok, bad = frame[frame["status"] == "ok"], frame[frame["status"] == "quarantined"]
    unmatched = int((~frame["matched"]).sum())
    if pattern is not None and unmatched:
        step.log.warning(
            "%d of %d names do not match vase.list.view_pattern: each is a vase of its own, so that views of one vase "
            "may lie on several sides",
            unmatched,
            len(frame),
        )
    for label in CLASSES:
        if not (ok["label"] == int(label)).any():
            raise KilnError(
                f"{args.images / label}: no readable image of class {label}",
                "the classifier needs both classes: 0/ holds low-quality images, 1/ high-quality ones",
            )
    folder = args.output_folder
    outputs = [folder / "labelled.parquet", folder / "quarantine.tsv", folder / "summary.json"]
    tables.write_table(outputs[0], frame, ["path"])
    artefacts.write_text(outputs[1], bad.sort_values("path")[["path", "reason"]].to_csv(sep="\t", index=False))
    counts = tables.reconcile("vase_list_labelled", len(frame), ok=len(ok), quarantined=len(bad))
    by_class = ok["label"].value_counts().sort_index()
    summary = {
        **counts,
        "by_class": {str(k): int(v) for k, v in by_class.items()},
        "vases": int(ok["vase"].nunique()),
        "unmatched_names": unmatched,
    }
    artefacts.write_json(outputs[2], summary)
    step.log.info("%s", summary)
    record.write(args.meta, outputs, items=len(frame))


if __name__ == "__main__":
    step.run(main)
