"""What needs no model: features, and the loss of a guess. A task is worth what a model adds to them."""

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from pathlib import Path

import numpy as np

from scripts.common.errors import KilnError
from scripts.common.images import open_rgb

GUESS = "a guess: tokens by frequency"  # label of `guess_loss` in a plot
NAMES = ("red", "green", "blue", "width", "height", "kilobytes")


def image_features(sources: Sequence[Path | bytes], max_pixels: int = 2**62) -> np.ndarray:
    """Mean colour (0-255), size in pixels and file size of image files, or of their bytes, as [N,6] float64."""
    rows = []
    for source in sources:
        image = open_rgb(source, max_pixels)
        size = len(source) if isinstance(source, bytes) else source.stat().st_size
        rows.append([*np.asarray(image).mean(axis=(0, 1)), *image.size, size / 1000])
    return np.array(rows, dtype=np.float64).reshape(-1, len(NAMES))


def guess_loss(kinds: Sequence[Hashable], answers: Sequence[Sequence[Hashable]]) -> float:
    """Loss per token, in nats, of guessing answers token by token by how often each stands at its place.

    -sum ln p(token | kind of question, place in the answer) / number of tokens, with the frequencies p of these
    answers: what is known without image, words of the question and tokens before. No other p has less on them (Gibbs'
    inequality; Cover and Thomas, Elements of Information Theory, 2.6).

    Args:
        kinds: of the question that each answer belongs to.
        answers: tokens of each answer, those that end it included.

    Raises:
        KilnError: no tokens, or not one kind for each answer.
    """
    total = sum(map(len, answers))
    if len(kinds) != len(answers) or not total:
        raise KilnError(f"{len(kinds)} kinds, {len(answers)} answers, {total} tokens", "give a kind for each answer")
    told: Counter = Counter()
    for kind, answer in zip(kinds, answers, strict=True):
        told.update((kind, place, token) for place, token in enumerate(answer))
    asked: Counter = Counter()
    for (kind, place, _), count in told.items():
        asked[kind, place] += count
    return -sum(count * math.log(count / asked[kind, place]) for (kind, place, _), count in told.items()) / total
