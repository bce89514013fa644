"""Share of the training time in which the demo's model waits for data, all pairs streamed.

The steps are those of rule `biomedica_train_clip`, in a process of its own, with the demo's settings (config/demo.yaml)
for model, batches, lanes and workers, on drawn pictures of the size of the demo's figures. The time is that of all
batches of three epochs, with the start of each epoch's workers; `after_first_batch` leaves each epoch's first one out.
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from benchmarks import biomedica_data as data
from benchmarks import measure
from scripts import config
from scripts.biomedica import model
from scripts.biomedica.training import Fit, Validation
from scripts.common import devices

TARGET, EPOCHS = 0.05, 3


def measure_stall(args: argparse.Namespace, root: Path) -> dict[str, Any]:
    """Medians of --runs trainings."""
    figures = demo().demo.figures
    side = (figures.min_side + figures.max_side) // 2
    shards = data.draw_shards(root, args.shards, args.figures, side, side)
    with data.serve(root, args) as environment:
        work = "import json\nfrom benchmarks import biomedica_training as one\n"
        work += f"made = one.train({str(root)!r}, {shards['pairs']}, {args.threads})\nprint('\\n' + json.dumps(made))"
        runs = [measure.program(work, environment, args.most_seconds).found for _ in range(args.runs)]
    shares = [one["share"] for one in runs]
    rate = statistics.median(one["pairs_per_second"] for one in runs)
    return {
        "model": demo().biomedica.model.config or demo().biomedica.model.name, "pairs": shards["pairs"],
        "epochs": EPOCHS, "pixels": [side, side], "kilobytes_of_a_pair": shards["bytes_of_a_pair"] / 1e3,
        "latency_ms": args.latency, "link_megabytes_per_second": args.bandwidth, "pairs_per_second": rate,
        "megabytes_per_second": rate * shards["bytes"] / shards["pairs"] / 1e6,
        "waited_share": statistics.median(shares), "waited_share_min": min(shares), "waited_share_max": max(shares),
        "after_first_batch": statistics.median(one["share_after_first"] for one in runs),
        "target_met": statistics.median(shares) < TARGET,
    }  # fmt: skip


def demo() -> config.Config:
    """The demo's settings."""
    return config.load(yaml.safe_load((measure.ROOT / "config/demo.yaml").read_text()), Path())


def train(place: str, pairs: int, threads: int) -> dict[str, float]:
    """A training over `pairs` streamed pairs: share of the time that it waited, and pairs per second."""
    values = demo().biomedica
    policy = values.plan.model_copy(update={"samples": pairs, "epochs": EPOCHS})
    own = values.train.model_copy(update={"warmup_steps": 0})
    plan, clip = data.open_plan(Path(place), policy), model.build(values.model, own.seed)
    accelerator = devices.make_accelerator("cpu", own.precision, threads)
    loader = data.open_loader(Path(place), plan, policy, own, clip, accelerator)
    side = clip.preprocess_cfg["size"]
    sides = (side, side) if isinstance(side, int) else side
    two = Validation(torch.zeros(2, 3, *sides, dtype=torch.uint8), clip.tokenizer(["one", "two"]), np.arange(2))
    fit = Fit(clip, plan, loader, two, own, accelerator)
    steps: list[tuple[float, float]] = [(0.0, 0.0)]  # waited, in all, after each step
    fit.run(lambda fit: steps.append((fit.at.totals["waited"], fit.at.totals["seconds"])), lambda _: None)
    waited, seconds = np.diff(steps, axis=0).T.reshape(2, EPOCHS, -1)
    return {
        "share": waited.sum() / seconds.sum(), "share_after_first": waited[:, 1:].sum() / seconds[:, 1:].sum(),
        "pairs_per_second": EPOCHS * plan.samples / seconds.sum(),
    }  # fmt: skip
