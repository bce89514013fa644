"""Pairs of a slide and its text, as training reads them: tiles by a seeded draw, or stored latents, and token ids."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import pandas as pd
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from scripts.coca.latents import Latents
from scripts.coca.slides import SlideFile, iterate_tiles, open_listed, read_tiles
from scripts.coca.texts import Texts
from scripts.common.artefacts import sha256_text
from scripts.common.data_order import item_seed
from scripts.common.errors import KilnError


class Pair(NamedTuple):
    """A slide's image tokens [n,D] as stored, and its text's ids [l] int64."""

    tiles: torch.Tensor
    ids: torch.Tensor


class Batch(NamedTuple):
    """Pairs padded to the longest of them.

    Attributes:
        tiles: [B,N,D] as stored, zeros where there is none.
        mask: bool [B,N], true where there is one.
        ids: int64 [B,L], `pad_id` where there is none.
    """

    tiles: torch.Tensor
    mask: torch.Tensor
    ids: torch.Tensor

    def to(self, device: torch.device) -> "Batch":
        """The same on another device."""
        return Batch(*(one.to(device, non_blocking=True) for one in self))


class Images(Protocol):
    """What gives the image tokens of each pair of a table."""

    sizes: np.ndarray
    dim: int

    def read(self, index: int, epoch: int) -> np.ndarray: ...


class TileDraws:
    """Tiles of the slides of a table: all, or a draw that depends on seed, epoch and index alone.

    Args:
        folder: of slides.
        table: rows of the manifest, with path, tiles, dim and key.
        limit: tiles of a draw; None: all.
    """

    def __init__(self, folder: Path, table: pd.DataFrame, limit: int | None, seed: int):
        self.folder, self.limit, self.seed = folder, limit, seed
        self.paths, self.keys = table["path"].to_list(), table["key"].to_list()
        self.tiles = table["tiles"].to_numpy(np.int64)
        self.dim = int(table["dim"].iloc[0])
        self._opened: dict[int, SlideFile] = {}  # looked at once; each read checks that nothing changed
        self.sizes = self.tiles if limit is None else np.minimum(self.tiles, limit)

    def read(self, index: int, epoch: int) -> np.ndarray:
        """[n,dim] in the slide's order, as stored.

        Raises:
            KilnError: the slide is no longer what it was when it was listed.
        """
        tiles = int(self.tiles[index])
        if index not in self._opened:
            self._opened[index] = open_listed(self.folder / self.paths[index], self.keys[index], tiles, self.dim)
        slide = self._opened[index]
        if self.limit is None or tiles <= self.limit:
            return read_tiles(slide)
        generator = np.random.Generator(np.random.Philox(key=item_seed(self.seed, epoch, index)))
        rows = np.sort(generator.choice(tiles, self.limit, replace=False))
        parts, start = [], 0
        for slab in iterate_tiles(slide):
            parts.append(slab[rows[(rows >= start) & (rows < start + len(slab))] - start])
            start += len(slab)
        return np.concatenate(parts)


class StoredLatents:
    """Latents of the slides of a table, by the frozen slide encoder, without the one that stands for the slide.

    Args:
        folder: of rule coca_encode_slides.
        dim: width that the model expects.

    Raises:
        KilnError: a slide has none, or they are of another width.
    """

    def __init__(self, folder: Path, table: pd.DataFrame, dim: int):
        self.slides, self.dim = table["slide"].to_list(), dim
        self.latents = Latents(folder, dim, self.slides)
        self.sizes = np.full(len(self.slides), self.latents.latents, np.int64)

    def read(self, index: int, epoch: int) -> np.ndarray:
        """[latents,dim], the same in every epoch."""
        return np.array(self.latents.get(self.slides[index])[1:])


class Pairs(Dataset):
    """(epoch, index) -> `Pair`, of one side.

    Args:
        images: `TileDraws` or `StoredLatents` of `table`.
        table: rows with text, in the order of `images`.
        max_seq_len: tokens of a text with its marks.

    Attributes:
        codes: int64 [n]; equal texts have equal codes.
        cut: how many texts were too long.
    """

    def __init__(self, images: Images, table: pd.DataFrame, texts: Texts, max_seq_len: int):
        self.images, self.names = images, table["slide"].to_list()
        encoded = [texts.encode(text, max_seq_len) for text in table["text"]]
        self.ids = [np.asarray(ids, np.int64) for ids, _ in encoded]
        self.cut = sum(cut for _, cut in encoded)
        self.tokens = np.asarray([len(ids) for ids in self.ids], np.int64)
        self.codes = np.unique([sha256_text(text) for text in table["text"]], return_inverse=True)[1]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, key: tuple[int, int]) -> Pair | KilnError:
        epoch, index = key
        try:
            tiles = self.images.read(index, epoch)
        except KilnError as error:
            return error
        return Pair(torch.from_numpy(tiles), torch.from_numpy(self.ids[index]))


class Collate:
    """Pairs to a `Batch`, or the first error among them."""

    def __init__(self, pad_id: int):
        self.pad_id = pad_id

    def __call__(self, items: Sequence[Pair | KilnError]) -> Batch | KilnError:
        for item in items:
            if isinstance(item, KilnError):
                return item
        mask = pad_sequence([torch.ones(len(item.tiles), dtype=torch.bool) for item in items], batch_first=True)
        return Batch(
            pad_sequence([item.tiles for item in items], batch_first=True),
            mask,
            pad_sequence([item.ids for item in items], batch_first=True, padding_value=self.pad_id),
        )
