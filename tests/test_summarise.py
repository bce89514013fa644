"""The headline metrics of all pipelines in one file, and as lines."""

import json
import typing
from pathlib import Path

import pytest

from scripts import config
from scripts.common import prune
from scripts.common.errors import KilnError
from scripts.report import summarise
from scripts.report.headlines import counted, digits, headlines

ONE = {"value": 0.5, "baseline": 0.25, "baseline_kind": "chance", "ci95": [0.4, 0.6], "higher_is_better": True, "n": 7}
FEW = {**ONE, "ci95": None, "reason": "one patient: no interval"}


def metrics(path: Path, summary: dict | None, **more) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(({} if summary is None else {"summary": summary}) | more))
    return path


def gathered(results: Path, **files: list[Path]) -> dict:
    given = [part for name, paths in files.items() for part in (f"--{name}", *map(str, paths))]
    summarise.main([*given, "--output", str(results / "summary.json"), "--meta", str(results / "summary.meta.json")])
    return json.loads((results / "summary.json").read_text())


def test_each_metric_keeps_its_values_and_names_its_file(tmp_path):
    first = metrics(tmp_path / "vase/evaluate/main/metrics.json", {"sft_accuracy": ONE})
    second = metrics(tmp_path / "vase/train_classifier/main/metrics.json", {"quality": FEW})
    other = metrics(tmp_path / "coca/evaluate/main/metrics.json", {"quality": ONE})
    assert gathered(tmp_path, vase=[first, second], coca=[other]) == {
        "vase": {
            "sft_accuracy": {**ONE, "file": "vase/evaluate/main/metrics.json"},
            "quality": {**FEW, "file": "vase/train_classifier/main/metrics.json"},
        },
        "coca": {"quality": {**ONE, "file": "coca/evaluate/main/metrics.json"}},
    }


def test_what_is_left_out_for_few_items_is_said_and_stops_nothing(tmp_path, caplog):
    made = metrics(tmp_path / "coca/metrics.json", {}, left_out={"retrieval_r5": "one patient: no interval"})
    assert gathered(tmp_path, coca=[made]) == {"coca": {}}
    assert "retrieval_r5 is left out: one patient: no interval" in caplog.text


def test_a_file_without_summary_and_a_metric_in_two_files_are_refused(tmp_path):
    with pytest.raises(KilnError, match="old.json: no section `summary`"):
        gathered(tmp_path, rae=[metrics(tmp_path / "old.json", None)])
    twice = [metrics(tmp_path / name, {"rfid": ONE}) for name in ("a.json", "b.json")]
    with pytest.raises(KilnError, match="rfid stands in two files"):
        gathered(tmp_path, rae=twice)
    assert not (tmp_path / "summary.json").exists()


def test_a_line_has_the_interval_or_says_why_there_is_none():
    with_interval, without = headlines({"coca": {"a": ONE, "b": FEW}})
    assert "0.500 [0.400, 0.600]  n = 7 " in with_interval and "chance: 0.250" in with_interval
    assert "0.500 (one patient: no interval)  n = 7 " in without


def test_a_difference_has_its_sign_and_says_of_what_it_is():
    gap = {**ONE, "value": 0.303, "ci95": [-0.01, 0.4], "baseline": 0.0, "baseline_kind": "local_only", "trivial": -0.2}
    (line,) = headlines({"biomedica": {"hybrid_over_local": {**gap, "difference_of": "recall at 5"}}})
    assert "+0.303 [-0.0100, +0.400]" in line and "local only: 0 " in line and "trivial features: -0.200" in line
    assert line.endswith("(difference of recall at 5)")
    assert "+" not in headlines({"biomedica": {"a": gap}})[0]


@pytest.mark.parametrize(
    ("facts", "text"),
    [
        ({}, "1,234"),
        ({"groups": 10}, "1,234"),
        ({"groups": 47, "grouped_by": "vase"}, "1,234 (47 vases)"),
        ({"groups": 1, "grouped_by": "vase"}, "1,234 (1 vase)"),
        ({"groups": 1149, "grouped_by": "near-twin group"}, "1,234 (1,149 near-twin groups)"),
    ],
)
def test_a_count_says_of_how_many_groups_the_items_are(facts, text):
    assert counted({**ONE, "n": 1234, **facts}) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.5, "0.500"), (0.123456789, "0.123"), (0.0012345, "0.00123"), (1.0, "1.000"), (0.9996, "0.9996"),
        (23.45678, "23.46"), (-0.0456, "-0.0456"), (123.456, "123.5"), (999.97, "1000"),
        (12345.6, "12,346"), (0.0, "0"),
    ],
)  # fmt: skip
def test_numbers_have_as_many_digits_as_one_reads(value, text):
    assert digits(value) == text


def test_every_pipeline_of_the_configuration_is_reported_on_and_pruned():
    (named,) = typing.get_args(config.Config.model_fields["pipelines"].annotation)
    assert typing.get_args(named) == summarise.PIPELINES
    assert set(summarise.PIPELINES) <= set(prune.OURS)
