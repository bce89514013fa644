"""Centre crops of a split's pictures, in batches, and sheets of pictures beside their reconstructions."""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

from scripts.common import sheets
from scripts.common.listed_images import collate, unwrapped
from scripts.rae import arrow, crops, quality

COLUMNS = 8


class CentreCrop:
    """PIL picture -> uint8 [3,size,size], by ADM's centre crop; picklable, for loader processes."""

    def __init__(self, size: int):
        self.size = size

    def __call__(self, image) -> torch.Tensor:
        return torch.from_numpy(np.array(crops.center_crop_arr(image, self.size))).permute(2, 0, 1).contiguous()


def batches(pictures: arrow.Pictures, rows: Sequence[int], batch_size: int, workers: int) -> Iterator[torch.Tensor]:
    """Pictures of `rows`, in order, as `pictures` transforms them, [B,3,S,S]."""
    (one,) = batches_of_parts(pictures, [rows], batch_size, workers)
    yield from one


def batches_of_parts(
    pictures: arrow.Pictures, parts: Sequence[Sequence[int]], batch_size: int, workers: int
) -> Iterator[Iterator[torch.Tensor]]:
    """`batches` of each part in turn, by the same processes; take all of a part's before the next part."""
    cut = [[rows[start : start + batch_size] for start in range(0, len(rows), batch_size)] for rows in parts]
    batches = list(itertools.chain.from_iterable(cut))
    read = iter(DataLoader(pictures, batch_sampler=batches, num_workers=workers, collate_fn=collate))
    for own in cut:
        yield (unwrapped(batch)[0] for batch in itertools.islice(read, len(own)))


def draw_pairs(path: Path, images: torch.Tensor, made: torch.Tensor, names: Sequence[str], title: str) -> None:
    """A sheet of pictures with their file names, above their reconstructions with PSNR: uint8 [B,3,S,S] twice."""
    scores = quality.psnr(images, made)
    originals = [sheets.Tile(_image(one), Path(name).name) for one, name in zip(images, names, strict=True)]
    results = [sheets.Tile(_image(one), f"{score:.1f} dB") for one, score in zip(made, scores, strict=True)]
    lines = []
    for start in range(0, len(images), COLUMNS):
        part = slice(start, start + COLUMNS)
        lines += [("original", originals[part]), ("reconstruction", results[part])]
    sheets.contact_sheet(path, lines, title, columns=COLUMNS, caption_lines=1)


def _image(picture: torch.Tensor) -> Image.Image:
    return Image.fromarray(picture.permute(1, 2, 0).numpy())
