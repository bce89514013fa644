"""Scores of answers about vases: per dimension, over all of them, and by the reward, with intervals over vases."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from scripts.common import statistics
from scripts.vase import answers
from scripts.vase.rewards import Reward
from scripts.vase.settings import CAPTION, DIMENSIONS
from scripts.vase.vqa_rows import VqaRow

SINGLE = "single"  # all rows that ask for one dimension
TEXT_MEASURES = ("anls", "bleu1", "lexical_overlap")
COLUMNS = ("id", "vase", "dimension", "accuracy", *TEXT_MEASURES, "date_overlap")
PARTS = ("base", "penalty", "bonus")
REWARDS = ("content", "format", *PARTS)
Scorer = Callable[[list[str], dict[str, list]], list[float]]


def entry(values: ArrayLike, vases: ArrayLike, seed: int) -> dict[str, Any]:
    """Mean of `values` [N] with an interval that resamples vases; of a single vase there is no interval."""
    values, vases = np.asarray(values, dtype=float), np.asarray(vases)
    if len(np.unique(vases)) < 2:
        return {"value": float(values.mean()), "n": len(values), "ci95": None, "reason": "one vase: no interval"}
    return statistics.metric(
        values.mean(), len(values), statistics.bootstrap_interval(values, groups=vases, seed=seed)
    )  # fmt: skip


def difference(a: ArrayLike, b: ArrayLike, vases: ArrayLike, seed: int) -> dict[str, Any]:
    """Mean of a - b of the same rows, with an interval that resamples vases."""
    return entry(np.asarray(a, dtype=float) - np.asarray(b, dtype=float), vases, seed)


def score_answers(rows: Sequence[VqaRow], texts: Sequence[str], synonyms: Mapping[str, str]) -> pd.DataFrame:
    """Each row's measures, all from 0 to 1: accuracy, `TEXT_MEASURES`, and for datings date_overlap, else NaN.

    Args:
        texts: answers, free of any format.
        synonyms: more synonyms than those of `answers`.
    """
    scored = [
        {
            "id": row.id,
            "vase": row.vase,
            "dimension": row.dimension,
            "accuracy": float(answers.exact(text, row.reference, row.dimension, synonyms)),
            "anls": answers.anls(text, row.reference),
            "bleu1": answers.bleu1(text, row.reference),
            "lexical_overlap": answers.lexical_overlap(text, row.reference),
            "date_overlap": answers.range_overlap(text, row.reference) if row.dimension == "dating" else np.nan,
        }
        for row, text in zip(rows, texts, strict=True)
    ]
    return pd.DataFrame(scored, columns=list(COLUMNS))


def by_dimension(frame: pd.DataFrame, seed: int) -> dict[str, dict[str, Any]]:
    """{dimension: {n, vases, measure: entry}} of `score_answers`' table; `SINGLE` holds all but captions.

    Captions have no accuracy, since no caption is the only right one.
    """
    found = {}
    single = frame[frame["dimension"] != CAPTION]
    parts = {SINGLE: single} | {name: frame[frame["dimension"] == name] for name in (*DIMENSIONS, CAPTION)}
    for name, part in parts.items():
        if part.empty:
            continue
        measures = [*TEXT_MEASURES] if name == CAPTION else ["accuracy", *TEXT_MEASURES]
        measures += ["date_overlap"] if name == "dating" else []
        vases = part["vase"].to_numpy()
        found[name] = {"n": len(part), "vases": int(part["vase"].nunique())}
        found[name] |= {measure: entry(part[measure].to_numpy(), vases, seed) for measure in measures}
    return found


def score_samples(rows: Sequence[VqaRow], texts: Sequence[str], reward: Reward, scorer: Scorer) -> pd.DataFrame:
    """Rewards of sampled completions: content (by `scorer`, which may be a user's), and the parts of ours."""
    columns = {name: [row.columns()[name] for row in rows] for name in ("reference", "dimension", "facts")}
    made = []
    for row, text, content in zip(rows, texts, scorer(list(texts), columns), strict=True):
        parts = reward.content(text, row.reference, row.dimension, row.facts)
        found = {"id": row.id, "vase": row.vase, "dimension": row.dimension, "content": content}
        made.append(found | {"format": reward.format(text), **{key: getattr(parts, key) for key in PARTS}})
    return pd.DataFrame(made)


def by_row(samples: pd.DataFrame) -> pd.DataFrame:
    """Mean over the draws of each row, by id in order; columns vase and `REWARDS`."""
    return samples.groupby("id").agg({"vase": "first", **dict.fromkeys(REWARDS, "mean")}).sort_index()
