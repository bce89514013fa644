"""Lines for `plots.curves` out of the metrics.json of a training: {label: (x, y)}, each as long as there are values."""

from collections.abc import Mapping, Sequence
from typing import Any

Lines = dict[str, tuple[list[int], list[float]]]


def by_epoch(history: Sequence[Mapping[str, float]], names: Mapping[str, str]) -> Lines:
    """Of rows of epochs 1, 2, ...: a line for each {label: key} that some row has."""
    return _lines({label: [(i, row[key]) for i, row in enumerate(history, 1) if key in row]
                   for label, key in names.items()})  # fmt: skip


def by_step(metrics: Mapping[str, Any], name: str) -> Lines:
    """Of what `trainer_log.history` gives: `name` while training, and `eval_<name>` on the validation side."""
    return _lines({side: [(row["step"], row[key]) for row in metrics[side] if key in row]
                   for side, key in (("train", name), ("validation", f"eval_{name}"))})  # fmt: skip


def _lines(points: Mapping[str, Sequence[tuple[int, float]]]) -> Lines:
    return {label: ([x for x, _ in found], [y for _, y in found]) for label, found in points.items() if found}
