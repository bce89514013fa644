"""Image files as batches of one fixed size, so that a result does not depend on its neighbours' number."""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from scripts.common import progress
from scripts.common.errors import KilnError
from scripts.common.listed_images import collate, open_listed, unwrapped


class ImageFiles(Dataset):
    """index -> transformed image, or a KilnError as an item; see `listed_images`."""

    def __init__(
        self,
        paths: Sequence[Path],
        transform: Callable[[Image.Image], torch.Tensor],
        at_least: int | None,
        hashes: Sequence[str] | None = None,
    ):
        self.paths, self.transform, self.at_least = paths, transform, at_least
        self.hashes = hashes or [None] * len(paths)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor | KilnError:
        try:
            return self.transform(open_listed(self.paths[index], self.at_least, self.hashes[index]))
        except KilnError as error:
            return error


def batches(
    paths: Sequence[Path],
    transform: Callable[[Image.Image], torch.Tensor],
    batch_size: int,
    workers: int,
    device: torch.device,
    at_least: int | None = None,
    name: str = "images",
    hashes: Sequence[str] | None = None,
) -> Iterator[tuple[torch.Tensor, int]]:
    """([batch_size,3,H,W] float32 on `device`, channels_last, how many of its rows count), in the order of `paths`.

    The last batch is filled up with copies of its last image: matrix kernels pick their order of
    summation by batch size, so a row's last digits would otherwise depend on the file count.

    Args:
        hashes: sha256 of each file as it was listed; None: not checked.

    Raises:
        KilnError: a file is gone, no longer readable, or not of its hash.
    """
    data = ImageFiles(paths, transform, at_least, hashes)
    workers = min(workers, len(os.sched_getaffinity(0)))  # more would only take turns
    pin = device.type == "cuda"
    loader = DataLoader(data, batch_size=batch_size, num_workers=workers, pin_memory=pin, collate_fn=collate)
    for images in progress.bar(loader, f"{name} (batches of {batch_size})"):
        real = len(unwrapped(images))
        if real < batch_size:
            images = torch.cat([images, images[-1:].expand(batch_size - real, -1, -1, -1)])
        yield images.to(device, non_blocking=True, memory_format=torch.channels_last), real
