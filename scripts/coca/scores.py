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
    **extra: Any,
) -> dict[str, Any]:
    """Mean of `values` [N] with an interval that resamples patients; see `statistics.entry`."""
    return statistics.entry(values, patients, baseline, baseline_kind, unit="patient", **extra)


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
        return statistics.without_interval(value, n, ONE_PATIENT, baseline, "most_frequent")
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


def trivial_scores(probabilities: np.ndarray, labels: np.ndarray, texts: Sequence[str], k: int) -> dict[str, Any]:
    """What trivial features reach: `diagnosis` accuracy, and `retrieval` at k, where a text ranks as its class does.

    Args:
        probabilities: [N, C] of `classification.trivial_probabilities`.
        labels: [N] classes of the texts, -1 for none; such texts rank last, and are not asked for their class.
    """
    named = labels >= 0
    similarity = np.where(named, probabilities[:, np.maximum(labels, 0)], 0.0)
    codes = pd.factorize(np.array(texts, dtype=object))[0]
    return {
        "diagnosis": float((probabilities.argmax(axis=1)[named] == labels[named]).mean()),
        "retrieval": retrieval.expected_recall(similarity, codes, k) if k <= len(texts) else None,
    }


def summary(
    retrieved: Mapping[str, Any], diagnosed: Mapping[str, Any] | None, trivial: Mapping[str, Any], patients: int
) -> tuple[dict[str, Any], dict[str, str]]:
    """(headline metrics, {headline that does not exist here: why}).

    Args:
        retrieved: of `retrieval.retrieval_scores`.
        diagnosed: of `class_scores`, with the accuracy of the `most_frequent` class of the test side, and of
            `most_frequent_in_training`; None without classes.
        trivial: of `trivial_scores`; empty without classes.
        patients: of the test side, which intervals resample.
    """
    made, left_out = {}, {}
    one = retrieved.get("mean", {}).get(HEADLINE_K)
    if one is None:
        left_out["retrieval_r5"] = f"recall at {HEADLINE_K} was not asked for, or there are fewer test slides"
    elif one["ci95"] is None:
        left_out["retrieval_r5"] = one["reason"]
    else:
        parts = {name: retrieved[name]["recall"][HEADLINE_K]["value"] for name in ("image_to_text", "text_to_image")}
        made["retrieval_r5"] = (
            one
            | {"groups": patients, "grouped_by": "patient", "about": "mean of both ways"}
            | {"trivial": trivial.get("retrieval"), **parts}
        )
    if diagnosed is None:
        left_out["caption_diagnosis_accuracy"] = "no classes are set (coca.evaluate.classes)"
    elif diagnosed["accuracy"]["ci95"] is None:
        left_out["caption_diagnosis_accuracy"] = ONE_PATIENT
    else:
        one = diagnosed["accuracy"]
        made["caption_diagnosis_accuracy"] = one | {
            "baseline": diagnosed["most_frequent"],
            "baseline_kind": "most_frequent",
            "groups": diagnosed["n_groups"],
            "grouped_by": "patient",
            "trivial": trivial["diagnosis"],
            "most_frequent_in_training": diagnosed["most_frequent_in_training"],
            "no_answer": int(sum(diagnosed["unanswered"])),
        }
    return made, left_out
