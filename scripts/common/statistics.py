"""Numbers with their uncertainty: bootstrap intervals, and the form of a headline metric.

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
        "before_grpo",
        "shrunk_input",
        "shuffled_images",
        "local_only",
        "downsampled",
    }
)


BLOCK_CELLS = 4_000_000  # cells of the largest temporary array: 32 MB as float64


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
    values = finite(values, "values", ndim=1)
    unit, n_units = units(groups, len(values))
    if statistic == "mean":
        replicates = _resampled_means(values, unit, n_units, n_resamples, seed)
    else:
        function = np.median if statistic == "median" else statistic
        if not callable(function):
            raise ValueError(f"statistic {statistic!r} is neither mean, median nor a function")
        values, unit = _canonical(values, unit)
        blocks = draws(np.ones(n_units, np.int64), n_resamples, seed)
        replicates = np.array([function(values.repeat(drawn[unit])) for block in blocks for drawn in block], float)
        undefined = int((~np.isfinite(replicates)).sum())
        if undefined:
            raise KilnError(
                f"the statistic is undefined in {undefined} of {n_resamples} resamples",
                "use more items, or a statistic that every sample has",
            )
    return percentiles(replicates, level)


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
    a, b = finite(a, "a", ndim=1), finite(b, "b", ndim=1)
    if len(a) != len(b):
        raise KilnError(f"{len(a)} and {len(b)} values cannot be paired", "measure the same items in the same order")
    return bootstrap_interval(a - b, "mean", groups, n_resamples, seed, level)


def jackknife_interval(
    value: float, left_out: ArrayLike, level: float = 0.95, least: float = -math.inf
) -> tuple[float, tuple[float, float]]:
    """(standard error, interval) of a statistic, from its values with one of G groups of items left out each.

    Delete-a-group jackknife (Kott 2001, Journal of Official Statistics 17(4); Wu 1986, Annals of Statistics 14(4)):
    the variance is (G-1)/G times the sum of squared deviations of the G values from their mean, and the interval
    value +- t times its root, t the quantile of Student's distribution with G-1 degrees of freedom. It is of the
    statistic of so many items, and thus keeps any bias that the statistic has at that number.

    Args:
        left_out: (G,) finite values, G >= 2; the groups are of like size and dealt by chance or in turn.
        level: share of such intervals that hold the statistic's expectation, in (0, 1).
        least: the interval is cut off below it.

    Raises:
        KilnError: fewer than two groups, or a value that is not finite.
    """
    from scipy.stats import t

    values = finite(left_out, "left_out", ndim=1)
    _, groups = units(None, len(values))
    if not 0 < level < 1:
        raise ValueError(f"level {level} is not between 0 and 1")
    error = float(np.sqrt((groups - 1) / groups * np.square(values - values.mean()).sum()))
    half = float(t.ppf((1 + level) / 2, groups - 1)) * error
    return error, (max(least, value - half), max(least, value + half))


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


def entry(
    values: ArrayLike,
    groups: ArrayLike,
    baseline: float | None = None,
    baseline_kind: str | None = None,
    statistic: str = "mean",
    unit: str = "group",
    **extra: Any,
) -> dict[str, Any]:
    """`metric` of the mean, or median, of `values` [N], with an interval that resamples `groups` [N].

    Of no values there is none, of one group's no interval; a `reason` says so, in which `unit` names a group.
    """
    values = np.asarray(values, dtype=float)
    if not len(values):
        return {"value": None, "n": 0, "ci95": None, "reason": "no such item"}
    value = float(np.median(values) if statistic == "median" else values.mean())
    if len(np.unique(groups)) < 2:
        return without_interval(value, len(values), f"one {unit}: no interval", baseline, baseline_kind, **extra)
    return metric(value, len(values), bootstrap_interval(values, statistic, groups), baseline, baseline_kind, **extra)


def without_interval(
    value: float, n: int, reason: str, baseline: float | None = None, baseline_kind: str | None = None, **extra: Any
) -> dict[str, Any]:
    """An entry like that of `metric`, of so few items that it has no interval."""
    of_baseline = {"baseline": baseline, "baseline_kind": baseline_kind, "higher_is_better": True}
    return {"value": value, "n": n, "ci95": None, "reason": reason, **of_baseline} | extra


def finite(values: ArrayLike, name: str, ndim: int) -> np.ndarray:
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


def units(groups: ArrayLike | None, n: int) -> tuple[np.ndarray, int]:
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
    means = [(drawn @ sums) / (drawn @ sizes) for drawn in draws(multiplicity, n_resamples, seed)]
    return np.clip(np.concatenate(means) + middle, lowest, highest)


def draws(multiplicity: np.ndarray, n_resamples: int, seed: int, width: int = 0) -> Iterator[np.ndarray]:
    """Blocks (b, kinds) of how often each kind of unit is in a resample; b * max(kinds, width) is bounded."""
    rng = np.random.default_rng(seed)
    kinds, total = len(multiplicity), int(multiplicity.sum())
    rows = max(1, BLOCK_CELLS // max(kinds, width))
    for start in range(0, n_resamples, rows):
        b = min(rows, n_resamples - start)
        if kinds == total:
            chosen = rng.integers(0, kinds, size=(b, kinds)) + kinds * np.arange(b)[:, None]
            yield np.bincount(chosen.ravel(), minlength=b * kinds).reshape(b, kinds)
        else:
            yield rng.multinomial(total, multiplicity / total, size=b)


def percentiles(replicates: np.ndarray, level: float) -> tuple[float, float]:
    if not 0 < level < 1:
        raise ValueError(f"level {level} is not between 0 and 1")
    lo, hi = np.percentile(replicates, [50 * (1 - level), 50 * (1 + level)])
    return float(lo), float(hi)
