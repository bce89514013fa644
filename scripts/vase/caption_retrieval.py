"""How well CLIP finds the right picture, or the right caption, by a caption that a model wrote."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from scripts.common import retrieval
from scripts.vase import clip
from scripts.vase.embed_images import embed
from scripts.vase.settings import ClipSettings
from scripts.vase.vqa_rows import VqaRow
from scripts.vase.vqa_scores import entry


class CaptionRetrieval:
    """Pictures and true captions of `rows`, embedded once, to be found by captions of several models.

    Args:
        rows: caption rows; the first picture of each counts.
        folder: of the images.
        model: folder of the CLIP model.
        ks: cut-offs; those above the number of candidates are left out, and named.

    Raises:
        KilnError: the model or an image cannot be read.
    """

    def __init__(
        self, rows: Sequence[VqaRow], folder: Path, model: Path, values: ClipSettings, ks: Sequence[int], seed: int,
        accelerator,
    ):  # fmt: skip
        self.ks, self.seed, self.accelerator, self.batch_size = ks, seed, accelerator, values.batch_size
        self.loaded = clip.load(model)
        self.vases = np.array([row.vase for row in rows])
        self.references = [row.reference for row in rows]
        shown = {row.images[0]: row.vase for row in rows}
        self.images = embed(self.loaded, [folder / path for path in shown], values, accelerator)
        self.vases_of_images = np.array(list(shown.values()))
        self.captions = self.embed_texts(self.references)

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Unit-length embeddings [N, D] float32; CLIP reads the first 77 tokens."""
        model = self.loaded.model.to(self.accelerator.device)
        made = []
        for start in range(0, len(texts), self.batch_size):
            tokens = self.loaded.tokenizer(list(texts[start : start + self.batch_size])).to(self.accelerator.device)
            with self.accelerator.autocast():
                features = model.encode_text(tokens)
            made.append(torch.nn.functional.normalize(features.float(), dim=1).cpu().numpy())
        return np.concatenate(made)

    def scores(self, captions: Sequence[str]) -> dict[str, Any]:
        """Scores of generated `captions`, one for each row.

        `image` finds a row's picture, any picture of the vase being right; `caption` finds the true caption among all
        rows' (the published protocol; equal captions are all right). `caption_similarity` is the mean cosine of a
        caption and its true one.
        """
        made = self.embed_texts(captions)
        _, codes = np.unique(self.references, return_inverse=True)
        cosines = (made * self.captions).sum(1)
        return {
            "caption_similarity": entry(cosines, self.vases, self.seed),
            "image": self._both_ways(made @ self.images.T, self.vases, self.vases_of_images, self.vases_of_images),
            "caption": self._both_ways(made @ self.captions.T, codes, codes, self.vases),
        }

    def _both_ways(self, similarity: np.ndarray, rows, columns, vases_of_columns) -> dict[str, Any]:
        """Scores from and to the generated captions; `rows` and `columns` say what belongs together."""
        fitting = [k for k in self.ks if k <= min(similarity.shape)]
        found: dict[str, Any] = {"candidates": list(similarity.shape)[::-1]}
        if len(fitting) < len(self.ks):
            out = [k for k in self.ks if k not in fitting]
            found["left_out"] = {"ks": out, "reason": f"more than {min(similarity.shape)} candidates"}
        if not fitting:
            return found
        both = retrieval.recall_at_k(similarity, fitting, (rows, columns))
        sides = {"from_generated": ("row_to_column", self.vases), "to_generated": ("column_to_row", vases_of_columns)}
        for name, (key, vases) in sides.items():
            one = both[key]
            found[name] = {
                "n": one["n"],
                "recall": {k: entry(one["ranks"] <= k, vases, self.seed) for k in fitting},
                "chance": one["chance"],
                "median_rank": one["median_rank"],
            }
        return found
