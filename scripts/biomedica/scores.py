"""Scores of classes and of arms, and what trivial features reach; retrieval is scored by `scripts.common.retrieval`.

Intervals resample articles, since figures of one article are alike.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from scripts.common import classification, retrieval, statistics

HEADLINE_K = 5
RESAMPLES = 2000
MISMATCHES = 8  # wrong captions beside each right one, for the regression on pairs
UNIT = "article"
ONE_ARTICLE = f"one {UNIT}: no interval"
WAYS = ("image_to_text", "text_to_image")


def class_vectors(prompts: np.ndarray) -> np.ndarray:
    """Unit vectors [C, D] of classes: the mean of each class's prompts, unit vectors [C, P, D], at length 1 again.

    As open_clip's `build_zero_shot_classifier`, and CLIP (Radford et al. 2021, section 3.1.4) before it.
    """
    means = prompts.mean(axis=1)
    return means / np.linalg.norm(means, axis=1, keepdims=True)


def zero_shot(images: np.ndarray, vectors: np.ndarray, scale: float) -> np.ndarray:
    """Class probabilities [N, C]: softmax of `scale` (the logit scale's exponential) times cosines.

    Args:
        images, vectors: [N, D] and [C, D] unit vectors.
    """
    logits = scale * images.astype(np.float64) @ vectors.astype(np.float64).T
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    return shares / shares.sum(axis=1, keepdims=True)


def class_scores(
    labels: ArrayLike, probabilities: np.ndarray, articles: ArrayLike, classes: Sequence[str]
) -> dict[str, Any]:
    """`classification.classification_report` of the figures whose panel type is known.

    Args:
        labels: [N] numbers of classes, -1 where unknown: such figures are left out, and counted. One is known.
        probabilities: [N, C].
    """
    labels, articles = np.asarray(labels), np.asarray(articles)
    kept = labels >= 0
    few = len(np.unique(articles[kept])) < 2
    report = classification.classification_report(
        labels[kept], probabilities[kept], articles[kept], classes=classes, n_resamples=0 if few else RESAMPLES
    )
    return {"left_out": int((~kept).sum()), **report}


def text_features(texts: Sequence[str]) -> np.ndarray:
    """Length in characters and in words, as [N, 2] float64."""
    return np.array([[len(one), len(one.split())] for one in texts], dtype=np.float64).reshape(-1, 2)


def pair_scores(
    taught: tuple[np.ndarray, np.ndarray], texts: Sequence[str], test: tuple[np.ndarray, np.ndarray]
) -> np.ndarray:
    """Similarity [N, N] of images and texts by a logistic regression on pairs: is this the figure's caption?

    It sees the standardised features of both sides and all products of one of an image with one of a text. It is
    taught right pairs, and wrong ones made by moving the captions by 1 to `MISMATCHES` places; equal texts are never
    wrong. If all texts are equal, nothing is similar.

    Args:
        taught, test: features of images [M, F] and of texts [M, G]; and [N, F], [N, G]; all finite.
        texts: [M] texts of what is taught.
    """
    from sklearn.linear_model import LogisticRegression

    (x, t), (x_test, t_test) = taught, test
    count, codes = len(x), pd.factorize(np.array(texts, dtype=object))[0]
    x, x_test, t, t_test = *_standardised(x, x_test), *_standardised(t, t_test)
    rows = np.arange(count)
    moved = np.concatenate([rows, *((rows + by) % count for by in range(1, min(MISMATCHES, count - 1) + 1))])
    rows = np.tile(rows, len(moved) // count)
    right = np.arange(len(rows)) < count
    kept = right | (codes[rows] != codes[moved])
    rows, moved, right = rows[kept], moved[kept], right[kept]
    if right.all():
        return np.zeros((len(x_test), len(t_test)))
    products = (x[rows, :, None] * t[moved, None, :]).reshape(len(rows), -1)
    regression = LogisticRegression(max_iter=2000).fit(np.hstack([products, x[rows], t[moved]]), right)
    of_products, of_images, of_texts = np.split(
        regression.coef_[0], [products.shape[1], products.shape[1] + x.shape[1]]
    )
    weights = of_products.reshape(x.shape[1], t.shape[1])
    return x_test @ weights @ t_test.T + (x_test @ of_images)[:, None] + (t_test @ of_texts)[None, :]


def _standardised(taught: np.ndarray, test: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    taught, test = statistics.finite(taught, "taught", ndim=2), statistics.finite(test, "test", ndim=2)
    spread = taught.std(axis=0)
    return tuple((one - taught.mean(axis=0)) / np.where(spread > 0, spread, 1) for one in (taught, test))


def trivial_classes(probabilities: np.ndarray, labels: np.ndarray, texts: Sequence[str], k: int) -> dict[str, Any]:
    """What trivial features reach: `panel_type` accuracy, and `retrieval` at k, where a caption ranks as its type does.

    Args:
        probabilities: [N, C] of `classification.trivial_probabilities`.
        labels: [N] panel types, -1 if unknown; such captions rank last, and such images are not asked for their type.
    """
    known = labels >= 0
    similarity = np.where(known, probabilities[:, np.maximum(labels, 0)], 0.0)
    return {
        "panel_type": float((probabilities.argmax(axis=1)[known] == labels[known]).mean()),
        "retrieval": recall_of_ties(similarity, texts, k),
    }


def recall_of_ties(similarity: np.ndarray, texts: Sequence[str], k: int) -> float | None:
    """`retrieval.expected_recall`, equal texts belonging together; None for fewer than k texts."""
    codes = pd.factorize(np.array(texts, dtype=object))[0]
    return retrieval.expected_recall(similarity, codes, k) if k <= len(texts) else None


def hits(similarity: np.ndarray, texts: Sequence[str], k: int) -> np.ndarray:
    """[N] 0, 0.5 or 1: in how many of both directions a pair's own (or an equal) one is among the first k.

    Their mean is recall at k as in `mean` of `retrieval.retrieval_scores`.
    """
    codes = pd.factorize(np.array(texts, dtype=object))[0]
    both = retrieval.recall_at_k(similarity, [k], (codes, codes))
    return np.mean([one["ranks"] <= k for one in both.values()], axis=0)


def compare_arms(ours: np.ndarray, theirs: np.ndarray, articles: ArrayLike) -> dict[str, Any]:
    """Mean difference of two arms on the same pairs, over seeds, with a 95 % interval.

    The interval is that of a paired bootstrap over articles and seeds, the pigeonhole bootstrap of Owen (2007, Annals
    of Applied Statistics 1(2)): with d[s, i] = ours[s, i] - theirs[s, i], each of `RESAMPLES` resamples draws the
    articles with replacement, the same for all runs, and the seeds with replacement, and takes
    sum_s v[s] sum_i w[a(i)] d[s, i] / (sum_s v[s] sum_i w[a(i)]), where w[a] and v[s] count how often article a and
    seed s were drawn, and a(i) is the article of pair i. It reaches from the 2.5th to the 97.5th percentile. Of one
    seed, it is over articles alone.

    Args:
        ours, theirs: [S, N] scores of pairs, row s of the same seed.
        articles: [N].

    Returns: `difference`, `ci95`, `seeds`, `n`; of one article no interval, with the reason.
    """
    gaps = statistics.finite(ours, "ours", ndim=2) - statistics.finite(theirs, "theirs", ndim=2)
    seeds, n = gaps.shape
    found = {"difference": float(gaps.mean()), "seeds": seeds, "n": n}
    if len(np.unique(articles)) < 2:
        return found | {"ci95": None, "reason": ONE_ARTICLE}
    unit, units = statistics.units(articles, n)
    sums = np.zeros((units, seeds))
    np.add.at(sums, unit, gaps.T)
    sizes = np.bincount(unit)
    of_articles = np.concatenate(
        [(drawn @ sums) / (drawn @ sizes)[:, None] for drawn in statistics.draws(np.ones(units, int), RESAMPLES, 0)]
    )
    of_seeds = np.concatenate(list(statistics.draws(np.ones(seeds, int), RESAMPLES, 1)))
    resampled = (of_articles * of_seeds).sum(axis=1) / seeds
    return found | {"ci95": list(statistics.percentiles(resampled, 0.95))}


def summary(
    retrieved: Mapping[str, Any], compared: Mapping[str, Any] | None, trivial: float | None, articles: int
) -> tuple[dict[str, Any], dict[str, str]]:
    """(headline metrics, {headline that does not exist here: why}).

    Args:
        retrieved: of `retrieval.retrieval_scores`, after training.
        compared: `mean` {arm: recall}, and the keys of `compare_arms`; None without runs.
        trivial: recall that trivial features reach.
        articles: of the test side, which intervals resample.

    `hybrid_over_local` is a difference, so that its baseline is 0; `trivial`, too, is there how far above the local arm
    it reaches.
    """
    made, left_out = {}, {}
    resampled = {"groups": articles, "grouped_by": UNIT}
    one = retrieved.get("mean", {}).get(HEADLINE_K)
    if one is None:
        left_out["recall_at_5"] = f"recall at {HEADLINE_K} was not asked for, or there are fewer test pairs"
    elif one["ci95"] is None:
        left_out["recall_at_5"] = one["reason"]
    else:
        parts = {way: retrieved[way]["recall"][HEADLINE_K]["value"] for way in WAYS}
        made["recall_at_5"] = one | resampled | {"trivial": trivial, "about": "the exported model", **parts}
    if compared is None:
        left_out["hybrid_over_local"] = "no runs of both arms were given (biomedica.compare_seeds)"
    elif compared["ci95"] is None:
        left_out["hybrid_over_local"] = compared["reason"]
    else:
        hybrid, local = (compared["mean"][arm] for arm in ("hybrid", "local"))
        extra = {key: compared[key] for key in ("difference", "seeds", "steps")}
        made["hybrid_over_local"] = statistics.metric(
            compared["difference"],
            compared["n"],
            compared["ci95"],
            0.0,
            "local_only",
            trivial=None if trivial is None else trivial - local,
            difference_of=f"recall at {HEADLINE_K}",
            about=f"{hybrid:.3f} hybrid, {local:.3f} local, mean of {compared['seeds']} seeds; trivial: against local",
            hybrid=hybrid,
            local=local,
            **resampled,
            **extra,
        )
    return made, left_out
