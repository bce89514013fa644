"""Which pairs train together: global batches of like lengths, and the passes that make up each.

All is a pure function of lengths, seed and epoch, so that every process knows every batch, and a resumed run sees
the same.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler

from scripts.common.errors import KilnError

POOL = (4, 64)  # batches among which pairs are ordered by length: few enough that neighbours change by epoch


class Lengths(NamedTuple):
    """Of each pair, int64 [n]: image tokens (tiles, or stored latents), and text tokens with their two marks."""

    tiles: np.ndarray
    tokens: np.ndarray


class Budget(NamedTuple):
    """Greatest padded size of a forward pass of one process: pairs times the longest of them."""

    tiles: int
    tokens: int


def check(lengths: Lengths, batch_size: int, budget: Budget, ranks: int, names: Sequence[str]) -> None:
    """Refuse what no batch can be made of.

    Args:
        names: of the slides, for messages.

    Raises:
        KilnError: processes that do not divide the batch, fewer pairs than a batch, a pair beyond the budget.
    """
    pairs = len(lengths.tiles)
    if batch_size % ranks:
        raise KilnError(
            f"coca.train.batch_size {batch_size} over {ranks} processes", f"set it to a multiple of {ranks}"
        )
    if pairs < batch_size:
        raise KilnError(
            f"{pairs} training pairs, fewer than coca.train.batch_size {batch_size}",
            f"set it to {pairs} or less, or give more slides",
        )
    least = pairs // count(pairs, batch_size)
    if least < ranks:
        raise KilnError(
            f"{pairs} training pairs in batches of at most {batch_size} leave one of {least} for {ranks} processes",
            "use fewer processes, or a larger coca.train.batch_size",
        )
    for what, key, sizes, most in (
        ("tiles", "max_tiles", lengths.tiles, budget.tiles),
        ("text tokens", "max_tokens", lengths.tokens, budget.tokens),
    ):
        longest = int(np.argmax(sizes))
        if sizes[longest] > most:
            raise KilnError(
                f"slide {names[longest]}: {sizes[longest]} {what}, more than coca.train.{key} {most}",
                f"raise coca.train.{key}, or lower coca.train."
                + ("tiles_per_slide" if key == "max_tiles" else "max_seq_len"),
            )


def count(pairs: int, batch_size: int) -> int:
    """Global batches of an epoch."""
    return -(-pairs // batch_size)


def epoch_batches(lengths: Lengths, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """The epoch's global batches, int64 indices of pairs; each pair is in one of them.

    Their sizes differ by one at most and none is larger than `batch_size`: no small rest, whose pairs would have few
    negatives. Pairs are shuffled, ordered by length within pools of neighbours, cut, and the batches shuffled.
    """
    pairs = len(lengths.tiles)
    generator = np.random.Generator(np.random.Philox(key=[seed, epoch]))
    order = generator.permutation(pairs)
    size = int(np.clip(pairs // 4, POOL[0] * batch_size, POOL[1] * batch_size))
    pools = [by_length(lengths, order[start : start + size]) for start in range(0, pairs, size)]
    # every other pool from long to short, so that a batch across two pools holds like lengths too
    ordered = np.concatenate([pool[::-1] if number % 2 else pool for number, pool in enumerate(pools)])
    cut = np.array_split(ordered, count(pairs, batch_size))
    return [cut[number] for number in generator.permutation(len(cut))]


def by_length(lengths: Lengths, members: np.ndarray) -> np.ndarray:
    """`members` ordered by tiles in steps of a quarter, then by tokens; equal ones keep their order."""
    bucket = np.searchsorted(_steps(int(lengths.tiles.max())), lengths.tiles[members])
    return members[np.lexsort((lengths.tokens[members], bucket))]


def _steps(longest: int) -> list[int]:
    steps = [1]
    while steps[-1] < longest:
        steps.append(max(steps[-1] + 1, steps[-1] * 5 // 4))
    return steps


def share(batch: np.ndarray, rank: int, ranks: int) -> np.ndarray:
    """A process's part of a global batch; parts differ by one in size, and hold like lengths."""
    return batch[rank::ranks]


def passes(members: np.ndarray, lengths: Lengths, budget: Budget) -> list[np.ndarray]:
    """`members` in order of length, cut into as few padded passes as neighbours allow, each within `budget`."""
    cut: list[list[int]] = []
    tiles = tokens = 0
    for member in by_length(lengths, members):
        longer = max(tiles, int(lengths.tiles[member])), max(tokens, int(lengths.tokens[member]))
        size = len(cut[-1]) + 1 if cut else 0
        if cut and size * longer[0] <= budget.tiles and size * longer[1] <= budget.tokens:
            cut[-1].append(int(member))
            tiles, tokens = longer
        else:
            cut.append([int(member)])
            tiles, tokens = int(lengths.tiles[member]), int(lengths.tokens[member])
    return [np.asarray(part) for part in cut]


class Passes(Sampler[list[tuple[int, int]]]):
    """Passes of (epoch, index) of one process, in order.

    Args:
        batches: the passes of each global batch, from `passes`.
        epoch: handed on.
        twice: give a batch's passes twice over where there are several: once for its latents, once for its gradient.
            So they need not stay in memory.
    """

    def __init__(self, batches: Sequence[Sequence[np.ndarray]], epoch: int, twice: bool):
        self.epoch = epoch
        self.order = [one for batch in batches for one in [*batch] * (2 if twice and len(batch) > 1 else 1)]

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for members in self.order:
            yield [(self.epoch, int(index)) for index in members]
