"""Specificity, macro-F1, calibration, differences between parts, and trivial features scored in balance."""

import math
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from scripts.common import classification, statistics
from scripts.common.errors import KilnError


def _sample(seed, n=150, c=3, sharp=1.5):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, c, n)
    scores = rng.normal(size=(n, c)) + sharp * np.eye(c)[labels]
    return labels, np.exp(scores) / np.exp(scores).sum(1, keepdims=True)


# --- report ---


def test_specificity_and_macro_f1_agree_with_scikit_learn():
    labels, p = _sample(0)
    report = classification.classification_report(labels, p, n_resamples=100)
    decided = p.argmax(1)
    assert report["macro_f1"]["value"] == pytest.approx(sk.f1_score(labels, decided, average="macro"))
    for i in range(3):
        entry = report["per_class"][str(i)]["specificity"]
        assert entry["value"] == pytest.approx(sk.recall_score(labels != i, decided != i))
        assert entry["n"] == (labels != i).sum()


def test_specificity_and_macro_f1_by_hand():
    # truth 0 0 0 1 1 2, said 0 1 - 1 0 2: no answer is no claim to be of class 0, 1 or 2
    report = classification.classification_report([0, 0, 0, 1, 1, 2], None, predictions=[0, 1, -1, 1, 0, 2])
    specificity = [report["per_class"][name]["specificity"]["value"] for name in "012"]
    assert specificity == pytest.approx([2 / 3, 3 / 4, 1])
    assert report["macro_f1"]["value"] == pytest.approx((2 / 5 + 2 / 4 + 1) / 3)


def test_macro_f1_is_over_classes_that_occur():
    report = classification.classification_report([0, 0, 1, 1], None, predictions=[0, 2, 1, 1], classes="abc")
    reference = sk.f1_score([0, 0, 1, 1], [0, 2, 1, 1], labels=[0, 1], average="macro")
    assert report["macro_f1"]["value"] == pytest.approx(reference)
    assert report["per_class"]["c"]["specificity"]["value"] == 0.75
    alone = classification.classification_report([0, 0], None, predictions=[0, 1])
    assert alone["per_class"]["0"]["specificity"] == {"value": None, "reason": "no item of another class"}


def test_interval_of_specificity_agrees_with_resampling_by_hand():
    labels, p = _sample(1)
    report = classification.classification_report(labels, p, n_resamples=4000)
    rng = np.random.default_rng(1)
    other, unclaimed = labels != 0, p.argmax(1) != 0
    rows = [rng.integers(0, 150, 150) for _ in range(2000)]
    made = [(other[r] & unclaimed[r]).sum() / other[r].sum() for r in rows]
    lo, hi = np.percentile(made, [2.5, 97.5])
    assert report["per_class"]["0"]["specificity"]["ci95"] == pytest.approx([lo, hi], abs=0.15 * (hi - lo))


def test_without_resamples_there_are_values_and_no_intervals():
    labels, p = _sample(2)
    groups = np.arange(150) // 3
    whole = classification.classification_report(labels, p, groups, n_resamples=50)
    bare = classification.classification_report(labels, p, groups, n_resamples=0)
    assert bare["n_groups"] == whole["n_groups"] == 50
    for name in ("accuracy", "balanced_accuracy", "macro_f1", "roc_auc"):
        expected = {"value": whole[name]["value"], "n": 150, "ci95": None, "reason": "not resampled"}
        assert bare[name] == expected
    one = classification.classification_report([1], [[0.2, 0.8]], ["g"], n_resamples=0)
    assert (one["n_groups"], one["accuracy"]["value"], one["roc_auc"]["value"]) == (1, 1, None)


# --- calibration ---


def test_calibration_by_hand():
    p = [[0.75, 0.15, 0.1], [0.65, 0.25, 0.1], [0.2, 0.7, 0.1], [0.0, 0.05, 0.95]]
    found = classification.calibration([0, 1, 1, 2], p)
    # (0.6, 0.7] holds 0.65 (wrong) and 0.7 (right); (0.7, 0.8] holds 0.75; (0.9, 1] holds 0.95
    assert [one["n"] for one in found["bins"]] == [0, 0, 0, 0, 0, 0, 2, 1, 0, 1]
    assert found["bins"][6] == {"from": 0.6, "to": 0.7, "n": 2, "confidence": pytest.approx(0.675), "accuracy": 0.5}
    assert found["bins"][0]["accuracy"] is None
    error = found["expected_calibration_error"]
    assert error["value"] == pytest.approx((2 * 0.175 + 0.25 + 0.05) / 4)
    assert (error["n"], error["ci95"], error["higher_is_better"]) == (4, None, False)
    squares = [0.25**2 + 0.15**2 + 0.1**2, 0.65**2 + 0.75**2 + 0.1**2, 0.2**2 + 0.3**2 + 0.1**2, 2 * 0.05**2]
    assert found["brier_score"]["value"] == pytest.approx(sum(squares) / 4)
    likelihood = found["negative_log_likelihood"]
    assert likelihood["value"] == pytest.approx(-math.log(0.75 * 0.25 * 0.7 * 0.95) / 4)
    assert likelihood["clipped"] == 0


@pytest.mark.parametrize("c", [2, 3, 5])
def test_calibration_agrees_with_scikit_learn(c):
    labels, p = _sample(c, c=c)
    groups = np.arange(150) // 2
    found = classification.calibration(labels, p, groups, n_resamples=200)
    brier = sk.brier_score_loss(labels, p, labels=range(c), scale_by_half=False)
    assert found["brier_score"]["value"] == pytest.approx(brier)
    loss = found["negative_log_likelihood"]
    assert loss["value"] == pytest.approx(sk.log_loss(labels, p, labels=range(c)))
    each = -np.log(p[np.arange(150), labels])
    assert loss["ci95"] == list(statistics.bootstrap_interval(each, groups=groups, n_resamples=200))


@given(st.integers(0, 10**6), st.integers(2, 20), st.integers(2, 4))
@settings(deadline=None, max_examples=40)
def test_calibration_error_agrees_with_a_plain_loop(seed, bins, c):
    labels, p = _sample(seed, n=40, c=c)
    p = np.random.default_rng(seed).multinomial(100, p) / 100  # so that some lie on the edges of bins
    found = classification.calibration(labels, p, bins=bins, n_resamples=5)
    held = {}
    for label, row in zip(labels, p, strict=True):
        top = max(row)
        place = next(i for i in range(bins) if i / bins < top <= (i + 1) / bins)
        held.setdefault(place, []).append((top, label == list(row).index(top)))
    error = sum(abs(sum(right - top for top, right in one)) for one in held.values()) / 40
    assert found["expected_calibration_error"]["value"] == pytest.approx(error)
    assert {i: one["n"] for i, one in enumerate(found["bins"]) if one["n"]} == {i: len(h) for i, h in held.items()}


def test_a_certain_and_wrong_model_has_a_finite_loss():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = classification.calibration([0, 1], [[0.0, 1.0], [0.0, 1.0]])
    assert found["negative_log_likelihood"]["value"] == pytest.approx(-math.log(np.finfo(float).eps) / 2)
    assert found["negative_log_likelihood"]["clipped"] == 1
    assert found["expected_calibration_error"]["value"] == 0.5
    assert found["brier_score"]["value"] == 1


def test_calibration_takes_the_decision_that_was_made():
    p = [[0.5, 0.5], [0.9, 0.1]]
    assert classification.calibration([1, 0], p)["bins"][4]["accuracy"] == 0
    assert classification.calibration([1, 0], p, predictions=[1, 0])["bins"][4]["accuracy"] == 1
    with pytest.raises(KilnError, match="1 predictions are no answer"):
        classification.calibration([1, 0], p, predictions=[1, -1])


# --- parts ---


def test_part_difference_by_hand():
    labels, said = [0, 0, 1, 0, 1, 1, 1], [0, 0, 0, 0, 1, 1, -1]
    inside = [True] * 3 + [False] * 4
    found = classification.part_difference(labels, said, inside, range(7), 2)
    assert found["accuracy"]["value"] == pytest.approx(2 / 3 - 3 / 4)
    assert found["balanced_accuracy"]["value"] == pytest.approx(1 / 2 - (1 + 2 / 3) / 2)
    assert found["accuracy"]["n"] == 7
    assert found["balanced_accuracy"]["resamples_left_out"] > found["accuracy"].get("resamples_left_out", 0)


def test_interval_of_part_difference_agrees_with_resampling_by_hand():
    labels, p = _sample(5, n=200)
    said = p.argmax(1)
    rng = np.random.default_rng(5)
    groups = rng.integers(0, 50, 200)  # most have items on both sides
    inside = rng.random(200) < 0.4
    found = classification.part_difference(labels, said, inside, groups, 3, n_resamples=4000)
    made = []
    for _ in range(2000):
        r = np.concatenate([np.flatnonzero(groups == g) for g in rng.integers(0, 50, 50)])
        right, truth, parts = (labels == said)[r], labels[r], (inside[r], ~inside[r])
        balanced = [np.mean([right[part & (truth == k)].mean() for k in range(3)]) for part in parts]
        made.append((right[parts[0]].mean() - right[parts[1]].mean(), balanced[0] - balanced[1]))
    for i, name in enumerate(("accuracy", "balanced_accuracy")):
        lo, hi = np.percentile([one[i] for one in made], [2.5, 97.5])
        assert found[name]["ci95"] == pytest.approx([lo, hi], abs=0.1 * (hi - lo)), name


@pytest.mark.parametrize(
    ("labels", "inside", "groups", "accuracy", "balanced"),
    [
        ([0, 1, 0, 1], [1, 1, 1, 1], "abcd", "no item outside", "no item outside"),
        ([0, 1, 0, 1], [0, 0, 0, 0], "abcd", "no item inside", "no item inside"),
        ([0, 0, 0, 1], [1, 1, 0, 0], "abcd", None, "a class occurs on one side alone"),
        ([0, 1, 0, 1], [1, 1, 0, 0], "aabc", "fewer than two groups on a side", "fewer than two groups on a side"),
    ],
)
def test_part_difference_says_why_a_number_does_not_exist(labels, inside, groups, accuracy, balanced):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = classification.part_difference(labels, [0, 1, 1, 1], inside, list(groups), 2, n_resamples=200)
    assert found["accuracy"].get("reason") == accuracy
    assert found["balanced_accuracy"].get("reason") == balanced


# --- trivial features ---


def test_balanced_trivial_baseline():
    rng = np.random.default_rng(0)
    labels = (rng.random(400) < 0.1).astype(int)  # nine to one
    features = rng.normal(size=(400, 1)) + 1.5 * labels[:, None]
    x, y, x_test, y_test = features[:200], labels[:200], features[200:], labels[200:]
    plain = classification.trivial_baseline(x, y, x_test, y_test)
    balanced = classification.trivial_baseline(x, y, x_test, y_test, score="balanced_accuracy")
    from sklearn.linear_model import LogisticRegression

    scaled, scaled_test = (x - x.mean()) / x.std(), (x_test - x.mean()) / x.std()
    reference = LogisticRegression(class_weight="balanced").fit(scaled, y).predict(scaled_test)
    assert balanced == pytest.approx(sk.balanced_accuracy_score(y_test, reference))
    assert plain == pytest.approx(sk.accuracy_score(y_test, LogisticRegression().fit(scaled, y).predict(scaled_test)))
    assert balanced > 0.7 and plain > 0.85


def test_balanced_trivial_baseline_of_one_class_and_of_absent_ones():
    assert classification.trivial_baseline([[1], [2]], [0, 0], [[1], [2], [3]], [0, 0, 1], "balanced_accuracy") == 0.5
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # scikit-learn's own score warns of classes that the test side lacks
        x, y = [[0.0], [1.0], [5.0], [6.0]], [0, 0, 1, 1]
        assert classification.trivial_baseline(x, y, [[0.5], [5.5]], [0, 0], "balanced_accuracy") == 0.5
