"""Latents of slides as rule `coca_encode_slides` stores them: plain .npy shards, read through memory maps."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from scripts.common import artefacts, tables
from scripts.common.errors import KilnError

AGAIN = "make them by rule coca_encode_slides"


def shard_name(number: int) -> str:
    """File name of a shard."""
    return f"s{number:05d}.npy"


class Latents:
    """The latents in a folder.

    Attributes:
        latents, dim, dtype: shape and type of what there is of each slide, [1 + latents, dim]; the first row is the
            slide's own vector.
        encoder_sha256: of the weights of the slide encoder that made them.

    Args:
        folder: of rule coca_encode_slides.
        dim: width that is expected; None: any.
        slides: that there must be.
        encoder_sha256: of the weights of the slide encoder that is expected; None: any.

    Raises:
        KilnError: no such folder, one that is damaged, latents of another width or encoder, or not of all `slides`.
    """

    def __init__(
        self, folder: Path, dim: int | None = None, slides: Sequence[str] = (), encoder_sha256: str | None = None
    ):
        self.folder = folder
        facts = artefacts.read_json(folder / "summary.json")
        try:
            self.latents, self.dim, self.dtype = int(facts["latents"]), int(facts["dim"]), str(facts["dtype"])
            self.encoder_sha256 = str(facts["encoder_sha256"])
        except (KeyError, TypeError, ValueError) as error:
            raise KilnError(f"{folder / 'summary.json'}: not of latents: {error!r}", AGAIN) from None
        if dim is not None and self.dim != dim:
            raise KilnError(
                f"{folder}: latents of width {self.dim}, expected {dim}",
                "encode the slides with the slide encoder of this model",
            )
        if encoder_sha256 is not None and self.encoder_sha256 != encoder_sha256:
            raise KilnError(
                f"{folder}: latents of slide encoder {self.encoder_sha256[:12]}, but the model has "
                f"{encoder_sha256[:12]}",
                "encode the slides with the slide encoder of this model: rule coca_encode_slides",
            )
        index = tables.read_table(folder / "index.parquet", ["slide", "shard", "row"])
        places = zip(index["shard"].tolist(), index["row"].tolist(), strict=True)
        self._places = dict(zip(index["slide"].tolist(), places, strict=True))
        self._maps: dict[int, np.ndarray] = {}
        for slide in slides:
            self.get(slide)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, slide: str) -> bool:
        return slide in self._places

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_maps": {}}  # a memory map would travel to a worker as a copy of all its file

    def get(self, slide: str) -> np.ndarray:
        """[1 + latents, dim] of a slide, read-only and memory-mapped.

        Raises:
            KilnError: the slide is not there, or its shard is missing, damaged, or of another shape.
        """
        if slide not in self._places:
            raise KilnError(f"{self.folder}: no latents of slide {slide} ({len(self)} others)", AGAIN)
        shard, row = self._places[slide]
        if shard not in self._maps:
            self._maps[shard] = self._open(self.folder / shard_name(shard))
        if row >= len(self._maps[shard]):
            raise KilnError(f"{self.folder / shard_name(shard)}: no row {row} (slide {slide})", AGAIN)
        return self._maps[shard][row]

    def batches(self, slides: Sequence[str], size: int) -> Iterator[torch.Tensor]:
        """Image tokens float32 [B, latents, dim] of slides, in order; the vector of the whole slide is none of them."""
        for start in range(0, len(slides), size):
            yield torch.from_numpy(np.stack([self.get(one)[1:] for one in slides[start : start + size]])).float()

    def _open(self, path: Path) -> np.ndarray:
        try:
            shard = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise KilnError(f"{path}: unreadable latents: {error}", AGAIN) from None
        expected = (1 + self.latents, self.dim)
        if shard.shape[1:] != expected or shard.dtype != self.dtype:
            raise KilnError(
                f"{path}: {shard.dtype} {list(shard.shape)}, expected {self.dtype} [n, {expected[0]}, {expected[1]}]",
                AGAIN,
            )
        return shard
