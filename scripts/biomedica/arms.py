"""Runs of both arms, hybrid and local, compared on the same test side."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from scripts.biomedica import checkpoints, embedding, scores
from scripts.biomedica.held_out import Side
from scripts.biomedica.settings import ARMS
from scripts.common import statistics
from scripts.common.errors import KilnError


class Run(NamedTuple):
    """A run of the comparison of arms."""

    arm: str
    seed: int
    checkpoint: Path

    @property
    def name(self) -> str:
        """ARM-SEED."""
        return f"{self.arm}-{self.seed}"


def parse_run(text: str) -> Run:
    """ARM-SEED=CHECKPOINT."""
    name, _, path = text.partition("=")
    arm, _, seed = name.rpartition("-")
    if arm not in ARMS or not seed.isdecimal() or not path:
        raise argparse.ArgumentTypeError(f"{text!r}: expected ARM-SEED=CHECKPOINT, with ARM of {', '.join(ARMS)}")
    return Run(arm, int(seed), Path(path))


def check_runs(runs: Sequence[Run]) -> list[int]:
    """Seeds of the runs, sorted, each of which has one run of each arm.

    Raises:
        KilnError: one is missing or doubled.
    """
    names = [one.name for one in runs]
    for name in names:
        if names.count(name) > 1:
            raise KilnError(f"--runs: {name} is given twice", "give each seed one run of each arm")
    seeds = sorted({one.seed for one in runs})
    missing = [f"{arm}-{seed}" for seed in seeds for arm in ARMS if f"{arm}-{seed}" not in names]
    if missing:
        raise KilnError(f"--runs: no {', '.join(missing)}", "give each seed one run of each arm")
    return seeds


def compare_runs(runs: Sequence[Run], test: Side, batch_size: int, weights: Path | None, device) -> dict[str, Any]:
    """Section runs of metrics.json: recall at 5, the mean of both ways, of every run, and how far the arms differ.

    Raises:
        KilnError: a checkpoint is of another arm or seed than is said, or they differ in steps or architecture; too
            few test pairs.
    """
    k, seeds = scores.HEADLINE_K, check_runs(runs)
    if len(test.table) < k:
        raise KilnError(
            f"runs cannot be compared on {len(test.table)} test pairs: recall at {k} needs as many",
            "hold more articles out (biomedica.held_out.test)",
        )
    found, facts = {}, {}
    for run in runs:
        model, facts[run.name] = embedding.load(run.checkpoint, weights, device)
        check_same(run, facts[run.name], runs[0], facts[runs[0].name])
        similarity, _ = embedding.similarities(model, test, batch_size, run.name)
        found[run.name] = scores.hits(similarity, test.captions, k)
    arms = {arm: np.stack([found[f"{arm}-{seed}"] for seed in seeds]) for arm in ARMS}
    entries = {name: statistics.entry(one, test.articles, unit=scores.UNIT) for name, one in found.items()}
    per_seed = {
        seed: {arm: entries[f"{arm}-{seed}"] for arm in ARMS}
        | {"difference": statistics.entry(arms["hybrid"][i] - arms["local"][i], test.articles, unit=scores.UNIT)}
        for i, seed in enumerate(seeds)
    }
    return {
        "k": k,
        "steps": facts[runs[0].name].step,
        "per_seed": per_seed,
        "mean": {arm: float(one.mean()) for arm, one in arms.items()},
        **scores.compare_arms(arms["hybrid"], arms["local"], test.articles),
    }


def check_same(run: Run, facts: checkpoints.Facts, first: Run, wanted: checkpoints.Facts) -> None:
    """Refuse a checkpoint that is not of `run`, or is no match for the first one's."""
    if (facts.arm, facts.seed) != (run.arm, run.seed):
        raise KilnError(
            f"{run.checkpoint}: of {facts.arm}-{facts.seed}, given as {run.name}", "give each run its own name"
        )
    hint = "compare last.safetensors of runs that differ in arm and seed alone"
    if facts.step != wanted.step:
        raise KilnError(f"{run.name} had {facts.step:,} steps, {first.name} {wanted.step:,}: no fair comparison", hint)
    if (facts.model_cfg, facts.preprocess_cfg) != (wanted.model_cfg, wanted.preprocess_cfg):
        raise KilnError(f"{run.name} and {first.name} are of different models: no fair comparison", hint)
