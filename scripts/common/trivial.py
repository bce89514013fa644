"""What needs no model: features, and the loss of who sees no image. A task is worth what a model adds to them."""

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from pathlib import Path

import numpy as np

from scripts.common.errors import KilnError
from scripts.common.images import open_rgb

BLIND = "answers known, image unseen"  # label of `blind_loss` in a plot
NAMES = ("red", "green", "blue", "width", "height", "kilobytes")


def image_features(sources: Sequence[Path | bytes], max_pixels: int = 2**62) -> np.ndarray:
    """Mean colour (0-255), size in pixels and file size of image files, or of their bytes, as [N,6] float64."""
    rows = []
    for source in sources:
        image = open_rgb(source, max_pixels)
        size = len(source) if isinstance(source, bytes) else source.stat().st_size
        rows.append([*np.asarray(image).mean(axis=(0, 1)), *image.size, size / 1000])
    return np.array(rows, dtype=np.float64).reshape(-1, len(NAMES))


def blind_loss(questions: Sequence[Hashable], answers: Sequence[Hashable], tokens: Sequence[int]) -> float:
    """Loss per answer token, in nats, of who knows how often each answer follows each question, but sees no image.

    -sum_i ln p(a_i | q_i) / sum_i t_i, with the frequencies p of these rows and t_i `tokens` in answer i: the
    conditional entropy of the answers (Cover and Thomas, Elements of Information Theory, 2.2), spread over their
    tokens. No predictor that ignores the images has less on these rows.

    Raises:
        KilnError: no tokens, or not one question and one number of tokens for each answer.
    """
    if not len(questions) == len(answers) == len(tokens) or sum(tokens) < 1:
        what = (
            f"{len(questions)} questions, {len(answers)} answers, {len(tokens)} numbers of tokens, {sum(tokens)} tokens"
        )
        raise KilnError(what, "give one question and its number of tokens for each answer")
    asked, told = Counter(questions), Counter(zip(questions, answers, strict=True))
    return -sum(count * math.log(count / asked[question]) for (question, _), count in told.items()) / sum(tokens)
