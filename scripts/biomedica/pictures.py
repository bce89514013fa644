"""Pictures of the scores."""

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from scripts.biomedica import held_out, scores
from scripts.biomedica.held_out import Side
from scripts.biomedica.settings import ARMS
from scripts.common import plots, retrieval, sheets

WORDS = {"image_to_text": "image to text", "text_to_image": "text to image"}
SHOWN = (6, 4)  # panel types in the sheet of figures, and figures of each


def draw_scores(path: Path, metrics: Mapping[str, Any]) -> None:
    """scores.png: every score after and before training, and the floor that it is compared with."""
    shown: dict[str, tuple[dict, dict, dict[str, float]]] = {}
    before, after = metrics["before"], metrics["after"]
    for way, words in WORDS.items():
        for k, one in after["retrieval"].get(way, {}).get("recall", {}).items():
            shown[f"R@{k}, {words}"] = one, before["retrieval"][way]["recall"][k], {"chance": one["baseline"]}
    if "zero_shot" in after:
        for name, floor in (("accuracy", "most_frequent"), ("balanced_accuracy", "chance")):
            floors = {floor.replace("_", " "): metrics["floors"][floor]}
            if name in metrics["trivial"]:
                floors["trivial features"] = metrics["trivial"][name]
            shown[f"panel type: {name.replace('_', ' ')}"] = after["zero_shot"][name], before["zero_shot"][name], floors
    if "mean" in after["retrieval"] and scores.HEADLINE_K in after["retrieval"]["mean"]:
        k, reached = scores.HEADLINE_K, metrics["trivial"]["retrieval"]
        own, earlier = (one["retrieval"]["mean"][k] for one in (after, before))
        shown[f"R@{k}, mean of both"] = own, earlier, {"chance": own["baseline"], "trivial features": reached}
    groups: dict[str, dict[str, tuple]] = {}
    for label, (own, earlier, floors) in shown.items():
        groups[label] = {"after training": (own["value"], own["ci95"])}
        groups[label]["before training"] = earlier["value"], earlier["ci95"]
        groups[label] |= {name: (value, None) for name, value in floors.items()}
    baselines = {name for rows in groups.values() for name in rows} - {"after training"}
    counts = metrics["data"]["test"]
    title = f"Test side: {counts['pairs']:,} figures of {counts['articles']:,} articles"
    plots.intervals(path, groups, "score, 95 % interval over articles", title, baselines=baselines)


def draw_runs(path: Path, runs: Mapping[str, Any]) -> None:
    """runs.png: recall of every run, and of both arms, with the interval of their difference."""
    groups = {
        f"seed {seed}": {arm: (one[arm]["value"], one[arm]["ci95"]) for arm in ARMS}
        for seed, one in runs["per_seed"].items()
    }
    mean = runs["mean"]
    interval = runs["ci95"] and [mean["local"] + bound for bound in runs["ci95"]]
    groups["mean of the seeds"] = {"hybrid": (mean["hybrid"], interval), "local": (mean["local"], None)}
    found = f"{runs['difference']:+.3f}"
    if runs["ci95"]:
        found += " [{:+.3f}, {:+.3f}]".format(*runs["ci95"])
    title = f"Hybrid minus local: {found} in recall at {runs['k']}, {runs['seeds']} seeds, {runs['steps']:,} steps each"
    label = f"recall at {runs['k']}, 95 % interval over articles; of the mean's difference, over articles and seeds"
    plots.intervals(path, groups, label, title, floors={"mean of local": mean["local"]})


def draw_confusion(path: Path, zero_shot: Mapping[str, Any]) -> None:
    """confusion.png: the panel type by prompts against that of the metadata."""
    title = f"Panel type by prompts, zero-shot (n = {zero_shot['n']:,})"
    plots.confusion_matrix(path, zero_shot["confusion_matrix"], zero_shot["classes"], title)


def draw_panel_types(path: Path, data: Mapping[str, Any], why: str) -> None:
    """confusion.png where panel types cannot be scored: which ones there are."""
    plots.shares(path, {"test side": data["test"]["panel_types"]}, f"No zero-shot scores: {why}")


def draw_retrieval(path: Path, test: Side, similarity: np.ndarray, batch_size: int) -> None:
    """retrieval.png: figures of the most frequent panel types, with the caption ranked first and the right one."""
    types = test.table["panel_type"]
    kinds = types.value_counts().sort_index().sort_values(ascending=False, kind="stable").index[: SHOWN[0]]
    chosen = {kind: np.flatnonzero(types == kind)[: SHOWN[1]] for kind in kinds}
    wanted = set(np.concatenate(list(chosen.values())).tolist())
    keys = test.table["key"].to_list()
    files = (one for batch in held_out.batches(test.path, batch_size) for one in batch)
    images = {i: held_out.decoded([one], keys[i:][:1])[0] for i, one in enumerate(files) if i in wanted}
    codes = pd.factorize(test.table["caption"])[0]
    ranks = retrieval.recall_at_k(similarity, [1], (codes, codes))["row_to_column"]["ranks"]
    rows = [(kind, [tile(images[i], test, similarity[i], ranks[i], i) for i in chosen[kind]]) for kind in kinds]
    title = f"Figures and the caption that is ranked first among {len(test.table):,}"
    longest = max(len(one.caption) for _, tiles in rows for one in tiles)
    sheets.contact_sheet(path, rows, title, columns=SHOWN[1], size=230, caption_lines=min(7, 1 + longest // 28))


def tile(image, test: Side, similarity: np.ndarray, rank: int, own: int) -> sheets.Tile:
    """A figure with the caption that is ranked first and, where it is another one, its own with its rank."""
    first = test.table["caption"].iloc[int(similarity.argmax())]
    if rank == 1:
        return sheets.Tile(image, f"1st, right: {textwrap.shorten(first, 180, placeholder='…')}", "good")
    right = textwrap.shorten(test.table["caption"].iloc[own], 85, placeholder="…")
    first = textwrap.shorten(first, 85, placeholder="…")
    return sheets.Tile(image, f"1st: {first} — right, at rank {rank}: {right}", "bad")
