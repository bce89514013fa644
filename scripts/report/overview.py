"""Print what a finished run of all pipelines has to show: the report, the headline numbers, where the time went.

python -m scripts.report.overview results/demo
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from scripts.common import artefacts, step
from scripts.report.headlines import headline, verdict
from scripts.report.jobs import read_jobs

HEADLINES = {  # the number of each pipeline that its paper is about
    "vase": "sft_accuracy",
    "busi": "balanced_accuracy",
    "rae": "dinov2_rfid",
    "coca": "retrieval_r5",
    "biomedica": "recall_at_5",
}
WAITING = ("demo_serve_hub",)  # services: they last as long as the jobs that use them, whose time is counted
LONGEST = 10  # rules that are named


def busy_seconds(jobs: pd.DataFrame) -> float:
    """Seconds in which a job ran at least: the length of the union of the times of `jobs` (ended, seconds)."""
    total, until = 0.0, float("-inf")
    for start, end in sorted(zip(jobs["ended"] - jobs["seconds"], jobs["ended"], strict=True)):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def main_metric(pipeline: str, metrics: Mapping[str, Any]) -> str | None:
    """Name of the metric that stands for a pipeline: of `HEADLINES`, else its first one; None of no metrics."""
    name = HEADLINES.get(pipeline)
    return name if name in metrics else next(iter(metrics), None)


def headlines(summary: dict) -> list[str]:
    """A line for the headline metric of each pipeline, and whether its interval is clear of the baseline."""
    lines = []
    for pipeline, name in HEADLINES.items():
        one = summary.get(pipeline, {}).get(name)
        if one is None:
            lines.append(f"{pipeline:9} {name:26} not in this run")
            continue
        lines.append(f"{headline(pipeline, name, one)}  {_verdict(one)}".rstrip())
    return lines


def _verdict(one: dict) -> str:
    return {"better": "better", "not clearly better": "NOT CLEARLY BETTER"}.get(verdict(one), "")


def times(jobs: pd.DataFrame) -> list[str]:
    """Lines that say how long it took: in all, by pipeline, and the rules that took longest, in seconds.

    Args:
        jobs: as of `scripts.report.jobs.read_jobs`.
    """
    jobs = jobs[~jobs["rule"].isin(WAITING)]
    if jobs.empty:
        return ["time: no benchmark tables here"]
    total, busy = jobs["seconds"].sum(), busy_seconds(jobs)
    spread = f"{total / busy:.1f} at once on average" if busy else "too short to tell how many at once"
    lines = [f"time: {busy:.0f} s, in which {len(jobs)} jobs took {total:.0f} s: {spread}"]
    for title, names in (("by pipeline", jobs["rule"].str.partition("_")[0]), ("longest rules", jobs["rule"])):
        sums = jobs.groupby(names.rename("name"))["seconds"].agg(["sum", "size"]).reset_index()
        sums = sums.sort_values(["sum", "name"], ascending=[False, True]).head(LONGEST)
        lines += ["", f"{title}:"]
        for name, seconds, count in sums.itertuples(index=False):
            share, plural = 100 * seconds / (total or 1), "s" * (count > 1)
            lines.append(f"  {name:34} {seconds:7.0f} s  {share:3.0f} %  {count:4} job{plural}")
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("results", type=Path, help="the folder of results, such as results/demo")
    results = made.parse_args(argv).results
    summary = artefacts.read_json(results / "summary.json")
    count = sum(map(len, summary.values()))
    lines = ["", *times(read_jobs(results)), "", "headline of each pipeline, with its 95 % interval:"]
    lines += headlines(summary)
    lines += ["", f"all {count} numbers: {results}/summary.json", f"the report:     {results}/index.html"]
    print("\n".join(lines))


if __name__ == "__main__":
    step.run(main)
