"""The trainings that run, or stopped before their end, as a table: a line each.

    python -m scripts.common.status --state results/state

Read from the heartbeat files of the state folders, so it works on any node that sees them.
"""

import argparse
import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from scripts.common import heartbeat, locks, spent, step

HEAD = ("training", "state", "step", "loss", "steps/s", "left", "saved", "job", "node")
STALE_SECONDS = 120.0  # and ten steps: a heartbeat that is older says that no step was made


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--state", type=Path, default=Path("results/state"), help="folder of all states")
    root = parser.parse_args(argv).state
    if not root.is_dir():
        print(f"{root}: no such folder, so nothing was trained there; another: make status RESULTS=results/demo")
        return
    lines = [row(root, folder, time.time()) for folder in sorted(folders(root))]
    print(table(lines) if lines else f"no training runs or waits to be carried on below {root}")


def folders(root: Path) -> Iterator[Path]:
    """State folders below `root` that have a heartbeat."""
    for place, inner, files in os.walk(root):
        if heartbeat.NAME in files:
            inner.clear()
            yield Path(place)


def row(root: Path, folder: Path, now: float) -> tuple[str, ...]:
    """A line about one training, `now` in seconds since 1970; the columns are those of `HEAD`."""
    name = str(folder.parent.relative_to(root)) if folder != root else folder.name
    try:
        told = json.loads((folder / heartbeat.NAME).read_text(encoding="utf-8"))
        job = f"{told['job']}" if told["job"] else f"pid {told['pid']}"
        saved = told["last_save"]
        return (
            name,
            "done" if (folder.parent / spent.MARK).exists() else _state(told, locks.is_taken(folder), now),
            f"{told['step']}/{told['steps']}" if told["steps"] is not None else str(told["step"]),
            _number(told["loss"], ".4f"),
            _number(told["steps_per_second"], ".3g"),
            "-" if told["eta_seconds"] is None else duration(told["eta_seconds"]),
            "never" if saved is None else f"{duration(now - saved['time'])} ago",
            job,
            told["host"],
        )
    except FileNotFoundError:
        return (name, "ended just now", *["-"] * (len(HEAD) - 2))
    except (ValueError, KeyError, TypeError) as error:
        return (name, f"{heartbeat.NAME}: not ours ({error})", *["-"] * (len(HEAD) - 2))


def _state(told: dict, taken: bool, now: float) -> str:
    age = now - told["updated"]
    if not taken:
        return f"stopped {duration(age)} ago" + (" (stalled)" if told["phase"] == "stalled" else "")
    speed = told["steps_per_second"]
    if told["phase"] == "training" and age > max(STALE_SECONDS, 10 / speed if speed else 0):
        return f"no step for {duration(age)}"
    return told["phase"]


def _number(value: float | None, style: str) -> str:
    return "-" if value is None else format(value, style)


def duration(seconds: float) -> str:
    """A time span in its two largest units, such as 3h 05m."""
    minutes, rest = divmod(int(max(0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d {hours:02d}h"
    if hours:
        return f"{hours}h {minutes:02d}m"
    return f"{minutes}m {rest:02d}s" if minutes else f"{rest}s"


def table(lines: Sequence[tuple[str, ...]]) -> str:
    """Lines under `HEAD`, in columns."""
    every = [HEAD, *lines]
    widths = [max(len(line[i]) for line in every) for i in range(len(HEAD))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
                     for line in every)  # fmt: skip


if __name__ == "__main__":
    step.run(main)
