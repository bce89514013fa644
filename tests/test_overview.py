"""The end of `make demo`: five headline numbers against their baselines, where the time went, where the report is."""

import json
import os
import re
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from report_fixtures import write_benchmark

from scripts.common.errors import KilnError
from scripts.report import overview

ONE = {"value": 0.6, "baseline": 0.1, "baseline_kind": "chance", "n": 100, "ci95": [0.5, 0.7], "higher_is_better": True}


def results(place: Path, **rules: list[tuple[float, float]]) -> Path:
    """Results whose rules' jobs (end, seconds) have benchmarks; `__` parts a rule's pipeline from its step."""
    summary = {pipeline: {name: ONE, "other": ONE} for pipeline, name in overview.HEADLINES.items()}
    (place / "summary.json").write_text(json.dumps(summary))
    for rule, jobs in rules.items():
        for number, (end, seconds) in enumerate(jobs):
            os.utime(write_benchmark(place, f"{rule.replace('__', '/')}/s{number}", seconds), (end, end))
    return place


def printed(capsys, place: Path) -> str:
    overview.main([str(place)])
    return capsys.readouterr().out


def test_it_names_the_report_five_headlines_and_the_longest_rules(tmp_path, capsys):
    made = {f"busi__step_{number:02}": [(1000 + number, number)] for number in range(1, 13)}
    text = printed(capsys, results(tmp_path, **made, coca__train=[(2000, 60), (2060, 60)]))
    assert f"the report:     {tmp_path}/index.html" in text and f"all 10 numbers: {tmp_path}/summary.json" in text
    lines = [line for line in text.splitlines() if "chance: 0.100" in line]
    assert [line.split()[:2] for line in lines] == [list(pair) for pair in overview.HEADLINES.items()]
    assert all(line.endswith("  better") for line in lines)
    named = re.findall(r"^  (\w+) +(\d+) s +(\d+) % +(\d+) jobs?$", text.partition("longest rules:")[2], re.M)
    assert named[0] == ("coca_train", "120", "61", "2") and len(named) == overview.LONGEST
    assert named[1][0] == "busi_step_12" and "busi_step_01" not in dict(one[:2] for one in named)
    pipelines = text.partition("by pipeline:")[2].partition("longest rules:")[0]
    assert re.findall(r"^  (\w+) +(\d+) s", pipelines, re.M) == [("coca", "120"), ("busi", "78")]


def test_wall_time_counts_two_jobs_at_once_once_and_no_pause(tmp_path, capsys):
    place = results(tmp_path, rae__a=[(100, 40)], rae__b=[(100, 20)], rae__c=[(9000, 10)])
    assert "time: 50 s, in which 3 jobs took 70 s: 1.4 at once on average" in printed(capsys, place)


def test_a_service_waits_and_counts_not(tmp_path, capsys):
    text = printed(capsys, results(tmp_path, demo__serve_hub=[(100, 90)], rae__a=[(100, 40)]))
    assert "1 jobs took 40 s" in text and "serve_hub" not in text


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({"ci95": [0.09, 0.7]}, "NOT CLEARLY BETTER"),
        ({"higher_is_better": False}, "NOT CLEARLY BETTER"),
        ({"higher_is_better": False, "ci95": [0.01, 0.05]}, "better"),
        ({"baseline": None}, "n = 100"),
    ],
)
def test_a_number_that_is_not_clear_of_its_baseline_is_marked(changes, verdict):
    line = overview.headlines({"coca": {"retrieval_r5": ONE | changes}})[3]
    assert line.endswith(f"  {verdict}")


def test_pipelines_that_did_not_run_are_said_to_be_missing(tmp_path, capsys):
    (tmp_path / "summary.json").write_text(json.dumps({"coca": {"retrieval_r5": ONE}}))
    text = printed(capsys, tmp_path)
    assert text.count("not in this run") == 4 and "no benchmark tables" in text


def test_without_a_summary_the_hint_says_what_to_do(tmp_path):
    with pytest.raises(KilnError, match=r"summary\.json: no such file"):
        overview.main([str(tmp_path)])


@given(st.lists(st.tuples(st.integers(0, 500), st.integers(0, 50)), min_size=1))
@settings(deadline=None)
def test_busy_time_is_that_of_a_clock(spans):
    jobs = pd.DataFrame([(start + seconds, seconds) for start, seconds in spans], columns=["ended", "seconds"])
    ticks = {tick for start, seconds in spans for tick in range(start, start + seconds)}
    assert overview.busy_seconds(jobs) == len(ticks)
