"""Scores of classifiers, with intervals; how far their probabilities hold; and what trivial features reach."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike

from scripts.common import statistics
from scripts.common.errors import KilnError


def classification_report(
    labels: ArrayLike,
    probabilities: ArrayLike | None,
    groups: ArrayLike | None = None,
    seed: int = 0,
    *,
    classes: Sequence[str] | None = None,
    predictions: ArrayLike | None = None,
    n_resamples: int = 2000,
) -> dict[str, Any]:
    """Scores of a classifier with 95 % bootstrap intervals, as JSON values.

    Definitions are scikit-learn's: weighted means over classes by support, to which a class that was
    never predicted adds no precision (`zero_division=0`), balanced accuracy over the classes that occur,
    macro-F1 too, ROC-AUC one against the rest with equal weights when there are more than two classes. They
    are computed here because that takes all resamples at once. Per class, recall is also called sensitivity;
    specificity is the share of the items of other classes that were not predicted as this one (an item without
    an answer was not).

    Args:
        labels: (n,) integers from 0 to C - 1.
        probabilities: (n, C), rows adding up to 1, or (n,) probabilities of class 1 of two. The largest
            one decides, the lower class in a tie. None when only `predictions` exist.
        groups: (n,) what each item belongs to; whole groups are resampled.
        classes: C names; default "0", "1", ...
        predictions: (n,) integers that decide in place of the probabilities; -1 is no usable answer,
            which counts as wrong.
        n_resamples: 0 gives values without intervals, and lifts the need for two items or groups.

    Returns: `n`, `n_groups`, `classes`, `confusion_matrix` (C x C counts, rows are true classes),
    `unanswered` (C counts), and entries made by `metric` under `accuracy`, `balanced_accuracy`,
    `precision`, `recall`, `f1` (weighted), `macro_f1`, `roc_auc`, and `per_class[name]` with `support`,
    `precision`, `recall`, `specificity`, `f1`. An entry that does not exist has value None and a `reason`, one
    without an interval has `ci95` None and a `reason`; an entry that does not exist in some resamples says in
    how many (`resamples_left_out`).

    Raises:
        KilnError: wrong shapes, labels out of range, values that are no probabilities, fewer than two
            items or groups.
    """
    labels, probabilities, decided, names = _checked_predictions(labels, probabilities, predictions, classes)
    n, c = len(labels), len(names)
    if n_resamples:
        unit, n_units = statistics.units(groups, n)
    else:
        unit = np.arange(n) if groups is None else np.unique(groups, return_inverse=True)[1]
        n_units = int(unit.max()) + 1
    columns = [labels, decided, *([] if probabilities is None else probabilities.T)]
    order = np.lexsort(columns[::-1])  # so that the order of the items cannot matter
    labels, decided = labels[order], decided[order]
    probabilities = None if probabilities is None else probabilities[order]
    unit = unit if groups is None else unit[order]

    confusion = _resampled_confusion(labels, decided, unit, n_units, c)
    ranked = _ranked_scores(labels, probabilities)

    def scores(weights: np.ndarray) -> dict[str, np.ndarray]:
        found = _scores(confusion(weights))
        if probabilities is not None:
            found["roc_auc"] = _weighted_auc(weights[:, unit], ranked)
        return found

    once = np.ones((1, n_units))
    found = scores(once)
    whole = {name: array[0] for name, array in found.items()}
    blocks = [scores(w.astype(float)) for w in statistics.draws(np.ones(n_units, np.int64), n_resamples, seed, width=n)]
    resampled = {name: np.concatenate([none[:0], *(b[name] for b in blocks)]) for name, none in found.items()}

    matrix = confusion(once)[0].astype(np.int64)
    present, predicted = matrix.sum(1), matrix[:, :c].sum(0)
    if probabilities is None:
        auc = {"value": None, "reason": "no probabilities"}
    elif (present == 0).any():
        absent = ", ".join(name for name, count in zip(names, present, strict=True) if not count)
        auc = {"value": None, "reason": f"no item of class {absent}"}
    else:
        auc = _entry(whole["roc_auc"], resampled["roc_auc"], n)

    def class_entry(key: str, i: int, count: int, absent: str) -> dict[str, Any]:
        return _entry(whole[f"class_{key}"][i], resampled[f"class_{key}"][:, i], int(count), absent)

    totals = ("accuracy", "balanced_accuracy", "precision", "recall", "f1", "macro_f1")
    return {
        "n": n,
        "n_groups": None if groups is None else n_units,
        "classes": names,
        "confusion_matrix": matrix[:, :c].tolist(),
        "unanswered": matrix[:, c].tolist(),
        **{name: _entry(whole[name], resampled[name], n) for name in totals},
        "roc_auc": auc,
        "per_class": {
            name: {
                "support": int(present[i]),
                "precision": class_entry("precision", i, predicted[i], "never predicted"),
                "recall": class_entry("recall", i, present[i], "no item of this class"),
                "specificity": class_entry("specificity", i, n - present[i], "no item of another class"),
                "f1": class_entry("f1", i, present[i], "no item of this class"),
            }
            for i, name in enumerate(names)
        },
    }


def trivial_baseline(
    train_features: ArrayLike,
    train_labels: ArrayLike,
    test_features: ArrayLike,
    test_labels: ArrayLike,
    score: Literal["accuracy", "balanced_accuracy"] = "accuracy",
) -> float:
    """Test score, in [0, 1], of logistic regression on standardised trivial features.

    It says how much of a task mean colour, size or text length give away. With one class only in training
    it predicts that class.

    Args:
        train_features, test_features: (n, d) and (m, d) finite numbers.
        train_labels, test_labels: (n,) and (m,) labels of any kind.
        score: balanced accuracy is the mean recall over the classes of the test side; the regression then
            weights the classes equally too, for it is to do as well as it can at what it is measured by.

    Raises:
        KilnError: no items, features that are not finite, shapes that do not fit.
    """
    x, x_test = (
        statistics.finite(train_features, "train_features", ndim=2),
        statistics.finite(test_features, "test_features", ndim=2),
    )
    y, y_test = np.asarray(train_labels), np.asarray(test_labels)
    if x.shape[1] != x_test.shape[1] or len(x) != len(y) or len(x_test) != len(y_test):
        shapes = f"features {x.shape} and {x_test.shape}, labels {y.shape} and {y_test.shape}"
        raise KilnError(f"trivial baseline: {shapes} do not fit", "give one row of the same features per label")
    balanced = {"accuracy": False, "balanced_accuracy": True}[score]

    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if len(np.unique(y)) == 1:
        predicted = np.full(len(y_test), y[0])
    else:
        regression = LogisticRegression(max_iter=2000, class_weight="balanced" if balanced else None)
        predicted = make_pipeline(StandardScaler(), regression).fit(x, y).predict(x_test)
    right = predicted == y_test
    parts = [right[y_test == label] for label in np.unique(y_test)] if balanced else [right]
    return float(np.mean([part.mean() for part in parts]))


def trivial_probabilities(
    train_features: np.ndarray, train_labels: ArrayLike, test_features: np.ndarray, count: int
) -> np.ndarray:
    """Class probabilities [N, count] by logistic regression on standardised features; of one class, its certainty.

    Args:
        train_features, test_features: [M, F] and [N, F] finite numbers.
        train_labels: [M] numbers from 0 to count - 1; rows of -1 teach nothing.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    labels = np.asarray(train_labels)
    x, y = statistics.finite(train_features, "train_features", ndim=2)[labels >= 0], labels[labels >= 0]
    found = np.zeros((len(test_features), count))
    if len(np.unique(y)) == 1:
        found[:, y[0]] = 1
        return found
    regression = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)).fit(x, y)
    found[:, regression.classes_] = regression.predict_proba(statistics.finite(test_features, "test_features", ndim=2))
    return found


def calibration(
    labels: ArrayLike,
    probabilities: ArrayLike,
    groups: ArrayLike | None = None,
    seed: int = 0,
    *,
    bins: int = 10,
    predictions: ArrayLike | None = None,
    n_resamples: int = 2000,
) -> dict[str, Any]:
    """How far the probabilities of a classifier can be taken at their word, as JSON values.

    - `expected_calibration_error`: mean over items of |share of right decisions - mean largest probability| of
      the item's bin, with `bins` bins (i / bins, (i + 1) / bins] of the largest probability (Guo et al. 2017,
      equation 3). It has no interval: resampling moves it up, not around its value.
    - `brier_score`: mean of the squared distance between the probabilities and the truth (1 for the true class,
      0 for the others) summed over classes, from 0 to 2 (Brier 1950).
    - `negative_log_likelihood`: mean of -ln of the true class's probability, in nats. A probability below
      float64's epsilon counts as epsilon, as in scikit-learn; `clipped` says how many did.
    - `bins`: per bin `from`, `to`, `n`, and, None where n is 0, `confidence` (mean largest probability) and
      `accuracy`.

    Args: those of `classification_report`; predictions are classes, for what was not decided has no probability.

    Raises:
        KilnError: as `classification_report`, or no answer (-1) among the predictions.
    """
    labels, probabilities, decided, names = _checked_predictions(labels, probabilities, predictions, None)
    if (decided < 0).any():
        raise KilnError(f"{int((decided < 0).sum())} predictions are no answer", "give the class that was decided on")
    n = len(labels)
    right, top = decided == labels, probabilities.max(axis=1)
    edges = np.arange(bins + 1) / bins
    place = np.clip(np.searchsorted(edges, top, side="left") - 1, 0, bins - 1)
    counts = np.bincount(place, minlength=bins)
    accuracy = _ratio(np.bincount(place, weights=right, minlength=bins), counts)
    confidence = _ratio(np.bincount(place, weights=top, minlength=bins), counts)
    error = float(np.nansum(counts * np.abs(accuracy - confidence)) / n)

    squares = ((probabilities - np.eye(len(names))[labels]) ** 2).sum(axis=1)
    true = probabilities[np.arange(n), labels]
    floor = np.finfo(float).eps
    losses = -np.log(np.clip(true, floor, 1))

    def mean(values: np.ndarray, **extra: Any) -> dict[str, Any]:
        interval = statistics.bootstrap_interval(values, groups=groups, n_resamples=n_resamples, seed=seed)
        return statistics.metric(float(values.mean()), n, interval, higher_is_better=False, **extra)

    return {
        "expected_calibration_error": {
            "value": error,
            "n": n,
            "ci95": None,
            "higher_is_better": False,
            "reason": "resampling moves this error up, not around its value",
        },
        "brier_score": mean(squares),
        "negative_log_likelihood": mean(losses, clipped=int((true < floor).sum())),
        "bins": [
            {
                "from": float(edges[i]),
                "to": float(edges[i + 1]),
                "n": int(counts[i]),
                "confidence": float(confidence[i]) if counts[i] else None,
                "accuracy": float(accuracy[i]) if counts[i] else None,
            }
            for i in range(bins)
        ],
    }


def part_difference(
    labels: ArrayLike,
    predictions: ArrayLike,
    inside: ArrayLike,
    groups: ArrayLike,
    n_classes: int,
    seed: int = 0,
    n_resamples: int = 2000,
) -> dict[str, Any]:
    """Scores of the items inside a part minus those of the items outside it, as JSON values.

    Groups are resampled over all items, for a group may have items on both sides.

    Args:
        labels, predictions: (n,) integers from 0 to `n_classes` - 1; -1 as a prediction is no usable answer.
        inside: (n,) bool.
        groups: (n,) what each item belongs to.

    Returns: entries as of `classification_report` under `accuracy` and `balanced_accuracy`. Balanced accuracies
        are compared only when the same classes occur on both sides (resamples in which they do not are left
        out). With fewer than two groups on a side there is a value and no interval.

    Raises:
        KilnError: as `classification_report`.
    """
    names = [str(i) for i in range(n_classes)]
    labels, _, decided, _ = _checked_predictions(labels, None, predictions, names)
    inside, groups = np.asarray(inside, dtype=bool), np.asarray(groups)
    unit, n_units = statistics.units(groups, len(labels))
    sides = {"inside": inside, "outside": ~inside}
    empty = [name for name, side in sides.items() if not side.any()]
    if empty:
        none = {"value": None, "reason": f"no item {empty[0]}"}
        return {"accuracy": none, "balanced_accuracy": none}
    confusions = [_resampled_confusion(labels[s], decided[s], unit[s], n_units, n_classes) for s in sides.values()]
    occurring = np.unique(labels)

    def differences(weights: np.ndarray) -> np.ndarray:
        """(b, 2) differences of accuracy and of balanced accuracy; NaN where a side lacks items or a class."""
        scores = []
        for matrices in (confusion(weights)[:, occurring] for confusion in confusions):
            right, support = matrices[:, range(len(occurring)), occurring], matrices.sum(axis=2)
            scores.append((_ratio(right.sum(1), support.sum(1)), _ratio(right, support).mean(axis=1)))
        return np.subtract(*scores).T

    whole = differences(np.ones((1, n_units)))
    few = min(len(np.unique(unit[side])) for side in sides.values()) < 2
    blocks = statistics.draws(np.ones(n_units, np.int64), 0 if few else n_resamples, seed)
    resampled = np.concatenate([whole[:0], *(differences(w.astype(float)) for w in blocks)])
    n, absent, unsampled = len(labels), "a class occurs on one side alone", "fewer than two groups on a side"
    return {
        name: _entry(whole[0, i], resampled[:, i], n, absent, unsampled)
        for i, name in enumerate(("accuracy", "balanced_accuracy"))
    }


def _entry(
    value: float, replicates: np.ndarray, n: int, absent: str = "", unsampled: str = "not resampled"
) -> dict[str, Any]:
    if not np.isfinite(value):
        return {"value": None, "reason": absent}
    if not len(replicates):
        return {"value": float(value), "n": n, "ci95": None, "reason": unsampled}
    defined = replicates[np.isfinite(replicates)]
    left_out = len(replicates) - len(defined)
    if not len(defined):
        return {"value": float(value), "n": n, "ci95": None, "reason": "undefined in every resample: too few items"}
    extra = {"resamples_left_out": left_out} if left_out else {}
    return statistics.metric(value, n, statistics.percentiles(defined, 0.95), **extra)


def _checked_predictions(labels, probabilities, predictions, classes):
    labels = _integers(labels, "labels")
    if probabilities is None and predictions is None:
        raise ValueError("neither probabilities nor predictions")
    if probabilities is not None:
        probabilities = np.asarray(probabilities, dtype=float)
        if probabilities.ndim == 1:
            probabilities = np.stack([1 - probabilities, probabilities], axis=1)
        probabilities = statistics.finite(probabilities, "probabilities", ndim=2)
        wrong = (probabilities < 0).any(1) | (np.abs(probabilities.sum(1) - 1) > 1e-3)
        if wrong.any():
            row = int(np.argmax(wrong))
            raise KilnError(
                f"probabilities[{row}] = {probabilities[row].tolist()} are no probabilities",
                "apply softmax: each row is non-negative and adds up to 1",
            )
    decided = _integers(predictions, "predictions") if predictions is not None else probabilities.argmax(1)
    if probabilities is not None:
        c = probabilities.shape[1]
    else:
        c = len(classes) if classes is not None else int(max(labels.max(), decided.max(), 1)) + 1
    names = [str(i) for i in range(c)] if classes is None else [str(name) for name in classes]
    if len(names) != c or len(set(names)) != c or c < 2:
        raise KilnError(f"class names {names} for {c} classes", "give one distinct name per class, at least two")
    if len(decided) != len(labels) or (probabilities is not None and len(probabilities) != len(labels)):
        raise KilnError(f"{len(decided)} predictions for {len(labels)} labels", "give one prediction per label")
    for name, array, lowest in (("labels", labels, 0), ("predictions", decided, -1)):
        if array.min() < lowest or array.max() >= c:
            raise KilnError(f"{name} go from {array.min()} to {array.max()}", f"expected {lowest} to {c - 1}")
    return labels, probabilities, decided, names


def _integers(values: ArrayLike, name: str) -> np.ndarray:
    array = statistics.finite(values, name, ndim=1)
    if (array != np.round(array)).any():
        raise KilnError(f"{name} are not integers", "give the number of the class, from 0")
    return array.astype(np.int64)


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.full(part.shape, np.nan), where=whole > 0)


def _resampled_confusion(labels: np.ndarray, decided: np.ndarray, unit: np.ndarray, n_units: int, c: int):
    """A function from (b, n_units) weights to (b, C, C + 1) confusion matrices, whose last column is no answer."""
    from scipy.sparse import coo_array

    cells = labels * (c + 1) + np.where(decided < 0, c, decided)
    counts = coo_array((np.ones(len(labels)), (cells, unit)), shape=(c * (c + 1), n_units)).tocsr()
    return lambda weights: (counts @ weights.T).T.reshape(-1, c, c + 1)


def _scores(confusion: np.ndarray) -> dict[str, np.ndarray]:
    """Scores of (b, C, C + 1) confusion matrices, whose last column is no answer; NaN for 0 / 0."""
    c = confusion.shape[1]
    right = np.diagonal(confusion, axis1=1, axis2=2)
    support, predicted = confusion.sum(2), confusion[:, :, :c].sum(1)
    total = support.sum(1)
    precision, recall = _ratio(right, predicted), _ratio(right, support)
    f1 = np.where(support > 0, _ratio(2 * right, support + predicted), np.nan)
    others = total[:, None] - support
    return {
        "accuracy": right.sum(1) / total,
        "balanced_accuracy": np.nanmean(recall, axis=1),
        "precision": np.nansum(support * precision, axis=1) / total,
        "recall": np.nansum(support * recall, axis=1) / total,
        "f1": np.nansum(support * f1, axis=1) / total,
        "macro_f1": np.nanmean(f1, axis=1),
        "class_precision": precision,
        "class_recall": recall,
        "class_specificity": _ratio(others - (predicted - right), others),
        "class_f1": f1,
    }


def _ranked_scores(labels: np.ndarray, probabilities: np.ndarray | None) -> list[tuple[np.ndarray, ...]]:
    """Per class: items in order of its score, where each run of equal scores begins, and who is of that class."""
    if probabilities is None:
        return []
    c = probabilities.shape[1]
    ranked = []
    for one in range(1 if c == 2 else 0, c):
        order = np.argsort(probabilities[:, one], kind="stable")
        starts = np.flatnonzero(np.r_[True, np.diff(probabilities[order, one]) != 0])
        ranked.append((order, starts, labels[order] == one))
    return ranked


def _weighted_auc(weights: np.ndarray, ranked: list[tuple[np.ndarray, ...]]) -> np.ndarray:
    """(b,) mean over classes of the ROC-AUC of items with (b, n) weights; NaN where a class is absent.

    AUC is the chance that a positive outranks a negative, ties counting half (Hanley & McNeil 1982).
    """
    areas = []
    for order, starts, positive in ranked:
        ordered = weights[:, order]
        positives = np.add.reduceat(ordered * positive, starts, axis=1)
        negatives = np.add.reduceat(ordered * ~positive, starts, axis=1)
        below = np.cumsum(negatives, axis=1) - negatives
        won = (positives * (below + negatives / 2)).sum(1)
        areas.append(_ratio(won, positives.sum(1) * negatives.sum(1)))
    return np.mean(areas, axis=0)
