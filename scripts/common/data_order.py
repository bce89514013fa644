"""The order of training items: a pure function of seed and epoch, so that a resumed run sees the same."""

import hashlib
from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from scripts.common.errors import KilnError


def epoch_order(items: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of 0..items-1 (int64), the same on every machine and for any number of processes."""
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(items)


def item_seed(seed: int, epoch: int, index: int) -> int:
    """A 63-bit seed for the augmentation of one item in one epoch, whichever process draws it."""
    return int.from_bytes(hashlib.sha256(f"{seed} {epoch} {index}".encode()).digest()[:8]) >> 1


class EpochBatches(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, index) of one process: its slice of each global batch, from a given batch on.

    Args:
        items: size of the data set.
        batch_size: images per global batch; an epoch's last, smaller batch is dropped unless it is the only one.
        rank, ranks: process and number of processes; ranks divides batch_size.
        start: first global batch of this epoch to give out.

    Raises:
        KilnError: batches that the processes cannot share evenly, or fewer items than processes.
    """

    def __init__(
        self, items: int, batch_size: int, seed: int, epoch: int, rank: int = 0, ranks: int = 1, start: int = 0
    ):
        if batch_size % ranks:
            raise KilnError(f"batch_size {batch_size} over {ranks} processes", f"set it to a multiple of {ranks}")
        if items < ranks:
            raise KilnError(f"{items} training items for {ranks} processes", "add data, or use fewer processes")
        self.order = epoch_order(items, seed, epoch)
        self.batch_size, self.epoch, self.start = batch_size, epoch, start
        self.rank, self.ranks = rank, ranks

    def total(self) -> int:
        """Global batches in a whole epoch."""
        return max(1, len(self.order) // self.batch_size)

    def __len__(self) -> int:
        return self.total() - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for number in range(self.start, self.total()):
            batch = self.order[number * self.batch_size : (number + 1) * self.batch_size]
            yield [(self.epoch, int(index)) for index in batch[self.rank :: self.ranks]]
