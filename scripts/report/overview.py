"""Print what a finished run of all pipelines has to show: the report, the headline numbers, where the time went.

python -m scripts.report.overview results/demo
"""

import argparse
import csv
import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path

from scripts.common import artefacts, step
from scripts.common.errors import KilnError
from scripts.report.headlines import headline

HEADLINES = {  # the number of each pipeline that its paper is about
    "vase": "sft_accuracy",
    "busi": "balanced_accuracy",
    "rae": "dinov2_rfid",
    "coca": "retrieval_r5",
    "biomedica": "recall_at_5",
}
WAITING = ("demo_serve_hub",)  # services: they last as long as the jobs that use them, whose time is counted
LONGEST = 10  # rules that are named


@dataclasses.dataclass(frozen=True)
class Job:
    """A job's benchmark: its rule, when it ended (seconds since the epoch), how long it took (seconds)."""

    rule: str
    end: float
    seconds: float

    @property
    def pipeline(self) -> str:
        """What the rule's name begins with."""
        return self.rule.partition("_")[0]


def read_jobs(folder: Path) -> list[Job]:
    """The last run of each job below `{results}/benchmarks`: {pipeline}/{step}[/wildcards].tsv; services are left out.

    Raises:
        KilnError: a table is not one of Snakemake's benchmarks.
    """
    jobs = []
    for path in sorted(folder.rglob("*.tsv")):
        parts = path.relative_to(folder).with_suffix("").parts
        rule = "_".join(parts[:2])
        try:
            with path.open(encoding="utf-8", newline="") as handle:
                seconds = sum(float(row["s"]) for row in csv.DictReader(handle, delimiter="\t"))
        except (KeyError, TypeError, ValueError):
            hint = "delete it; the rule's next run writes it anew"
            raise KilnError(f"{path}: expected a column `s` of seconds, as Snakemake's benchmarks have", hint) from None
        if rule not in WAITING:
            jobs.append(Job(rule, path.stat().st_mtime, seconds))
    return jobs


def busy_seconds(jobs: Iterable[Job]) -> float:
    """Seconds in which a job ran at least: the length of the union of the jobs' times."""
    total, until = 0.0, float("-inf")
    for start, end in sorted((job.end - job.seconds, job.end) for job in jobs):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


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
    if one.get("baseline") is None:
        return ""
    low, high = one["ci95"]
    clear = low > one["baseline"] if one["higher_is_better"] else high < one["baseline"]
    return "better" if clear else "NOT CLEARLY BETTER"


def times(jobs: Sequence[Job]) -> list[str]:
    """Lines that say how long it took: in all, by pipeline, and the rules that took longest, in seconds."""
    if not jobs:
        return ["time: no benchmark tables here"]
    total, busy = sum(job.seconds for job in jobs), busy_seconds(jobs)
    spread = f"{total / busy:.1f} at once on average" if busy else "too short to tell how many at once"
    lines = [f"time: {busy:.0f} s, in which {len(jobs)} jobs took {total:.0f} s: {spread}"]
    for title, key in (("by pipeline", lambda job: job.pipeline), ("longest rules", lambda job: job.rule)):
        lines += ["", f"{title}:"]
        lines += _shares(jobs, key, total)[:LONGEST]
    return lines


def _shares(jobs: Sequence[Job], key, total: float) -> list[str]:
    sums: dict[str, list[float]] = {}
    for job in jobs:
        sums.setdefault(key(job), []).append(job.seconds)
    ordered = sorted(sums.items(), key=lambda item: (-sum(item[1]), item[0]))
    lines = []
    for name, one in ordered:
        share = 100 * sum(one) / total if total else 0.0
        lines.append(f"  {name:34} {sum(one):7.0f} s  {share:3.0f} %  {len(one):4} job{'s' * (len(one) > 1)}")
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("results", type=Path, help="the folder of results, such as results/demo")
    results = made.parse_args(argv).results
    summary = artefacts.read_json(results / "summary.json")
    count = sum(map(len, summary.values()))
    lines = ["", *times(read_jobs(results / "benchmarks")), "", "headline of each pipeline, with its 95 % interval:"]
    lines += headlines(summary)
    lines += ["", f"all {count} numbers: {results}/summary.json", f"report:         {results}/report.html"]
    print("\n".join(lines))


if __name__ == "__main__":
    step.run(main)
