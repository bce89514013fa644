"""The headline numbers of a summary.json in words, a line each."""


def headline(pipeline: str, name: str, one: dict) -> str:
    """One readable line of a metric: value, interval, count, baseline, and what trivial features reach."""
    low, high = one["ci95"]
    line = f"{pipeline:9} {name:26} {one['value']:.3f} [{low:.3f}, {high:.3f}]  n = {one['n']:<6}"
    if one.get("baseline") is not None:
        line += f"  {one['baseline_kind'].replace('_', ' ')}: {one['baseline']:.3f}"
    if one.get("trivial") is not None:
        line += f"  trivial features: {one['trivial']:.3f}"
    return f"{line}  ({one['label']})" if one.get("label") else line


def headlines(summary: dict) -> list[str]:
    """All lines of a summary."""
    return [headline(pipeline, name, one) for pipeline, metrics in summary.items() for name, one in metrics.items()]
