"""What one can answer without a model: the most frequent answer of train, and a regression on trivial features."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from scripts.common import trivial
from scripts.common.errors import KilnError
from scripts.common.images import ImageError
from scripts.vase.answers import canonical
from scripts.vase.vqa_rows import VqaRow

MOST_ANSWERS = 50  # rarer answers gain a regression nothing, and free text has thousands of them
MOST_ROWS = 2000  # of a dimension: six features need no more


def in_one_spelling(references: Sequence[str], dimension: str, synonyms: Mapping[str, str] = {}) -> list[str]:
    """References that mean the same in their most frequent spelling; of equally frequent ones the first."""
    normal = [canonical(text, dimension, synonyms) for text in references]
    spellings: dict[str, Counter[str]] = {}
    for key, text in zip(normal, references, strict=True):
        spellings.setdefault(key, Counter())[text] += 1
    chosen = {key: _most_frequent(found) for key, found in spellings.items()}
    return [chosen[key] for key in normal]


def _most_frequent(counts: Counter[str]) -> str:
    return min(counts, key=lambda text: (-counts[text], text))


def majority_answers(train: Sequence[VqaRow], synonyms: Mapping[str, str] = {}) -> dict[str, str]:
    """{dimension: its most frequent answer in `train`}; of equally frequent ones the first by name."""
    kinds = sorted({row.dimension for row in train})
    references = {name: [row.reference for row in train if row.dimension == name] for name in kinds}
    return {name: _most_frequent(Counter(in_one_spelling(found, name, synonyms))) for name, found in references.items()}


def trivial_answers(
    images: Path, train: Sequence[VqaRow], test: Sequence[VqaRow], synonyms: Mapping[str, str] = {}
) -> dict[str, str]:
    """{id of a test row: answer} by logistic regression on the features of `trivial` of the row's first picture.

    A regression per dimension, on at most `MOST_ROWS` rows with one of the `MOST_ANSWERS` most frequent answers. Rows
    of a dimension that train lacks have no answer.

    Raises:
        KilnError: an image is missing or unreadable.
    """
    features = Features(images)
    answers: dict[str, str] = {}
    for dimension in sorted({row.dimension for row in test}):
        asked = [row for row in test if row.dimension == dimension]
        taught = [row for row in train if row.dimension == dimension]
        references = in_one_spelling([row.reference for row in taught], dimension, synonyms)
        known = list(zip(taught, references, strict=True))
        frequent = {text for text, _ in Counter(sorted(text for _, text in known)).most_common(MOST_ANSWERS)}
        known = [one for one in known if one[1] in frequent]
        if not known:
            continue
        known = known[:: -(-len(known) // MOST_ROWS)]
        labels = np.array([text for _, text in known])
        if len(set(labels)) == 1:
            answers |= {row.id: str(labels[0]) for row in asked}
            continue
        regression = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
        regression.fit(features.of([row for row, _ in known]), labels)
        predicted = regression.predict(features.of(asked))
        answers |= {row.id: str(text) for row, text in zip(asked, predicted, strict=True)}
    return answers


class Features:
    """Trivial features of rows' first pictures, each read once."""

    def __init__(self, images: Path):
        self.images = images
        self.known: dict[str, np.ndarray] = {}

    def of(self, rows: Sequence[VqaRow]) -> np.ndarray:
        """[N, 6] float64; see `trivial.image_features`."""
        return np.stack([self._one(row.images[0]) for row in rows])

    def _one(self, path: str) -> np.ndarray:
        if path not in self.known:
            try:
                self.known[path] = trivial.image_features([self.images / path])[0]
            except (ImageError, FileNotFoundError) as error:
                raise KilnError(
                    f"{self.images / path}: readable when it was listed, now: {error}", "check --images, or list anew"
                ) from None
        return self.known[path]
