"""Numbers with their uncertainty: bootstrap intervals, classification and retrieval scores, easy baselines.

Intervals are percentile bootstrap intervals (Efron & Tibshirani 1993, chapter 13), not BCa: the percentile
interval never leaves the range of its statistic, is defined for constant data (BCa divides by zero
there), and carries over to whole groups, for which BCa's acceleration rests on few jackknife values.
All of them resample items as they are given, so a perfect score has a zero-width interval: it says
that nothing in the sample speaks against it, not that the next item cannot fail.

No function returns NaN: a number that does not exist is None with a `reason`, or a `KilnError`.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from scripts.common.errors import KilnError

BASELINE_KINDS = frozenset(
    {
        "chance",
        "untrained",
        "majority",
        "most_frequent",
        "constant",
        "random_view",
        "before_filtering",
        "before_training",
        "shuffled_images",
        "local_only",
        "downsampled",
    }
)
_BLOCK_CELLS = 4_000_000  # cells of the largest temporary array: 32 MB as float64


def bootstrap_interval(
    values: ArrayLike,
    statistic: str | Callable[[np.ndarray], float] = "mean",
    groups: ArrayLike | None = None,
    n_resamples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[float, float]:
    """Percentile bootstrap interval (lo, hi) of a statistic; the order of the items does not matter.

    Args:
        values: (n,) finite numbers.
        statistic: "mean", "median", or a function from (m,) values to a number. Only the mean is fast for
            a million values; the others are called once per resample.
        groups: (n,) what each value belongs to (a patient, a vase). Whole groups are then resampled, for
            values of one group are not independent (cluster bootstrap, Davison & Hinkley 1997, section 3.8).
        level: share of the resampled statistics inside the interval, in (0, 1).

    Raises:
        KilnError: no values, a value that is not finite, fewer than two groups (or values), a missing
            group, or a statistic that is undefined in some resample.
    """
    values = _finite(values, "values", ndim=1)
    unit, n_units = _units(groups, len(values))
    if statistic == "mean":
        replicates = _resampled_means(values, unit, n_units, n_resamples, seed)
    else:
        function = np.median if statistic == "median" else statistic
        if not callable(function):
            raise ValueError(f"statistic {statistic!r} is neither mean, median nor a function")
        values, unit = _canonical(values, unit)
        blocks = _draws(np.ones(n_units, np.int64), n_resamples, seed)
        replicates = np.array([function(values.repeat(drawn[unit])) for block in blocks for drawn in block], float)
        undefined = int((~np.isfinite(replicates)).sum())
        if undefined:
            raise KilnError(
                f"the statistic is undefined in {undefined} of {n_resamples} resamples",
                "use more items, or a statistic that every sample has",
            )
    return _percentiles(replicates, level)


def paired_difference_interval(
    a: ArrayLike,
    b: ArrayLike,
    groups: ArrayLike | None = None,
    n_resamples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[float, float]:
    """Interval of mean(a - b) where a[i] and b[i] are two measurements of the same item.

    Args and errors are those of `bootstrap_interval`; also a KilnError when the lengths differ.
    """
    a, b = _finite(a, "a", ndim=1), _finite(b, "b", ndim=1)
    if len(a) != len(b):
        raise KilnError(f"{len(a)} and {len(b)} values cannot be paired", "measure the same items in the same order")
    return bootstrap_interval(a - b, "mean", groups, n_resamples, seed, level)


def metric(
    value: float,
    n: int,
    ci95: Sequence[float],
    baseline: float | None = None,
    baseline_kind: str | None = None,
    higher_is_better: bool = True,
    **extra: Any,
) -> dict[str, Any]:
    """One entry of `summary.json`, checked; `extra` keys (JSON values) are put beside the fixed ones.

    Args:
        n: how many items the value is over, at least 1.
        ci95: (lo, hi), lo <= hi.
        baseline_kind: one of `BASELINE_KINDS`; given exactly when `baseline` is.

    Raises:
        KilnError: a number that is not finite.
        ValueError: the entry makes no sense (lo > hi, n < 1, an unnamed or unknown baseline).
    """
    value, lo, hi = float(value), *(float(bound) for bound in ci95)
    baseline = None if baseline is None else float(baseline)
    for name, number in {"value": value, "ci95[0]": lo, "ci95[1]": hi, "baseline": baseline, **extra}.items():
        if isinstance(number, float | np.floating) and not math.isfinite(number):
            raise KilnError(f"metric: {name} is {number}", "look at the predictions: a model that diverged gives NaN")
    if lo > hi:
        raise ValueError(f"ci95: {lo} is above {hi}")
    if int(n) != n or n < 1:
        raise ValueError(f"n = {n} is no count of items")
    if (baseline is None) != (baseline_kind is None):
        raise ValueError("baseline and baseline_kind belong together")
    if baseline_kind is not None and baseline_kind not in BASELINE_KINDS:
        raise ValueError(f"unknown baseline_kind {baseline_kind!r}; known: {', '.join(sorted(BASELINE_KINDS))}")
    return {
        "value": value,
        "baseline": baseline,
        "baseline_kind": baseline_kind,
        "n": int(n),
        "ci95": [lo, hi],
        "higher_is_better": bool(higher_is_better),
        **extra,
    }


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
    ROC-AUC one against the rest with equal weights when there are more than two classes. They are computed
    here because that takes all resamples at once.

    Args:
        labels: (n,) integers from 0 to C - 1.
        probabilities: (n, C), rows adding up to 1, or (n,) probabilities of class 1 of two. The largest
            one decides, the lower class in a tie. None when only `predictions` exist.
        groups: (n,) what each item belongs to; whole groups are resampled.
        classes: C names; default "0", "1", ...
        predictions: (n,) integers that decide in place of the probabilities; -1 is no usable answer,
            which counts as wrong.

    Returns: `n`, `n_groups`, `classes`, `confusion_matrix` (C x C counts, rows are true classes),
    `unanswered` (C counts), and entries made by `metric` under `accuracy`, `balanced_accuracy`,
    `precision`, `recall`, `f1` (weighted), `roc_auc`, and `per_class[name]` with `support`, `precision`,
    `recall`, `f1`. An entry that does not exist has value None and a `reason`; an entry that
    does not exist in some resamples says in how many (`resamples_left_out`).

    Raises:
        KilnError: wrong shapes, labels out of range, values that are no probabilities, fewer than two
            items or groups.
    """
    labels, probabilities, decided, names = _checked_predictions(labels, probabilities, predictions, classes)
    n, c = len(labels), len(names)
    unit, n_units = _units(groups, n)
    columns = [labels, decided, *([] if probabilities is None else probabilities.T)]
    order = np.lexsort(columns[::-1])  # so that the order of the items cannot matter
    labels, decided = labels[order], decided[order]
    probabilities = None if probabilities is None else probabilities[order]
    unit = unit if groups is None else unit[order]

    from scipy.sparse import coo_array

    cells = labels * (c + 1) + np.where(decided < 0, c, decided)
    counts = coo_array((np.ones(n), (cells, unit)), shape=(c * (c + 1), n_units)).tocsr()
    ranked = _ranked_scores(labels, probabilities)

    def scores(weights: np.ndarray) -> dict[str, np.ndarray]:
        found = _scores((counts @ weights.T).T.reshape(-1, c, c + 1))
        if probabilities is not None:
            found["roc_auc"] = _weighted_auc(weights[:, unit], ranked)
        return found

    whole = {name: array[0] for name, array in scores(np.ones((1, n_units))).items()}
    blocks = [scores(w.astype(float)) for w in _draws(np.ones(n_units, np.int64), n_resamples, seed, width=n)]
    resampled = {name: np.concatenate([block[name] for block in blocks]) for name in whole}

    matrix = np.bincount(cells, minlength=c * (c + 1)).reshape(c, c + 1)
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

    totals = ("accuracy", "balanced_accuracy", "precision", "recall", "f1")
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
                "f1": class_entry("f1", i, present[i], "no item of this class"),
            }
            for i, name in enumerate(names)
        },
    }


def recall_at_k(
    similarity: np.ndarray, ks: Sequence[int], relevant: tuple[ArrayLike, ArrayLike] | None = None
) -> dict[str, dict[str, Any]]:
    """Retrieval scores in both directions of a similarity matrix, which may be a memory map.

    The rank of a query is 1 + the number of wrong candidates at least as similar as its best right
    one: in a tie the right one comes last, so that a constant model gets nothing for nothing.

    Args:
        similarity: (n, m), larger is more alike; read in blocks of rows, then of columns.
        ks: cut-offs, from 1 to the number of candidates.
        relevant: (ids of the n rows, ids of the m columns); a row and a column belong together when
            their ids are equal (several captions of one image, equal captions of two). Default: row i belongs
            to column i.

    Returns: {"row_to_column": scores, "column_to_row": scores}, where scores are `n` (queries), `recall`
    {k: share of queries with rank <= k}, `chance` {k: expectation of that share for a random order},
    `median_rank`, and `ranks`, an (n,) array for `bootstrap_interval(ranks <= k, groups=...)`.

    Raises:
        KilnError: a similarity that is not finite, a row or column with nothing relevant, a matrix that is not
            square without `relevant`, a k out of range.
    """
    if similarity.ndim != 2 or 0 in similarity.shape:
        raise KilnError(f"similarity has shape {similarity.shape}", "expected one row and one column per item")
    if relevant is None:
        if similarity.shape[0] != similarity.shape[1]:
            raise KilnError(f"similarity has shape {similarity.shape}", "say by `relevant` what belongs together")
        relevant = (np.arange(len(similarity)), np.arange(len(similarity)))
    rows, columns = (np.asarray(ids) for ids in relevant)
    if (len(rows), len(columns)) != similarity.shape:
        raise KilnError(f"{len(rows)} and {len(columns)} ids for a {similarity.shape} matrix", "give one id per item")
    _, codes = np.unique(np.concatenate([rows, columns]), return_inverse=True)
    rows, columns = codes[: len(rows)], codes[len(rows) :]
    return {
        "row_to_column": _retrieval(lambda block: similarity[block], rows, columns, ks, "row"),
        "column_to_row": _retrieval(lambda block: similarity[:, block].T, columns, rows, ks, "column"),
    }


def trivial_baseline(
    train_features: ArrayLike, train_labels: ArrayLike, test_features: ArrayLike, test_labels: ArrayLike
) -> float:
    """Test accuracy, in [0, 1], of logistic regression on standardised trivial features.

    It says how much of a task mean colour, size or text length give away. With one class only in training
    it predicts that class.

    Args:
        train_features, test_features: (n, d) and (m, d) finite numbers.
        train_labels, test_labels: (n,) and (m,) labels of any kind.

    Raises:
        KilnError: no items, features that are not finite, shapes that do not fit.
    """
    x, x_test = _finite(train_features, "train_features", ndim=2), _finite(test_features, "test_features", ndim=2)
    y, y_test = np.asarray(train_labels), np.asarray(test_labels)
    if x.shape[1] != x_test.shape[1] or len(x) != len(y) or len(x_test) != len(y_test):
        shapes = f"features {x.shape} and {x_test.shape}, labels {y.shape} and {y_test.shape}"
        raise KilnError(f"trivial baseline: {shapes} do not fit", "give one row of the same features per label")
    if len(np.unique(y)) == 1:
        return float(np.mean(y_test == y[0]))

    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    return float(model.fit(x, y).score(x_test, y_test))


def _finite(values: ArrayLike, name: str, ndim: int) -> np.ndarray:
    array = np.asarray(values, dtype=float)
    if array.ndim != ndim or array.size == 0:
        raise KilnError(f"{name} has shape {array.shape}", f"expected {ndim} dimension(s), none of them empty")
    bad = np.argwhere(~np.isfinite(array))
    if len(bad):
        place = ", ".join(map(str, bad[0]))
        raise KilnError(
            f"{name}[{place}] is {array[tuple(bad[0])]} ({len(bad)} such)", "find out which item it is and why"
        )
    return array


def _units(groups: ArrayLike | None, n: int) -> tuple[np.ndarray, int]:
    """What is resampled: (n,) number of the unit of each item, and how many units there are."""
    if groups is None:
        unit = np.arange(n)
        n_units = n
    else:
        groups = np.asarray(groups)
        if groups.shape != (n,):
            raise KilnError(f"groups has shape {groups.shape} for {n} items", "give one group per item")
        missing = groups != groups if groups.dtype != object else np.array([g is None or g != g for g in groups])
        if np.any(missing):
            raise KilnError(f"{int(np.sum(missing))} items have no group", "give each item one; an own one if need be")
        names, unit = np.unique(groups, return_inverse=True)
        n_units = len(names)
    if n_units < 2:
        raise KilnError(
            f"an interval needs at least two independent items or groups, here {n_units}", "evaluate on more data"
        )
    return unit, n_units


def _canonical(values: np.ndarray, unit: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Units numbered by (sum, size) and items sorted, so that neither order nor names of units matter."""
    order = np.lexsort((values, unit))
    values, unit = values[order], unit[order]
    unit = np.argsort(np.lexsort((np.bincount(unit), np.bincount(unit, weights=values))))[unit]
    order = np.argsort(unit, kind="stable")
    return values[order], unit[order]


def _resampled_means(values: np.ndarray, unit: np.ndarray, n_units: int, n_resamples: int, seed: int) -> np.ndarray:
    lowest, highest = values.min(), values.max()
    middle = np.partition(values, len(values) // 2)[len(values) // 2]
    # Around a middle value constant data are exactly zero, and large offsets cost no precision.
    values, unit = _canonical(values - middle, unit)
    sums, sizes = np.bincount(unit, weights=values), np.bincount(unit)
    # Units that are alike are counted, not repeated: a million right-or-wrong answers are two kinds.
    first = np.flatnonzero(np.r_[True, (np.diff(sums) != 0) | (np.diff(sizes) != 0)])
    if 8 * len(first) <= n_units:
        multiplicity = np.diff(np.r_[first, n_units])
        sums, sizes = sums[first], sizes[first]
    else:
        multiplicity = np.ones(n_units, np.int64)
    sizes = sizes.astype(float)
    means = [(drawn @ sums) / (drawn @ sizes) for drawn in _draws(multiplicity, n_resamples, seed)]
    return np.clip(np.concatenate(means) + middle, lowest, highest)


def _draws(multiplicity: np.ndarray, n_resamples: int, seed: int, width: int = 0) -> Iterator[np.ndarray]:
    """Blocks (b, kinds) of how often each kind of unit is in a resample; b * max(kinds, width) is bounded."""
    rng = np.random.default_rng(seed)
    kinds, total = len(multiplicity), int(multiplicity.sum())
    rows = max(1, _BLOCK_CELLS // max(kinds, width))
    for start in range(0, n_resamples, rows):
        b = min(rows, n_resamples - start)
        if kinds == total:
            chosen = rng.integers(0, kinds, size=(b, kinds)) + kinds * np.arange(b)[:, None]
            yield np.bincount(chosen.ravel(), minlength=b * kinds).reshape(b, kinds)
        else:
            yield rng.multinomial(total, multiplicity / total, size=b)


def _percentiles(replicates: np.ndarray, level: float) -> tuple[float, float]:
    if not 0 < level < 1:
        raise ValueError(f"level {level} is not between 0 and 1")
    lo, hi = np.percentile(replicates, [50 * (1 - level), 50 * (1 + level)])
    return float(lo), float(hi)


def _entry(value: float, replicates: np.ndarray, n: int, absent: str = "") -> dict[str, Any]:
    if not np.isfinite(value):
        return {"value": None, "reason": absent}
    defined = replicates[np.isfinite(replicates)]
    left_out = len(replicates) - len(defined)
    if not len(defined):
        return {"value": float(value), "n": n, "ci95": None, "reason": "undefined in every resample: too few items"}
    extra = {"resamples_left_out": left_out} if left_out else {}
    return metric(value, n, _percentiles(defined, 0.95), **extra)


def _checked_predictions(labels, probabilities, predictions, classes):
    labels = _integers(labels, "labels")
    if probabilities is None and predictions is None:
        raise ValueError("neither probabilities nor predictions")
    if probabilities is not None:
        probabilities = np.asarray(probabilities, dtype=float)
        if probabilities.ndim == 1:
            probabilities = np.stack([1 - probabilities, probabilities], axis=1)
        probabilities = _finite(probabilities, "probabilities", ndim=2)
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
    array = _finite(values, name, ndim=1)
    if (array != np.round(array)).any():
        raise KilnError(f"{name} are not integers", "give the number of the class, from 0")
    return array.astype(np.int64)


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.full(part.shape, np.nan), where=whole > 0)


def _scores(confusion: np.ndarray) -> dict[str, np.ndarray]:
    """Scores of (b, C, C + 1) confusion matrices, whose last column is no answer; NaN for 0 / 0."""
    c = confusion.shape[1]
    right = np.diagonal(confusion, axis1=1, axis2=2)
    support, predicted = confusion.sum(2), confusion[:, :, :c].sum(1)
    total = support.sum(1)
    precision, recall = _ratio(right, predicted), _ratio(right, support)
    f1 = np.where(support > 0, _ratio(2 * right, support + predicted), np.nan)
    return {
        "accuracy": right.sum(1) / total,
        "balanced_accuracy": np.nanmean(recall, axis=1),
        "precision": np.nansum(support * precision, axis=1) / total,
        "recall": np.nansum(support * recall, axis=1) / total,
        "f1": np.nansum(support * f1, axis=1) / total,
        "class_precision": precision,
        "class_recall": recall,
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


def _retrieval(block_of, ids: np.ndarray, candidates: np.ndarray, ks: Sequence[int], name: str) -> dict[str, Any]:
    from scipy.stats import hypergeom

    n, m = len(ids), len(candidates)
    if min(ks) < 1 or max(ks) > m:
        raise KilnError(f"recall at {list(ks)} among {m} candidates of a {name}", f"choose each k from 1 to {m}")
    n_right = np.bincount(candidates, minlength=int(ids.max()) + 1)[ids]
    if (n_right == 0).any():
        raise KilnError(f"{name} {int(np.argmin(n_right))} has nothing relevant", "leave it out, and say that you did")
    step = max(1, _BLOCK_CELLS // m)
    ranks = np.empty(n, np.int64)
    for start in range(0, n, step):
        block = slice(start, min(start + step, n))
        scores = np.asarray(block_of(block))
        if not np.isfinite(scores).all():
            raise KilnError(f"similarities of {name}s {start} to {block.stop - 1} are not finite", "look at the model")
        right = ids[block, None] == candidates[None, :]
        best = np.where(right, scores, -np.inf).max(axis=1, keepdims=True)
        ranks[block] = 1 + (~right & (scores >= best)).sum(axis=1)
    return {
        "n": n,
        "recall": {int(k): float(np.mean(ranks <= k)) for k in ks},
        "chance": {int(k): float(hypergeom.sf(0, m, n_right, k).mean()) for k in ks},
        "median_rank": float(np.median(ranks)),
        "ranks": ranks,
    }
