"""Gather the headline metrics of every pipeline into one summary.json, and print them.

Rule `report_summarise`. Each metrics file holds a section `summary`: {metric: {value, baseline,
baseline_kind, n, ci95, higher_is_better, ...}}; here `file` is added, that file as seen from summary.json.
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from scripts.common import artefacts, step
from scripts.common.errors import KilnError
from scripts.report.headlines import headlines

PIPELINES = ("vase", "busi", "rae", "coca", "biomedica")


def gather(files: Sequence[Path], place: Path = Path()) -> dict[str, dict]:
    """The `summary` sections of metrics files as one, each metric with its `file` relative to the folder `place`.

    Raises:
        KilnError: a file has none, or a metric stands in two files.
    """
    metrics: dict[str, dict] = {}
    for path in files:
        metrics_file = artefacts.read_json(path)
        found = metrics_file.get("summary")
        if found is None:
            raise KilnError(f"{path}: no section `summary`", "delete it and run again: an older Kiln made it")
        for name, reason in metrics_file.get("left_out", {}).items():
            step.log.warning("%s: %s is left out: %s", path, name, reason)
        doubled = metrics.keys() & found.keys()
        if doubled:
            raise KilnError(f"{path}: {', '.join(sorted(doubled))} stands in two files", "this is a defect: report it")
        metrics |= {name: {**one, "file": os.path.relpath(path, place)} for name, one in found.items()}
    return metrics


def main(argv: Sequence[str] | None = None) -> None:
    made = step.parser(__doc__)
    for pipeline in PIPELINES:
        made.add_argument(f"--{pipeline}", type=Path, nargs="*", default=[], help=f"metrics files of {pipeline}")
    made.add_argument("--output", type=Path, required=True, help="summary.json")
    run(made.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    """Summarise the metrics files that `args` name."""
    files = {pipeline: getattr(args, pipeline) for pipeline in PIPELINES}
    inputs = {f"{pipeline} {path.parent.name}": path for pipeline, paths in files.items() for path in paths}
    record = step.record(args, "scripts.report.summarise", None, inputs)
    summary = {pipeline: gather(paths, args.output.parent) for pipeline, paths in files.items() if paths}
    artefacts.write_json(args.output, summary)
    for line in headlines(summary):
        step.log.info("%s", line)
    record.write(args.meta, [args.output])


if __name__ == "__main__":
    step.run(main)
