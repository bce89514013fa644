"""The reward of an answer: R = sum of w_i r_i over the six dimensions, minus a penalty P, plus a bonus B.

VaseVQA-3D's paper gives this form and no more; its code, weights, P and B were never published. What is ours:

- A question for one dimension gives that one all the weight. A caption is scored on each dimension that is known of
  the vase, with the weights brought to a sum of 1; with nothing known, on its words against the published caption.
- r_i is `answers.similarity`. In a caption a value is looked for anywhere: canonical terms as whole words (fabric,
  technique, shape), the first date, the share of the decoration's words, the part most like the attribution.
- P is taken off once: for naming a rival of the true value (closed dimensions), or for saying the same again and again.
- B is added when every dimension that is asked for is exactly right, and nothing is penalised.

The format is a reward of its own beside R.
"""

import json
import re
from collections.abc import Mapping
from typing import NamedTuple

from scripts.vase import answers
from scripts.vase.settings import CAPTION, DIMENSIONS, RewardSettings

CLOSED = ("fabric", "technique", "shape")
_REPEATS = 3  # the same words so often in a row are a stutter
_LONGEST_REPEAT = 8  # words
_THINK_ANSWER = re.compile(r"\s*<think>(?P<think>.*?)</think>\s*<answer>(?P<answer>.*?)</answer>\s*", re.DOTALL)
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_TAG = re.compile(r"</?(?:think|answer)>")


class Scored(NamedTuple):
    """A content reward and what it is made of.

    Attributes:
        value: base - penalty + bonus.
        base: sum of w_i r_i, from 0 to 1.
        parts: {dimension: r_i}.
        penalty, bonus: what was taken off, what was added.
    """

    value: float
    base: float
    parts: dict[str, float]
    penalty: float
    bonus: float


class Reward:
    """The reward that settings describe. No method raises on any text; long ones are cut to `MOST_CHARACTERS`."""

    def __init__(self, values: RewardSettings):
        self.settings = values

    def extract(self, text: str) -> str:
        """What is answered: within the answer tags where the format has them and the text too, else all of it."""
        if self.settings.format == "think_answer":
            found = _ANSWER.search(text)
            text = found[1] if found else text
        return text.strip()

    def format(self, text: str) -> float:
        """1 for a text of the right form with at most `max_words` words to the answer, else 0."""
        if self.settings.format == "think_answer":
            found = _THINK_ANSWER.fullmatch(text)
            if not found or _TAG.search(found["think"] + found["answer"]):
                return 0.0
            answer = found["answer"]
        else:
            answer = text.strip()
            if "\n" in answer or _TAG.search(answer):
                return 0.0
        count = len(answers.words(answer))
        return float(0 < count <= self.settings.max_words and len(answer) <= answers.MOST_CHARACTERS)

    def content(
        self, text: str, reference: str, dimension: str, facts: Mapping[str, str] | str | None = None
    ) -> Scored:
        """R of a completion.

        Args:
            text: the completion, tags and all.
            reference: the true answer.
            dimension: one of `DIMENSIONS`, or `CAPTION`.
            facts: {dimension: true value} of the vase, as a mapping or JSON; for captions.
        """
        answer = self.extract(text)[: answers.MOST_CHARACTERS]
        if dimension == CAPTION:
            return self._caption(answer, reference, _known(facts))
        extra = self.settings.synonyms
        r = answers.similarity(answer, reference, dimension, extra)
        rival = dimension in CLOSED and bool(self._named(answer, dimension) - {self._canonical(reference, dimension)})
        return self._total({dimension: r}, {dimension: 1.0}, rival or stutters(answer))

    def _caption(self, answer: str, reference: str, facts: Mapping[str, str]) -> Scored:
        if not facts:
            return self._total({CAPTION: answers.token_f1(answer, reference)}, {CAPTION: 1.0}, stutters(answer))
        weights = {name: self.settings.weights.get(name, 0.0) for name in facts}
        if not sum(weights.values()):
            weights = dict.fromkeys(facts, 1.0)
        parts, rival = {}, False
        for name, value in facts.items():
            if name in CLOSED:
                true, named = self._canonical(value, name), self._named(answer, name)
                parts[name] = float(true in named or _stands_in(true, answers.normalise(answer)))
                rival |= bool(named - {true})
            elif name == "dating":
                parts[name] = answers.range_overlap(answer, value)
            elif name == "decoration":
                wanted, said = answers.words(value), set(answers.words(answer))
                parts[name] = sum(word in said for word in wanted) / len(wanted) if wanted else 1.0
            else:
                parts[name] = answers.partial_similarity(answer, value)
        return self._total(parts, weights, rival or stutters(answer))

    def _total(self, parts: dict[str, float], weights: Mapping[str, float], punished: bool) -> Scored:
        total = sum(weights.values())
        base = min(1.0, sum(weights[name] / total * r for name, r in parts.items()))
        penalty = self.settings.penalty if punished else 0.0
        bonus = self.settings.bonus if not punished and all(r == 1 for r in parts.values()) else 0.0
        return Scored(base - penalty + bonus, base, parts, penalty, bonus)

    def _canonical(self, value: str, dimension: str) -> str:
        return answers.canonical(value, dimension, self.settings.synonyms)

    def _named(self, answer: str, dimension: str) -> set[str]:
        """Canonical values of a closed dimension that a text names, longer spellings before those within them."""
        left, named = answers.normalise(answer), set()
        known = answers.spellings(dimension, self.settings.synonyms)
        for spelling in sorted(known, key=len, reverse=True):
            if spelling in left:
                taken = re.sub(rf"(?<!\w){re.escape(spelling)}(?!\w)", " \0 ", left)
                if taken != left:
                    left = taken
                    named.add(known[spelling])
        return named


def _stands_in(term: str, text: str) -> bool:
    return bool(term) and re.search(rf"(?<!\w){re.escape(term)}(?!\w)", text) is not None


def _known(facts: Mapping[str, str] | str | None) -> dict[str, str]:
    found = json.loads(facts) if isinstance(facts, str) and facts else facts or {}
    return {name: str(found[name]) for name in DIMENSIONS if name in found}


def stutters(text: str) -> bool:
    """Whether some words stand three times in a row."""
    said = answers.words(text)
    for size in range(1, _LONGEST_REPEAT + 1):
        run = 0
        for i in range(size, len(said)):
            run = run + 1 if said[i] == said[i - size] else 0
            if run == (_REPEATS - 1) * size:
                return True
    return False
