"""The check of the demo's headline numbers: it names each effect that is missing, and nothing else."""

import pytest
from check_summary import WANTED, complaints

GOOD = {"value": 0.6, "baseline": 0.1, "ci95": [0.5, 0.7], "higher_is_better": True, "trivial": 0.2, "n": 100}


def of_retrieval(**changes) -> list[str]:
    """Complaints of coca.retrieval_r5 alone."""
    found = complaints({"coca": {"retrieval_r5": GOOD | {"baseline_kind": "chance"} | changes}})
    return [one for one in found if one.startswith("coca.retrieval_r5")]


def test_every_missing_metric_is_named():
    assert complaints({}) == [f"{pipeline}.{name} is missing" for pipeline, name in WANTED]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"baseline": 0.21}, "0.600 is less than 3.0 x 0.210"),
        ({"baseline": 0.5, "value": 1.6}, "interval [0.500, 0.700] is not clear of 0.500"),
        ({"trivial": 0.6}, "no better than trivial features"),
        ({"trivial": None}, "does not say what trivial features reach"),
        ({"baseline_kind": "majority"}, "baseline majority, expected chance"),
    ],
)
def test_a_weak_effect_is_named(changes, message):
    assert of_retrieval() == []
    (found,) = of_retrieval(**changes)
    assert message in found
