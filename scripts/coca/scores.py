"""Scores of captions, retrieval and zero-shot classes, each with n, an interval over patients, and a floor beside it.

Intervals resample patients, since slides of one patient are alike.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU, CHRF

from scripts.common import classification, retrieval, statistics
from scripts.common.errors import KilnError

HAN = "\u2e80-\u2fdf\u3005-\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Chinese characters
MEASURES = ("chrf", "rouge_l", "exact")
ORDERS = 4  # of BLEU's n-grams
RESAMPLES = 2000
HEADLINE_K = 5
ONE_PATIENT = "one patient: no interval"


def entry(
    values: ArrayLike,
    patients: ArrayLike,
    baseline: float | None = None,
    baseline_kind: str | None = None,
    statistic: str = "mean",
    **extra: Any,
) -> dict[str, Any]:
    """Mean, or median, of `values` [N] with an interval that resamples patients.

    Of no values there is none, of one patient's no interval; a `reason` says so.
    """
    values = np.asarray(values, dtype=float)
    if not len(values):
        return {"value": None, "n": 0, "ci95": None, "reason": "no such slide"}
    value = float(np.median(values) if statistic == "median" else values.mean())
    if len(np.unique(patients)) < 2:
        return _without_interval(value, len(values), baseline, baseline_kind, **extra)
    interval = statistics.bootstrap_interval(values, statistic, patients, RESAMPLES)
    return statistics.metric(value, len(values), interval, baseline, baseline_kind, **extra)


def _without_interval(value: float, n: int, baseline, baseline_kind, **extra: Any) -> dict[str, Any]:
    of_baseline = {"baseline": baseline, "baseline_kind": baseline_kind, "higher_is_better": True}
    return {"value": value, "n": n, "ci95": None, "reason": ONE_PATIENT, **of_baseline} | extra


class Words:
    """ROUGE's tokens of any language: words of letters and digits, and each Chinese character by itself."""

    pattern = re.compile(rf"[{HAN}]|[^\W_{HAN}]+")

    def tokenize(self, text: str) -> list[str]:
        """Lower-case tokens of `text`."""
        return self.pattern.findall(text.lower())


def bleu_tokenizer(texts: Sequence[str]) -> str:
    """sacrebleu's tokenizer for these references: `zh` if one holds a Chinese character, which it sets apart."""
    return "zh" if any(re.search(f"[{HAN}]", text) for text in texts) else "13a"


def bleu_counts(captions: Sequence[str], texts: Sequence[str], tokenizer: str) -> np.ndarray:
    """What BLEU sums over a corpus: matching n-grams, n-grams, caption's length, text's length; [N, 2 * 4 + 2]."""
    metric = BLEU(tokenize=tokenizer, effective_order=True)
    found = (metric.sentence_score(one, [text]) for one, text in zip(captions, texts, strict=True))
    counts = [[*one.counts, *one.totals, one.sys_len, one.ref_len] for one in found]
    return np.array(counts, dtype=np.int64).reshape(-1, 2 * ORDERS + 2)


def bleu(counts: np.ndarray) -> float:
    """Corpus BLEU, from 0 to 100, of summed counts [2 * 4 + 2]; as sacrebleu's `corpus_bleu`."""
    *grams, own, reference = (int(one) for one in counts)
    return BLEU.compute_bleu(grams[:ORDERS], grams[ORDERS:], own, reference, smooth_method="exp").score


def bleu_entry(counts: np.ndarray, patients: ArrayLike, baseline: float) -> dict[str, Any]:
    """Corpus BLEU of [N, 2 * 4 + 2] counts; each resample is a corpus of whole patients."""
    value, n = bleu(counts.sum(0)), len(counts)
    if len(np.unique(patients)) < 2:
        return _without_interval(value, n, baseline, "most_frequent")
    unit, units = statistics.units(patients, n)
    sums = np.zeros((units, counts.shape[1]), dtype=np.int64)
    np.add.at(sums, unit, counts)
    drawn = statistics.draws(np.ones(units, np.int64), RESAMPLES, seed=0)
    resampled = np.array([bleu(one) for block in drawn for one in block @ sums])
    return statistics.metric(value, n, statistics.percentiles(resampled, 0.95), baseline, "most_frequent")


def text_measures(captions: Sequence[str], texts: Sequence[str]) -> pd.DataFrame:
    """Per pair: `chrf` (sacrebleu's chrF2, 0 to 100), `rouge_l` (F1 of `Words`, 0 to 1), `exact` (equal but for
    white space at the ends, 0 or 1)."""
    chrf, rouge = CHRF(), RougeScorer(["rougeL"], tokenizer=Words())
    rows = [
        {
            "chrf": chrf.sentence_score(one, [text]).score,
            "rouge_l": rouge.score(text, one)["rougeL"].fmeasure,
            "exact": float(one.strip() == text.strip()),
        }
        for one, text in zip(captions, texts, strict=True)
    ]
    return pd.DataFrame(rows, columns=list(MEASURES))


def most_frequent(values: Sequence[Any]) -> Any:
    """The most frequent value; of equally frequent ones the first in order."""
    counts = Counter(values)
    return min(counts, key=lambda value: (-counts[value], value))


def caption_scores(
    captions: Sequence[str], texts: Sequence[str], train_texts: Sequence[str], patients: ArrayLike
) -> dict[str, Any]:
    """Captions [N] against texts [N], beside the most frequent training text as everyone's caption.

    `bleu` is of the whole corpus, the others are means over slides; `exact_seen` is `exact` on slides whose text
    occurs in training, for no other text can be learnt by heart.
    """
    patients = np.asarray(patients)
    constant = most_frequent(train_texts)
    tokenizer = bleu_tokenizer(texts)
    own, floor = text_measures(captions, texts), text_measures([constant] * len(texts), texts)
    floor_bleu = bleu(bleu_counts([constant] * len(texts), texts, tokenizer).sum(0))
    known = set(train_texts)
    seen = np.array([text in known for text in texts])
    made = {"bleu": bleu_entry(bleu_counts(captions, texts, tokenizer), patients, floor_bleu)}
    made |= {name: entry(own[name], patients, float(floor[name].mean()), "most_frequent") for name in MEASURES}
    made["exact_seen"] = (
        entry(own["exact"][seen], patients[seen], float(floor["exact"][seen].mean()), "most_frequent")
        if seen.any()
        else {"value": None, "n": 0, "ci95": None, "reason": "no text of the test side occurs in training"}
    )
    return {
        "n": len(texts),
        "tokenizer": tokenizer,
        "empty": sum(not one.strip() for one in captions),
        "distinct": len(set(captions)),
        "most_frequent_caption": constant,
        **made,
    }


def retrieval_scores(
    similarity: np.ndarray, texts: Sequence[str], patients: ArrayLike, ks: Sequence[int]
) -> dict[str, Any]:
    """R@k and median rank from slide to text and back; a slide and an equal text of another one are a hit too.

    Args:
        similarity: [N, N], rows are slides, columns their texts.
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
    both = retrieval.recall_at_k(similarity, fitting, (codes, codes))
    directions = {"image_to_text": both["row_to_column"], "text_to_image": both["column_to_row"]}
    for name, one in directions.items():
        found[name] = {
            "n": n,
            "recall": {k: entry(one["ranks"] <= k, patients, one["chance"][k], "chance") for k in fitting},
            "median_rank": entry(
                one["ranks"], patients, one["chance_median_rank"], "chance", "median", higher_is_better=False
            ),
        }
    found["mean"] = {}
    for k in fitting:
        hits = np.mean([one["ranks"] <= k for one in directions.values()], axis=0)
        chance = float(np.mean([one["chance"][k] for one in directions.values()]))
        found["mean"][k] = entry(hits, patients, chance, "chance")
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


def zero_shot(images: np.ndarray, prompts: np.ndarray, classes: Sequence[int], scale: float) -> np.ndarray:
    """Class probabilities [N, C]: softmax over all prompts, summed over those of each class, as Prism's.

    Args:
        images, prompts: [N, D] and [P, D] unit vectors.
        classes: [P] number of each prompt's class, from 0 to C - 1.
        scale: what cosines are multiplied by, the exponential of the learnt temperature.
    """
    logits = scale * images.astype(np.float64) @ prompts.astype(np.float64).T
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares /= shares.sum(axis=1, keepdims=True)
    return shares @ np.eye(max(classes) + 1)[np.asarray(classes)]


def class_scores(
    labels: ArrayLike,
    predictions: ArrayLike | None,
    patients: ArrayLike,
    classes: Sequence[str],
    probabilities: np.ndarray | None = None,
) -> dict[str, Any]:
    """`classification.classification_report` of the slides whose text names a class.

    Args:
        labels: [N] numbers of classes; -1 where the text names none, or several: such slides are left out, and counted.
        predictions: [N], -1 is no answer, which is wrong; or None, to decide by `probabilities` [N, C].

    Raises:
        KilnError: no text names a class.
    """
    labels, patients = np.asarray(labels), np.asarray(patients)
    kept = labels >= 0
    if not kept.any():
        raise KilnError(
            f"none of {len(labels)} texts names exactly one of the classes {', '.join(classes)}",
            "set coca.evaluate.classes to terms that occur in the texts, or to {}",
        )
    few = len(np.unique(patients[kept])) < 2
    report = classification.classification_report(
        labels[kept],
        None if probabilities is None else probabilities[kept],
        patients[kept],
        classes=classes,
        predictions=None if predictions is None else np.asarray(predictions)[kept],
        n_resamples=0 if few else RESAMPLES,
    )
    return {"left_out": int((~kept).sum()), **report}


def trivial_probabilities(
    train_features: np.ndarray, train_labels: ArrayLike, test_features: np.ndarray, count: int
) -> np.ndarray:
    """Class probabilities [N, count] by logistic regression on standardised features; of one class, its certainty.

    Args:
        train_features, test_features: [M, F] and [N, F] finite numbers.
        train_labels: [M] numbers from 0 to count - 1; rows of -1 teach nothing.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    labels = np.asarray(train_labels)
    x, y = statistics.finite(train_features, "train_features", ndim=2)[labels >= 0], labels[labels >= 0]
    found = np.zeros((len(test_features), count))
    if len(np.unique(y)) == 1:
        found[:, y[0]] = 1
        return found
    regression = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)).fit(x, y)
    found[:, regression.classes_] = regression.predict_proba(statistics.finite(test_features, "test_features", ndim=2))
    return found


def trivial_scores(probabilities: np.ndarray, labels: np.ndarray, texts: Sequence[str], k: int) -> dict[str, Any]:
    """What trivial features reach: `diagnosis` accuracy, and `retrieval` at k, where a text ranks as its class does.

    Args:
        probabilities: [N, C] of `trivial_probabilities`.
        labels: [N] classes of the texts, -1 for none; such texts rank last, and are not asked for their class.
    """
    named = labels >= 0
    similarity = np.where(named, probabilities[:, np.maximum(labels, 0)], 0.0)
    codes = pd.factorize(np.array(texts, dtype=object))[0]
    return {
        "diagnosis": float((probabilities.argmax(axis=1)[named] == labels[named]).mean()),
        "retrieval": expected_recall(similarity, codes, k) if k <= len(texts) else None,
    }


def summary(
    retrieved: Mapping[str, Any], diagnosed: Mapping[str, Any] | None, trivial: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, str]]:
    """(headline metrics, {headline that does not exist here: why}).

    Args:
        retrieved: of `retrieval_scores`.
        diagnosed: of `class_scores`, with the `most_frequent` class's accuracy; None without classes.
        trivial: of `trivial_scores`; empty without classes.
    """
    made, left_out = {}, {}
    one = retrieved.get("mean", {}).get(HEADLINE_K)
    if one is None:
        left_out["retrieval_r5"] = f"recall at {HEADLINE_K} was not asked for, or there are fewer test slides"
    elif one["ci95"] is None:
        left_out["retrieval_r5"] = one["reason"]
    else:
        parts = {name: retrieved[name]["recall"][HEADLINE_K]["value"] for name in ("image_to_text", "text_to_image")}
        made["retrieval_r5"] = one | {"trivial": trivial.get("retrieval"), **parts}
    if diagnosed is None:
        left_out["caption_diagnosis_accuracy"] = "no classes are set (coca.evaluate.classes)"
    elif diagnosed["accuracy"]["ci95"] is None:
        left_out["caption_diagnosis_accuracy"] = ONE_PATIENT
    else:
        one = diagnosed["accuracy"]
        made["caption_diagnosis_accuracy"] = one | {
            "baseline": diagnosed["most_frequent"],
            "baseline_kind": "most_frequent",
            "trivial": trivial["diagnosis"],
            "no_answer": int(sum(diagnosed["unanswered"])),
        }
    return made, left_out
