"""The scores of all variants side by side: each run's, and over its seeds each variant's mean and spread.

Rule `report_compare_variants`. `variants.csv` holds a row for each run and metric, `variants.md` a table for each
pipeline: mean +- standard deviation over seeds (n - 1 in the denominator); of one seed the value alone.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from scripts.common import artefacts, step
from scripts.common.errors import KilnError
from scripts.report.summarise import PIPELINES, gather

COLUMNS = ["pipeline", "metric", "variant", "run", "value", "ci_low", "ci_high", "n", "baseline", "higher_is_better"]


def files_of_runs(pipeline: str, given: Sequence[str]) -> dict[tuple[str, str], list[Path]]:
    """{(variant, run): its files} of `VARIANT/RUN=FILE`.

    Raises:
        KilnError: an item has another form.
    """
    files: dict[tuple[str, str], list[Path]] = {}
    for item in given:
        name, equals, path = item.partition("=")
        variant, slash, run = name.partition("/")
        if not (equals and slash and path):
            raise KilnError(f"--{pipeline} {item!r}: expected VARIANT/RUN=FILE", "give it as main/main=metrics.json")
        files.setdefault((variant, run), []).append(Path(path))
    return files


def rows(pipeline: str, given: Sequence[str]) -> list[dict]:
    """A row for each metric of `VARIANT/RUN=FILE`, as many files of a run as its metrics stand in.

    Raises:
        KilnError: an item has another form, or a file has no section `summary`.
    """
    found = []
    for (variant, run), paths in files_of_runs(pipeline, given).items():
        for metric, facts in gather(paths).items():
            low, high = facts.get("ci95") or (None, None)
            kept = {name: facts.get(name) for name in ("value", "n", "baseline", "higher_is_better")}
            place = {"pipeline": pipeline, "metric": metric, "variant": variant, "run": run}
            found.append({**place, **kept, "ci_low": low, "ci_high": high})
    return found


def by_variant(frame: pd.DataFrame) -> pd.DataFrame:
    """One row for each pipeline, metric and variant: runs, mean, sd (NaN of one run), min, max; order as found."""
    keys = ["pipeline", "metric", "variant"]
    table = frame.groupby(keys, sort=False)["value"].agg(["count", "mean", "std", "min", "max"]).reset_index()
    return table.rename(columns={"count": "seeds", "std": "sd"})


def as_markdown(frame: pd.DataFrame) -> str:
    """A table for each pipeline, a row for each metric, a column for each variant."""
    lines = ["# Variants", "", "Mean ± standard deviation over seeds; of one seed the value alone.", ""]
    table = by_variant(frame)
    for pipeline, part in table.groupby("pipeline", sort=False):
        variants = list(dict.fromkeys(part["variant"]))
        seeds = part.groupby("variant")["seeds"].max()
        lines += [f"## {pipeline}", ""]
        titles = [f"{name} ({seeds[name]} seed{'s' if seeds[name] > 1 else ''})" for name in variants]
        lines += [f"| metric | {' | '.join(titles)} |", f"|---|{'---|' * len(variants)}"]
        for metric, one in part.groupby("metric", sort=False):
            cells = {row.variant: _cell(row) for row in one.itertuples()}
            lines.append(f"| {metric} | {' | '.join(cells.get(name, '') for name in variants)} |")
        lines.append("")
    return "\n".join(lines)


def _cell(row) -> str:
    return f"{row.mean:.4g}" if row.seeds == 1 else f"{row.mean:.4g} ± {row.sd:.2g}"


def main(argv: Sequence[str] | None = None) -> None:
    made = step.parser(__doc__)
    for pipeline in PIPELINES:
        made.add_argument(
            f"--{pipeline}", nargs="*", default=[], metavar="VARIANT/RUN=FILE", help=f"metrics files of {pipeline}"
        )
    made.add_argument("--output-folder", type=Path, required=True, help="where variants.csv and variants.md go")
    run(made.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    """Compare the runs whose metrics files `args` name."""
    given = {pipeline: getattr(args, pipeline) for pipeline in PIPELINES}
    inputs = {f"{pipeline} {item}": Path(item.partition("=")[2]) for pipeline in PIPELINES for item in given[pipeline]}
    record = step.record(args, "scripts.report.compare_variants", None, inputs)
    found = [row for pipeline, items in given.items() for row in rows(pipeline, items)]
    if not found:
        raise KilnError("no metrics file is given", "name at least one: --rae main/main=metrics.json")
    frame = pd.DataFrame(found)[COLUMNS]
    outputs = [args.output_folder / name for name in ("variants.csv", "variants.md")]
    artefacts.write_text(outputs[0], frame.to_csv(index=False))
    artefacts.write_text(outputs[1], as_markdown(frame))
    record.write(args.meta, outputs)


if __name__ == "__main__":
    step.run(main)
