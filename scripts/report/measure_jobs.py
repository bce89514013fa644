"""What each job and each rule took: seconds, peak memory of the machine and of its GPUs, items a second.

Rule `report_measure_jobs`. `jobs.csv` has a row for each job, `rules.csv` for each rule; see `scripts.report.jobs`.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from scripts.common import artefacts, step
from scripts.common.errors import KilnError
from scripts.report.jobs import by_rule, read_jobs


def main(argv: Sequence[str] | None = None) -> None:
    made = step.parser(__doc__)
    made.add_argument("--results", type=Path, required=True, help="the results folder")
    made.add_argument("--output-folder", type=Path, required=True, help="where jobs.csv and rules.csv go")
    run(made.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    """Measure the jobs below `args.results`."""
    record = step.record(args, "scripts.report.measure_jobs", None, {})
    jobs = read_jobs(args.results)
    if jobs.empty:
        raise KilnError(f"{args.results}/benchmarks: no job is noted there", "give the folder of finished results")
    outputs = [args.output_folder / name for name in ("jobs.csv", "rules.csv")]
    for path, table in zip(outputs, (jobs, by_rule(jobs)), strict=True):
        artefacts.write_text(path, table.to_csv(index=False, float_format="%.6g"))
    record.write(args.meta, outputs, items=len(jobs))


if __name__ == "__main__":
    step.run(main)
