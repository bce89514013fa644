"""The headline numbers of a summary.json in words, a line each."""

from collections.abc import Mapping
from typing import Any


def digits(value: float) -> str:
    """A number as people read it: four significant digits, three of a share, whole from 1000 on."""
    size = abs(value)
    if size >= 1000:
        return f"{value:,.0f}"
    if size == 0:
        return "0"
    return (f"{value:#.4g}" if round(size, 3) >= 1 else f"{value:#.3g}").rstrip(".")


def shown(one: Mapping[str, Any], value: float) -> str:
    """A number of a metric by `digits`, with its sign where the metric is a difference."""
    return f"{'+' if one.get('difference_of') and value > 0 else ''}{digits(value)}"


def counted(one: Mapping[str, Any]) -> str:
    """How many items a metric is over and, where its interval resamples groups of them, how many: "150 (47 vases)"."""
    if not one.get("grouped_by"):
        return f"{one['n']:,}"
    return f"{one['n']:,} ({one['groups']:,} {one['grouped_by']}{'s' * (one['groups'] != 1)})"


def headline(pipeline: str, name: str, one: dict) -> str:
    """One readable line of a metric: value, interval, count, baseline, and what trivial features reach."""
    low, high = (shown(one, bound) for bound in one["ci95"] or (0, 0))
    interval = f"[{low}, {high}]" if one["ci95"] else f"({one.get('reason', 'no interval')})"
    line = f"{pipeline:9} {name:26} {shown(one, one['value'])} {interval}  n = {counted(one):<6}"
    if one.get("baseline") is not None:
        line += f"  {one['baseline_kind'].replace('_', ' ')}: {shown(one, one['baseline'])}"
    if one.get("trivial") is not None:
        line += f"  trivial features: {shown(one, one['trivial'])}"
    if one.get("difference_of"):
        line += f"  (difference of {one['difference_of']})"
    return f"{line}  ({one['label']})" if one.get("label") else line


def beats(one: Mapping[str, Any]) -> bool | None:
    """Whether the interval is clear of the baseline, on its better side; None without one of the two."""
    if one.get("baseline") is None or not one.get("ci95"):
        return None
    low, high = one["ci95"]
    return low > one["baseline"] if one["higher_is_better"] else high < one["baseline"]


def verdict(one: Mapping[str, Any]) -> str:
    """`beats` in words: "better" than its baseline, "not clearly better", "no baseline" or "no interval"."""
    clear = beats(one)
    if clear is None:
        return "no baseline" if one.get("baseline") is None else "no interval"
    return "better" if clear else "not clearly better"


def headlines(summary: dict) -> list[str]:
    """All lines of a summary."""
    return [headline(pipeline, name, one) for pipeline, metrics in summary.items() for name, one in metrics.items()]
