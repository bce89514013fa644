"""The reward of an answer about a vase: R = sum of w_i r_i - P + B.

The paper gives this form only. Weights, P, B, what they are given for, and every r_i are ours: see `Reward`.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

from rapidfuzz import fuzz

from scripts.common.errors import KilnError
from scripts.vase import answers
from scripts.vase.settings import CAPTION, DIMENSIONS, RewardSettings

MAX_CHARACTERS = 4000  # of an answer; the rest of a longer one is not looked at
MAX_PERIOD = 50  # words of the longest sequence whose repetition is seen
REPEATS = 3  # as often in a row is "again and again"
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
_THINK_ANSWER = re.compile(r"\s*<think>[^\0]*</think>\s*<answer>(?P<answer>[^\0]*)</answer>\s*")
_TAG = re.compile(r"</?[a-zA-Z][^<>]*>")


class Scored(NamedTuple):
    """A reward and its parts.

    Attributes:
        value: base - penalty + bonus.
        base: sum of w_i r_i over the dimensions asked for, in [0, 1].
        parts: {dimension: r_i in [0, 1]} of those that have a weight.
        penalty: P or 0.
        bonus: B or 0.
    """

    value: float
    base: float
    parts: dict[str, float]
    penalty: float
    bonus: float


class Reward:
    """R as `settings` say. Where the paper is silent:

    - A question for one dimension gives it all the weight, whatever `weights` says. A caption is scored on every
      dimension that `facts` knows, weights brought to a sum of 1; if none has a weight, it is compared with the
      reference by F1 of words.
    - r_i of a question: `answers.similarity`. r_i in a caption: fabric, technique, shape: 1 / (number of terms named)
      if the true one is among them, so that naming all gains little; dating: overlap with the first date; decoration:
      the best F1 of words over all stretches as long as the truth; attribution: best partial edit similarity.
    - P is taken once if the answer names a rival, a term of the vocabulary of a closed dimension asked for that neither
      is true nor stands in the reference, or if a sequence of at most `MAX_PERIOD` words stands `REPEATS` times in a
      row. A plain wrong answer names a rival, too: a guess pays from a chance of P / (1 + B + P) of being right.
    - B is added once when every r_i is 1.
    """

    def __init__(self, settings: RewardSettings):
        self.settings = settings

    def content(
        self, text: str, reference: str, dimension: str, facts: Mapping[str, str] | str | None = None
    ) -> Scored:  # fmt: skip
        """The reward of a raw completion, of which `MAX_CHARACTERS` of the answer are looked at.

        Args:
            facts: {dimension: true value}, or the same as JSON; nothing where nothing is known. For captions.

        Raises:
            KilnError: `dimension` or `facts` is none. No `text` is refused.
        """
        answer = self.extract(text)[:MAX_CHARACTERS]
        if dimension == CAPTION:
            parts, truth = self._caption(answer, reference, _read(facts))
        elif dimension in DIMENSIONS:
            parts = {dimension: answers.similarity(answer, reference, dimension, self.settings.synonyms)}
            truth = {dimension: reference}
        else:
            raise KilnError(
                f"dimension {dimension!r} is unknown; these are {', '.join((*DIMENSIONS, CAPTION))}",
                "make the rows by rule vase_build_dataset",
            )
        weights = {name: self.settings.weights.get(name, 0.0) for name in parts} if len(parts) > 1 else {}
        total = sum(weights[name] for name in sorted(weights))
        # in one order, whatever that of the facts; rounding must not leave [0, 1]
        base = sum(weights[name] * parts[name] for name in sorted(weights)) / total if weights else sum(parts.values())
        base = min(1.0, base)
        bad = repeats(answer) or any(self._rivals(answer, reference, name, truth[name]) for name in truth)
        penalty = self.settings.penalty if bad else 0.0
        bonus = self.settings.bonus if all(value == 1 for value in parts.values()) else 0.0
        return Scored(base - penalty + bonus, base, parts, penalty, bonus)

    def _caption(self, text: str, reference: str, facts: Mapping[str, str]) -> tuple[dict[str, float], dict[str, str]]:
        truth = {name: facts[name] for name in DIMENSIONS if facts.get(name) and self.settings.weights.get(name)}
        if not truth:
            return {CAPTION: answers.token_f1(text, reference)}, {}
        return {name: self._within(text, reference, name, value) for name, value in truth.items()}, truth

    def _within(self, text: str, reference: str, dimension: str, truth: str) -> float:
        """r_i in [0, 1] of one dimension in a caption."""
        synonyms = self.settings.synonyms
        if dimension == "dating" and (dates := answers.date_range(truth)):
            return answers.range_overlap(text, dates)
        if dimension == "decoration":
            return best_stretch(answers.words(text), answers.words(answers.canonical(truth, dimension, synonyms)))
        if dimension == "attribution":
            return partial(answers.normalise(text), answers.canonical(truth, dimension, synonyms))
        true = answers.canonical(truth, dimension, synonyms)
        if true not in answers.named(text, dimension, synonyms, [truth]):
            return 0.0
        return 1 / (1 + len(self._rivals(text, reference, dimension, truth)))

    def _rivals(self, text: str, reference: str, dimension: str, truth: str) -> set[str]:
        """Terms of a closed dimension in `text` that are neither true nor in the reference."""
        if dimension not in answers.CLOSED:
            return set()
        synonyms = self.settings.synonyms
        found = answers.named(text, dimension, synonyms, [truth])
        right = answers.named(f"{reference} ; {truth}", dimension, synonyms, [truth])
        return found - right - {answers.canonical(truth, dimension, synonyms)}

    def format(self, text: str) -> float:
        """How well a completion keeps the format, in [0, 1].

        think_answer: 1/8 for each of the four tags that stands there exactly once, and 1/2 if they make up the whole:
        one <think>..</think>, then one <answer>..</answer> of one word or more, at most `max_words`, nothing around.
        plain: 1 for one line that is not empty, of at most `max_words` words, without tags, else 0.
        """
        if self.settings.format == "plain":
            line = text.strip()
            return float(len(line.splitlines()) == 1 and not _TAG.search(line) and self._brief(line))
        counts = [text.count(tag) for tag in TAGS]
        whole = _THINK_ANSWER.fullmatch(text.replace("\0", " ")) if counts == [1, 1, 1, 1] else None
        good = whole is not None and bool(whole["answer"].strip()) and self._brief(whole["answer"])
        return counts.count(1) / 8 + good / 2

    def _brief(self, text: str) -> bool:
        return len(answers.words(text)) <= self.settings.max_words

    def extract(self, text: str) -> str:
        """The answer in a completion, free of outer whitespace.

        think_answer: what stands in the last <answer>, up to its end tag or the end; without such a tag, all.
        """
        if self.settings.format == "plain":
            return text.strip()
        _, tag, answer = text.rpartition("<answer>")
        return (answer.partition("</answer>")[0] if tag else text).strip()


def _read(facts: Mapping[str, str] | str | None) -> Mapping[str, str]:
    try:
        found = json.loads(facts) if isinstance(facts, str) and facts else facts or {}
    except ValueError:
        found = None
    if not isinstance(found, Mapping) or not all(isinstance(value, str) for value in found.values()):
        raise KilnError(
            f"facts {str(facts)[:80]!r}: expected an object of texts, dimension: value",
            "make the rows by rule vase_build_dataset",
        )
    return found


def repeats(text: str) -> bool:
    """Whether a sequence of at most `MAX_PERIOD` words stands `REPEATS` times in a row."""
    found = answers.words(text)
    for period in range(1, min(MAX_PERIOD, len(found) // REPEATS) + 1):
        run = 0
        for one, next_one in zip(found, found[period:], strict=False):
            run = run + 1 if one == next_one else 0
            if run == period * (REPEATS - 1):
                return True
    return False


def best_stretch(found: list[str], wanted: list[str]) -> float:
    """The best F1 of words over all stretches of `found` as long as `wanted`, in [0, 1]; of all where it is shorter."""
    if not found or not wanted:
        return 0.0
    need, window = Counter(wanted), Counter(found[: len(wanted)])
    common = best = (need & window).total()
    for old, new in zip(found, found[len(wanted) :], strict=False):
        window[old] -= 1
        common -= window[old] < need[old]
        common += window[new] < need[new]
        window[new] += 1
        best = max(best, common)
    return 2 * best / (min(len(found), len(wanted)) + len(wanted))


def partial(text: str, wanted: str) -> float:
    """Similarity of `wanted` and the stretch of `text` that is most like it, in [0, 1] (rapidfuzz, partial_ratio).

    A text shorter than `wanted` is compared as a whole: else a single letter would be as good as a name.
    """
    if not text or not wanted:
        return 0.0
    return (fuzz.ratio if len(text) < len(wanted) else fuzz.partial_ratio)(wanted, text) / 100
