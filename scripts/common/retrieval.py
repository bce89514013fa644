"""Scores of retrieval between two sides, such as images and captions."""

from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from scripts.common import statistics
from scripts.common.errors import KilnError


def recall_at_k(
    similarity: np.ndarray, ks: Sequence[int], relevant: tuple[ArrayLike, ArrayLike] | None = None
) -> dict[str, dict[str, Any]]:
    """Retrieval scores in both directions of a similarity matrix, which may be a memory map.

    The rank of a query is 1 + the number of wrong candidates at least as similar as its best right
    one: in a tie the right one comes last, so that a constant model gets nothing for nothing.

    Args:
        similarity: (n, m), larger is more alike; read in blocks of rows, then of columns.
        ks: cut-offs, from 1 to the number of candidates.
        relevant: (ids of the n rows, ids of the m columns); a row and a column belong together when
            their ids are equal (several captions of one image, equal captions of two). Default: row i belongs
            to column i.

    Returns: {"row_to_column": scores, "column_to_row": scores}, where scores are `n` (queries), `recall`
    {k: share of queries with rank <= k}, `chance` {k: expectation of that share for a random order},
    `median_rank`, `chance_median_rank` (the k at which that expectation reaches a half), and `ranks`, an (n,) array for
    `bootstrap_interval(ranks <= k, groups=...)`.

    Raises:
        KilnError: a similarity that is not finite, a row or column with nothing relevant, a matrix that is not
            square without `relevant`, a k out of range.
    """
    if similarity.ndim != 2 or 0 in similarity.shape:
        raise KilnError(f"similarity has shape {similarity.shape}", "expected one row and one column per item")
    if relevant is None:
        if similarity.shape[0] != similarity.shape[1]:
            raise KilnError(f"similarity has shape {similarity.shape}", "say by `relevant` what belongs together")
        relevant = (np.arange(len(similarity)), np.arange(len(similarity)))
    rows, columns = (np.asarray(ids) for ids in relevant)
    if (len(rows), len(columns)) != similarity.shape:
        raise KilnError(f"{len(rows)} and {len(columns)} ids for a {similarity.shape} matrix", "give one id per item")
    _, codes = np.unique(np.concatenate([rows, columns]), return_inverse=True)
    rows, columns = codes[: len(rows)], codes[len(rows) :]
    return {
        "row_to_column": _retrieval(lambda block: similarity[block], rows, columns, ks, "row"),
        "column_to_row": _retrieval(lambda block: similarity[:, block].T, columns, rows, ks, "column"),
    }


def chance_recall(ids: ArrayLike, k: int) -> float:
    """Recall at k of a random order, where an item belongs to the text of its own id and to all of equal ids, n in all.

    Raises:
        KilnError: k out of range.
    """
    _, codes, counts = np.unique(np.asarray(ids), return_inverse=True, return_counts=True)
    if not 1 <= k <= len(codes):
        raise KilnError(f"recall at {k} among {len(codes)} candidates", f"choose each k from 1 to {len(codes)}")
    return _chance(counts[codes], len(codes), k)


def _chance(n_right: np.ndarray, candidates: int, k: int) -> float:
    """Expected share of queries with one of their [n] numbers of right candidates among k drawn ones."""
    from scipy.stats import hypergeom

    return float(hypergeom.sf(0, candidates, n_right, k).mean())


def _retrieval(block_of, ids: np.ndarray, candidates: np.ndarray, ks: Sequence[int], name: str) -> dict[str, Any]:
    n, m = len(ids), len(candidates)
    if min(ks) < 1 or max(ks) > m:
        raise KilnError(f"recall at {list(ks)} among {m} candidates of a {name}", f"choose each k from 1 to {m}")
    n_right = np.bincount(candidates, minlength=int(ids.max()) + 1)[ids]
    if (n_right == 0).any():
        raise KilnError(f"{name} {int(np.argmin(n_right))} has nothing relevant", "leave it out, and say that you did")
    step = max(1, statistics.BLOCK_CELLS // m)
    ranks = np.empty(n, np.int64)
    for start in range(0, n, step):
        block = slice(start, min(start + step, n))
        scores = np.asarray(block_of(block))
        if not np.isfinite(scores).all():
            raise KilnError(f"similarities of {name}s {start} to {block.stop - 1} are not finite", "look at the model")
        right = ids[block, None] == candidates[None, :]
        best = np.where(right, scores, -np.inf).max(axis=1, keepdims=True)
        ranks[block] = 1 + (~right & (scores >= best)).sum(axis=1)

    return {
        "n": n,
        "recall": {int(k): float(np.mean(ranks <= k)) for k in ks},
        "chance": {int(k): _chance(n_right, m, k) for k in ks},
        "median_rank": float(np.median(ranks)),
        "chance_median_rank": 1 + bisect_left(range(1, m + 1), 0.5 - 1e-9, key=lambda k: _chance(n_right, m, k)),
        "ranks": ranks,
    }


def retrieval_scores(
    similarity: np.ndarray, texts: Sequence[str], groups: ArrayLike, ks: Sequence[int], unit: str
) -> dict[str, Any]:
    """R@k and median rank from image to text and back, with intervals; an equal text of another image is a hit too.

    Args:
        similarity: [N, N], rows are images, columns their texts.
        groups: [N] what is resampled whole, such as patients; `unit` is its name, "patient".
        ks: those above N are left out, and named.

    Returns: per direction `n`, `recall` {k: entry} and `median_rank`, beside chance; and `mean` {k: entry} of both
        directions' recall.
    """
    n = len(texts)
    fitting = [k for k in ks if k <= n]
    found: dict[str, Any] = {"candidates": n, "distinct_texts": len(set(texts))}
    if len(fitting) < len(ks):
        found["left_out"] = {"ks": [k for k in ks if k > n], "reason": f"more than {n} candidates"}
    if not fitting:
        return found
    codes = pd.factorize(np.array(texts, dtype=object))[0]
    both = recall_at_k(similarity, fitting, (codes, codes))
    directions = {"image_to_text": both["row_to_column"], "text_to_image": both["column_to_row"]}
    for name, one in directions.items():
        found[name] = {
            "n": n,
            "recall": {
                k: statistics.entry(one["ranks"] <= k, groups, one["chance"][k], "chance", unit=unit) for k in fitting
            },
            "median_rank": statistics.entry(
                one["ranks"], groups, one["chance_median_rank"], "chance", "median", unit, higher_is_better=False
            ),
        }
    found["mean"] = {}
    for k in fitting:
        hits = np.mean([one["ranks"] <= k for one in directions.values()], axis=0)
        chance = float(np.mean([one["chance"][k] for one in directions.values()]))
        found["mean"][k] = statistics.entry(hits, groups, chance, "chance", unit=unit)
    return found


def expected_recall(similarity: np.ndarray, codes: np.ndarray, k: int) -> float:
    """Recall at k, the mean of both directions, where equal similarities [N, N] stand in random order.

    For scores that tell no two texts of a class apart; row i and column j belong together if their codes [N] are equal.
    Among t tied candidates, r of them right, of which s places are left, the chance of a hit is hypergeometric.
    """
    from scipy.stats import hypergeom

    right = codes[:, None] == codes[None, :]
    shares = []
    for scores in (similarity, similarity.T):
        best = np.where(right, scores, -np.inf).max(axis=1, keepdims=True)
        tied = scores == best
        tied_count = tied.sum(axis=1)
        places = np.clip(k - (scores > best).sum(axis=1), 0, tied_count)
        shares.append(hypergeom.sf(0, tied_count, (tied & right).sum(axis=1), places).mean())
    return float(np.mean(shares))
