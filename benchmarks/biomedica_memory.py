"""Memory of the reader of rule `biomedica_train_clip` over minutes of streaming: epoch after epoch, workers included.

What all processes hold together, pages of files left out, four times a second from the first batch on. It is flat if
the mean over the last quarter of the time is that over the second quarter, within 5 %.
"""

import argparse
import itertools
import statistics
import time
from pathlib import Path
from typing import Any

from benchmarks import biomedica_data as data
from benchmarks import measure

WITHIN, SHOWN = 0.05, 20


def measure_growth(args: argparse.Namespace, root: Path) -> dict[str, Any]:
    """The series, and its quarters' means."""
    shards = data.draw_shards(root, args.shards, args.pairs, args.width, args.height)
    data.write_job(root, args, epochs=8)
    with data.serve(root, args) as environment:
        work = "import json\nfrom benchmarks import biomedica_memory as one\n"
        work += f"made = one.stream({str(root)!r}, {args.minutes})\nprint('\\n' + json.dumps(made))"
        done = measure.program(work, environment, 60 * args.minutes + args.most_seconds)
    begin, end = done.found["from"], done.found["to"]
    held = [(at - begin, mb) for at, mb in done.held if begin <= at <= end]
    quarters = [[mb for at, mb in held if number <= 4 * at / (end - begin) < number + 1] for number in range(4)]
    means = [statistics.mean(one) for one in quarters]
    growth = means[3] / means[1] - 1
    return {
        "minutes": (end - begin) / 60, "pairs": done.found["pairs"], "epochs": done.found["epochs"],
        "megabytes": done.found["pairs"] * shards["bytes"] / shards["pairs"] / 1e6,
        "mb_of_quarters": means, "peak_mb": done.peak_mb, "growth": growth, "target_met": abs(growth) <= WITHIN,
        "mb_by_second": {f"{at:.1f}": round(mb) for at, mb in held[:: max(1, len(held) // SHOWN)]},
    }  # fmt: skip


def stream(place: str, minutes: float) -> dict[str, Any]:
    """Epochs until the time is over; `from` and `to` are those of time.monotonic()."""
    open_epoch, begin, pairs = data.open_reader(Path(place)), None, 0
    for epoch in itertools.count():
        for batch in open_epoch(epoch):
            begin, pairs = begin or time.monotonic(), pairs + len(batch.keys)
        if time.monotonic() - begin >= 60 * minutes:
            return {"from": begin, "to": time.monotonic(), "pairs": pairs, "epochs": epoch + 1}
