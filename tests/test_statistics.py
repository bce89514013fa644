import json
import math
import warnings

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from scripts.common import classification, retrieval, statistics
from scripts.common.errors import KilnError

FEW = 400  # resamples in properties that do not depend on how many
NUMBERS = st.lists(st.integers(-1000, 1000).map(lambda i: i / 8), min_size=2, max_size=30)


# --- intervals ---


@pytest.mark.parametrize("statistic", ["mean", "median"])
def test_interval_agrees_with_scipy(statistic):
    values = np.random.default_rng(1).gamma(2.0, size=150)
    ours = statistics.bootstrap_interval(values, statistic, n_resamples=8000)
    theirs = scipy.stats.bootstrap(
        (values,), getattr(np, statistic), n_resamples=8000, method="percentile", rng=np.random.default_rng(2)
    ).confidence_interval
    assert np.allclose(ours, theirs, atol=0.15 * (theirs.high - theirs.low))


def test_grouped_interval_agrees_with_scipy_on_groups():
    rng = np.random.default_rng(3)
    groups = rng.integers(0, 40, 300)
    values = rng.normal(size=300) + rng.normal(size=40)[groups]
    sums, sizes = np.bincount(groups, weights=values), np.bincount(groups)
    theirs = scipy.stats.bootstrap(
        (sums, sizes),
        lambda s, n, axis: s.sum(axis) / n.sum(axis),
        paired=True,
        vectorized=True,
        n_resamples=8000,
        method="percentile",
        rng=np.random.default_rng(4),
    ).confidence_interval
    ours = statistics.bootstrap_interval(values, groups=groups, n_resamples=8000)
    assert np.allclose(ours, theirs, atol=0.08 * (theirs.high - theirs.low))
    alone = statistics.bootstrap_interval(values, n_resamples=8000)
    assert ours[1] - ours[0] > 1.3 * (alone[1] - alone[0])


def test_counted_and_listed_resampling_agree():
    values = np.r_[np.ones(60), np.zeros(140)]  # two kinds of values: drawn by counts
    counted = statistics.bootstrap_interval(values, n_resamples=20000)
    exact = scipy.stats.binom.ppf([0.025, 0.975], 200, 0.3) / 200
    listed = statistics.bootstrap_interval(values, lambda v: float(v.mean()), n_resamples=4000)
    assert np.allclose(counted, exact, atol=0.011)
    assert np.allclose(listed, exact, atol=0.011)


def test_interval_of_a_million_rows_is_near_the_normal_one():
    values = np.zeros(1_000_000)
    values[:250_000] = 1
    lo, hi = statistics.bootstrap_interval(values)
    half = 1.96 * math.sqrt(0.25 * 0.75 / 1e6)
    assert (lo, hi) == pytest.approx((0.25 - half, 0.25 + half), abs=0.1 * half)


def test_coverage_is_near_the_level():
    rng = np.random.default_rng(5)
    hits = 0
    for i in range(200):
        lo, hi = statistics.bootstrap_interval(rng.normal(size=50), n_resamples=FEW, seed=i, level=0.9)
        hits += lo <= 0 <= hi
    assert 0.82 <= hits / 200 <= 0.96


@given(NUMBERS)
@settings(deadline=None, max_examples=40)
def test_interval_of_symmetrical_data_holds_the_mean(values):
    symmetrical = np.r_[values, -np.array(values)]
    lo, hi = statistics.bootstrap_interval(symmetrical, n_resamples=FEW)
    assert lo <= 1e-9 and hi >= -1e-9
    assert min(symmetrical) <= lo and hi <= max(symmetrical)


@given(NUMBERS, st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=40)
@pytest.mark.parametrize("statistic", ["mean", "median"])
def test_own_groups_equal_no_groups(statistic, values, random):
    names = [f"g{i}" for i in range(len(values))]
    random.shuffle(names)
    grouped = statistics.bootstrap_interval(values, statistic, groups=names, n_resamples=FEW)
    assert grouped == statistics.bootstrap_interval(values, statistic, n_resamples=FEW)


@given(NUMBERS, st.randoms(use_true_random=False), st.booleans())
@settings(deadline=None, max_examples=40)
@pytest.mark.parametrize("statistic", ["mean", "median"])
def test_order_does_not_matter(statistic, values, random, grouped):
    pairs = [(value, str(i % 2 + i % 3)) for i, value in enumerate(values)]
    shuffled = random.sample(pairs, len(pairs))
    first, second = (
        statistics.bootstrap_interval(
            [v for v, _ in items], statistic, groups=[g for _, g in items] if grouped else None, n_resamples=FEW
        )
        for items in (pairs, shuffled)
    )
    assert first == second


@given(st.floats(-1e6, 1e6), st.integers(2, 50), st.booleans())
@settings(deadline=None, max_examples=40)
def test_constant_data_give_a_zero_width_interval(value, n, grouped):
    groups = [i % 2 for i in range(n)] if grouped else None
    assert statistics.bootstrap_interval([value] * n, groups=groups, n_resamples=50) == (value, value)


def test_paired_difference_is_narrower_than_the_parts():
    a = np.random.default_rng(6).normal(0, 10, 200)
    b = a - 1 + np.random.default_rng(7).normal(0, 0.1, 200)
    lo, hi = statistics.paired_difference_interval(a, b)
    alone = statistics.bootstrap_interval(a)
    assert 0.9 < lo < np.mean(a - b) < hi < 1.1
    assert hi - lo < 0.05 * (alone[1] - alone[0])
    assert statistics.paired_difference_interval(a, a, groups=np.arange(200) // 4) == (0, 0)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: statistics.bootstrap_interval([]), "shape"),
        (lambda: statistics.bootstrap_interval([1.0]), "at least two"),
        (lambda: statistics.bootstrap_interval([1.0, math.nan]), r"values\[1\] is nan"),
        (lambda: statistics.bootstrap_interval([1, 2], groups=["a", "a"]), "at least two"),
        (lambda: statistics.bootstrap_interval([1, 2], groups=["a"]), "one group per item"),
        (lambda: statistics.bootstrap_interval([1, 2], groups=["a", None]), "no group"),
        (lambda: statistics.bootstrap_interval([1, 2], groups=[1.0, math.nan]), "no group"),
        (lambda: statistics.bootstrap_interval([1, 2], lambda v: math.nan), "undefined"),
        (lambda: statistics.paired_difference_interval([1, 2], [1, 2, 3]), "paired"),
    ],
)
def test_intervals_refuse(call, says):
    with pytest.raises(KilnError, match=says):
        call()


def test_unknown_statistic_or_level_is_refused():
    with pytest.raises(ValueError, match="mode"):
        statistics.bootstrap_interval([1, 2], "mode")
    with pytest.raises(ValueError, match="level"):
        statistics.bootstrap_interval([1, 2], level=95)


# --- entries of summary.json ---


def test_metric_is_json_in_the_agreed_form():
    made = statistics.metric(np.float32(0.5), np.int64(10), (0.25, 0.75), 0.1, "chance", trivial=0.2)
    assert json.loads(json.dumps(made)) == {
        "value": 0.5,
        "baseline": 0.1,
        "baseline_kind": "chance",
        "n": 10,
        "ci95": [0.25, 0.75],
        "higher_is_better": True,
        "trivial": 0.2,
    }


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"value": math.nan}, KilnError),
        ({"value": math.inf}, KilnError),
        ({"ci95": (0.1, math.nan)}, KilnError),
        ({"extra": math.nan}, KilnError),
        ({"baseline": math.nan, "baseline_kind": "chance"}, KilnError),
        ({"ci95": (0.9, 0.1)}, ValueError),
        ({"n": 0}, ValueError),
        ({"baseline": 0.1}, ValueError),
        ({"baseline_kind": "chance"}, ValueError),
        ({"baseline": 0.1, "baseline_kind": "luck"}, ValueError),
    ],
)
def test_metric_refuses(arguments, error):
    with pytest.raises(error):
        statistics.metric(**{"value": 0.5, "n": 10, "ci95": (0.4, 0.6)} | arguments)


# --- classification ---


def _sample(classes, n=120, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.r_[np.arange(classes), rng.integers(0, classes, n - classes)]
    scores = rng.normal(size=(n, classes)).round(1)  # rounded: ties
    scores[np.arange(n), labels] += 1
    return labels, np.exp(scores) / np.exp(scores).sum(1, keepdims=True)


@given(st.integers(2, 5), st.integers(0, 1000))
@settings(deadline=None, max_examples=25)
def test_report_agrees_with_sklearn(classes, seed):
    labels, probabilities = _sample(classes, seed=seed)
    predicted = probabilities.argmax(1)
    report = classification.classification_report(labels, probabilities, n_resamples=20)
    assert report["confusion_matrix"] == sk.confusion_matrix(labels, predicted).tolist()
    assert report["accuracy"]["value"] == pytest.approx(sk.accuracy_score(labels, predicted))
    assert report["balanced_accuracy"]["value"] == pytest.approx(sk.balanced_accuracy_score(labels, predicted))
    weighted = sk.precision_recall_fscore_support(labels, predicted, average="weighted", zero_division=0)
    assert [report[k]["value"] for k in ("precision", "recall", "f1")] == pytest.approx(weighted[:3])
    every = sk.precision_recall_fscore_support(labels, predicted, zero_division=0)
    for i, key in enumerate(("precision", "recall", "f1")):
        ours = [entry[key]["value"] for entry in report["per_class"].values()]
        assert [v or 0 for v in ours] == pytest.approx(every[i])
    assert [entry["support"] for entry in report["per_class"].values()] == every[3].tolist()
    scores = probabilities[:, 1] if classes == 2 else probabilities
    assert report["roc_auc"]["value"] == pytest.approx(sk.roc_auc_score(labels, scores, multi_class="ovr"))
    json.dumps(report, allow_nan=False)


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("grouped", [False, True])
def test_report_intervals_agree_with_a_plain_bootstrap(classes, grouped):
    labels, probabilities = _sample(classes)
    groups = np.arange(120) // 4 if grouped else np.arange(120)
    report = classification.classification_report(labels, probabilities, groups if grouped else None, n_resamples=3000)
    rng, predicted = np.random.default_rng(9), probabilities.argmax(1)
    members = [np.flatnonzero(groups == g) for g in np.unique(groups)]
    rows = [np.concatenate([members[i] for i in rng.integers(0, len(members), len(members))]) for _ in range(600)]
    references = {
        "accuracy": lambda r: sk.accuracy_score(labels[r], predicted[r]),
        "f1": lambda r: sk.f1_score(labels[r], predicted[r], average="weighted", zero_division=0),
        "balanced_accuracy": lambda r: sk.balanced_accuracy_score(labels[r], predicted[r]),
        "roc_auc": lambda r: sk.roc_auc_score(
            labels[r], probabilities[r, 1] if classes == 2 else probabilities[r], multi_class="ovr"
        ),
    }
    for name, reference in references.items():
        lo, hi = np.percentile([reference(r) for r in rows], [2.5, 97.5])
        assert report[name]["ci95"] == pytest.approx([lo, hi], abs=0.15 * (hi - lo)), name


def test_report_by_hand():
    report = classification.classification_report([1, 1, 1, 0], [0.9, 0.6, 0.2, 0.4], classes=["no", "yes"])
    assert report["confusion_matrix"] == [[1, 0], [1, 2]]
    assert report["accuracy"]["value"] == 0.75
    assert report["balanced_accuracy"]["value"] == pytest.approx((1 + 2 / 3) / 2)
    assert report["roc_auc"]["value"] == pytest.approx(2 / 3)
    assert report["per_class"]["yes"]["precision"] == statistics.metric(1.0, 2, [1.0, 1.0]) | {
        "resamples_left_out": report["per_class"]["yes"]["precision"]["resamples_left_out"]
    }
    assert report["per_class"]["no"]["f1"]["value"] == pytest.approx(2 / 3)


def test_report_does_not_depend_on_order():
    labels, probabilities = _sample(3)
    groups = np.arange(120) // 5
    shuffled = np.random.default_rng(1).permutation(120)
    for g in (None, groups):
        first = classification.classification_report(labels, probabilities, g, n_resamples=100)
        second = classification.classification_report(
            labels[shuffled], probabilities[shuffled], None if g is None else g[shuffled], n_resamples=100
        )
        assert first == second


def test_report_says_why_a_number_does_not_exist():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = classification.classification_report([0, 0, 0], [0.1, 0.2, 0.3], classes=["good", "bad"])
    assert report["roc_auc"] == {"value": None, "reason": "no item of class bad"}
    assert report["per_class"]["bad"]["recall"]["value"] is None
    assert report["per_class"]["bad"]["precision"] == {"value": None, "reason": "never predicted"}
    assert report["accuracy"]["ci95"] == [1, 1]


def test_report_of_answers_counts_missing_ones_as_wrong():
    report = classification.classification_report([0, 0, 1, 1], None, predictions=[0, -1, 1, 0])
    assert report["unanswered"] == [1, 0]
    assert report["confusion_matrix"] == [[1, 0], [1, 1]]
    assert report["accuracy"]["value"] == 0.5
    assert report["roc_auc"] == {"value": None, "reason": "no probabilities"}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"labels": [0, 1], "probabilities": [[3.0, 1.0], [0.5, 0.5]]}, "no probabilities"),
        ({"labels": [0, 1], "probabilities": [1.5, 0.5]}, "no probabilities"),
        ({"labels": [0, 2], "probabilities": [0.5, 0.5]}, "labels go from 0 to 2"),
        ({"labels": [0, 0.5], "probabilities": [0.5, 0.5]}, "integers"),
        ({"labels": [0, 1, 1], "probabilities": [0.5, 0.5]}, "2 predictions for 3 labels"),
        ({"labels": [0, 1], "probabilities": [0.5, math.nan]}, "nan"),
        ({"labels": [0, 1], "probabilities": [0.5, 0.5], "groups": [1, 2, 3]}, "one group per item"),
        ({"labels": [0, 1], "probabilities": [0.5, 0.5], "classes": ["a", "a"]}, "distinct"),
    ],
)
def test_report_refuses(arguments, says):
    with pytest.raises(KilnError, match=says):
        classification.classification_report(**arguments)


# --- retrieval ---


def _brute_ranks(similarity, rows, columns):
    ranks = []
    for i, row in enumerate(similarity):
        best = max(s for s, c in zip(row, columns, strict=True) if c == rows[i])
        ranks.append(1 + sum(s >= best for s, c in zip(row, columns, strict=True) if c != rows[i]))
    return ranks


@given(st.integers(2, 8), st.integers(2, 12), st.integers(0, 10**6))
@settings(deadline=None, max_examples=60)
def test_recall_agrees_with_brute_force(n_rows, n_columns, seed):
    rng = np.random.default_rng(seed)
    shared = min(n_rows, n_columns)
    rows = rng.permutation(np.arange(n_rows) % shared)
    columns = rng.permutation(np.arange(n_columns) % shared)
    similarity = rng.integers(0, 6, (n_rows, n_columns)).astype(float)  # few values: many ties
    made = retrieval.recall_at_k(similarity, [1, 2], relevant=(rows, columns))
    for direction, ranks in (
        ("row_to_column", _brute_ranks(similarity, rows, columns)),
        ("column_to_row", _brute_ranks(similarity.T, columns, rows)),
    ):
        assert made[direction]["ranks"].tolist() == ranks
        assert made[direction]["recall"] == {k: np.mean(np.array(ranks) <= k) for k in (1, 2)}
        assert made[direction]["median_rank"] == np.median(ranks)


def test_recall_in_small_blocks_is_the_same(monkeypatch):
    similarity = np.random.default_rng(0).normal(size=(40, 40))
    whole = retrieval.recall_at_k(similarity, [1, 5])
    monkeypatch.setattr(statistics, "BLOCK_CELLS", 100)
    blocks = retrieval.recall_at_k(similarity, [1, 5])
    for direction in whole:
        assert whole[direction].pop("ranks").tolist() == blocks[direction].pop("ranks").tolist()
    assert whole == blocks


def test_a_constant_model_gets_nothing_and_a_perfect_one_all():
    constant = retrieval.recall_at_k(np.ones((10, 10)), [1, 9, 10])["row_to_column"]
    assert constant["recall"] == {1: 0, 9: 0, 10: 1}
    perfect = retrieval.recall_at_k(np.eye(10), [1])["column_to_row"]
    assert (perfect["recall"][1], perfect["median_rank"]) == (1, 1)


@pytest.mark.parametrize("ids", [[0, 1, 2, 3, 4], [7, 7, 3, 9, 3, 3], [1, 1, 1]])
def test_chance_from_ids_alone_is_that_of_any_similarity(ids):
    noise = np.random.default_rng(0).normal(size=(len(ids), len(ids)))
    found = retrieval.recall_at_k(noise, [1, 2, 3], (ids, ids))["row_to_column"]["chance"]
    assert {k: retrieval.chance_recall(ids, k) for k in (1, 2, 3)} == pytest.approx(found)
    assert retrieval.chance_recall(ids, len(ids)) == 1
    for k in (0, len(ids) + 1):
        with pytest.raises(KilnError, match=f"recall at {k} among {len(ids)} candidates"):
            retrieval.chance_recall(ids, k)


def test_chance_is_what_random_similarities_reach():
    rng = np.random.default_rng(2)
    rows, columns = np.arange(30) % 10, np.arange(50) % 10
    runs = [retrieval.recall_at_k(rng.normal(size=(30, 50)), [3], (rows, columns))["row_to_column"] for _ in range(200)]
    assert np.mean([run["recall"][3] for run in runs]) == pytest.approx(runs[0]["chance"][3], abs=0.02)
    assert retrieval.recall_at_k(np.eye(50), [5])["row_to_column"]["chance"][5] == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((np.ones((2, 3)), [1]), "relevant"),
        ((np.array([[1, math.nan], [0, 1]]), [1]), "not finite"),
        ((np.eye(3), [4]), "recall at"),
        ((np.eye(3), [1], ([0, 1, 2], [0, 1, 1])), "nothing relevant"),
        ((np.eye(3), [1], ([0, 1], [0, 1, 1])), "one id per item"),
        ((np.ones((0, 0)), [1]), "shape"),
    ],
)
def test_recall_refuses(arguments, says):
    with pytest.raises(KilnError, match=says):
        retrieval.recall_at_k(*arguments)


# --- baseline ---


def test_trivial_baseline():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 2)) * [1, 1000]  # without standardising, the large feature drowns the small one
    y = np.where(x[:, 0] > 0, "yes", "no")
    assert classification.trivial_baseline(x[:100], y[:100], x[100:], y[100:]) > 0.95
    noise = rng.normal(size=(200, 2))
    assert classification.trivial_baseline(noise[:100], y[:100], noise[100:], y[100:]) < 0.7
    assert classification.trivial_baseline([[1], [2]], ["a", "a"], [[1], [2]], ["a", "b"]) == 0.5


def test_trivial_baseline_refuses():
    with pytest.raises(KilnError, match="do not fit"):
        classification.trivial_baseline([[1], [2]], [0, 1], [[1, 2]], [0])
    with pytest.raises(KilnError, match="nan"):
        classification.trivial_baseline([[1], [math.nan]], [0, 1], [[1]], [0])
