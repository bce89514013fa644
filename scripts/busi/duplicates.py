"""Which pictures show the same: near-twins by the correlation of small grey thumbnails, and equal pixels.

A thumbnail is the whole picture in 64x64 grey levels, each the mean of its area; the similarity of two is
Pearson's correlation of their 4096 values. Thumbnails are kept as bytes, so that sums and products are
whole numbers: a similarity has the same bits whatever the block size, the threads or the order.

Pictures that are alike in full are alike in their low frequencies: the distance of two unit vectors is never less than
that of their first cosine coefficients. These 63 numbers name the candidates, block by block; blocks hold neighbours,
and blocks that lie further apart than the threshold allows are not compared. No pair is missed, for any pictures.

Cost: see benchmarks/README.md. Comparing grows faster than n, with the square of n at worst: where nearly all are
near-twins, or are fine grain alone, without low frequencies. Memory: 1 KB per picture, and blocks; thumbnails may lie
in a file. There is never an n x n matrix, and the list of pairs is bounded.
"""

import functools
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import joblib
import numpy as np
import pandas as pd
from PIL import Image
from scipy import fft
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree

from scripts.busi.thumbnails import Stored, Subset, Thumbnails
from scripts.common import images, progress
from scripts.common.errors import KilnError

SIDE = 64
VALUES = SIDE * SIDE
BLOCK = 1024
MOST_PAIRS = 1_000_000
NO_LIMIT = 2**62  # the listing has refused over-large files already
WAITING = 1_000_000  # pairs that are found before they are put together with the others
FREQUENCIES = 8  # of either direction, the mean left out
ORDERED_BY = 8  # of the coefficients, the lowest
# Products of 65 float32 values, at most 2 in sum, err by at most 2 * 65 * 2^-24 = 8e-6, and by 2e-7 for their rounding.
_SLACK = 1e-5
# Of 4096 values of unit vectors: by at most 4096 * 2^-24 = 2.4e-4.
_SLACK_IN_FULL = 3e-4


class Pictures(NamedTuple):
    """What is compared of n pictures.

    Attributes:
        thumbnails: uint8 [n, 4096], grey; an array, or what is indexed like one.
        pixels: n hex digests of size and decoded RGB pixels, whatever the file's format.
    """

    thumbnails: Thumbnails
    pixels: list[str]


class Duplicates(NamedTuple):
    """What `find` finds among n pictures.

    Attributes:
        groups: int64 [n], the number of the first picture of each picture's group.
        pairs: columns first, second (numbers, first < second), similarity (float64, 1.0 for equal pixels), identical
            (bool), sorted by first and second; see `find` for which.
        total: pairs in all.
        identical: those of them with equal pixels.
    """

    groups: np.ndarray
    pairs: pd.DataFrame
    total: int
    identical: int


def read(folder: Path, paths: Sequence[str], processes: int, scratch: Path | None = None) -> Pictures:
    """Decode the pictures at `paths` below `folder`, each once; see `images.open_rgb` for odd formats.

    Args:
        scratch: folder on whose disk the thumbnails lie, 4 KB each; None: they are in memory.

    Raises:
        KilnError: a file is gone or no longer readable, or there is no room for the thumbnails.
    """
    work = (joblib.delayed(_read_one)(folder / path) for path in progress.bar(paths, "read"))
    # threads, not processes: Pillow and hashlib release the GIL while they work
    made = joblib.Parallel(n_jobs=processes, prefer="threads", return_as="generator")(work)
    digests: list[str] = []

    def thumbnails() -> Iterator[np.ndarray]:
        for thumbnail, digest in made:
            digests.append(digest)
            yield thumbnail

    if scratch is None:
        return Pictures(np.array(list(thumbnails()), np.uint8).reshape(-1, VALUES), digests)
    return Pictures(Stored(scratch, thumbnails(), len(paths), VALUES), digests)


def _read_one(path: Path) -> tuple[np.ndarray, str]:
    try:
        picture = images.open_rgb(path, NO_LIMIT)
    except (images.ImageError, FileNotFoundError) as error:
        raise KilnError(
            f"{path}: readable when it was listed, now: {error}",
            "run again: the folder is scanned anew, and what is done stays done",
        ) from None
    digest = hashlib.sha256(f"{picture.width}x{picture.height}\0".encode())
    digest.update(picture.tobytes())
    grey = picture.convert("L").resize((SIDE, SIDE), Image.Resampling.BOX)
    return np.asarray(grey).reshape(-1), digest.hexdigest()


class _Side(NamedTuple):
    """Thumbnails of more than one grey level, neighbours together, in blocks.

    Attributes:
        thumbs: all thumbnails.
        sums, spread: float64 [n], the sum of each one's values, and 4096 times their squared distance from the mean.
        rows: int64 [m], the numbers of those that are compared.
        points: float32 [m,65], their first coefficients p, then -|p|^2/2 and 1.
        low, high: float32 [blocks,63], bounds of the coefficients of each block.
    """

    thumbs: Thumbnails
    sums: np.ndarray
    spread: np.ndarray
    rows: np.ndarray
    points: np.ndarray
    low: np.ndarray
    high: np.ndarray


def similar_blocks(
    left: Thumbnails, right: Thumbnails | None, threshold: float, block: int = BLOCK
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Pairs of thumbnails at or above `threshold`, block by block.

    Coefficients name the candidates, with some slack; their similarities are then computed from whole numbers. A
    thumbnail of one grey level has no correlation and is in no pair.

    Args:
        left: uint8 [n, 4096].
        right: uint8 [m, 4096], or None for the pairs i < j within `left`.
        threshold: in (0, 1].
        block: thumbnails of either side at a time.

    Yields: (i, j, similarity), int64, int64 and float64 arrays of one length, not none.
    """
    ours = _prepared(left, block)
    theirs = ours if right is None else _prepared(right, block)
    swapped = [*range(ours.points.shape[1] - 2), -1, -2]
    for a in progress.bar(range(len(ours.low)), "compare blocks"):
        gap = np.maximum(theirs.low - ours.high[a], ours.low[a] - theirs.high).clip(min=0)
        close = np.flatnonzero((gap**2).sum(axis=1) <= 2 * (1 - threshold + _SLACK))
        for b in close if right is not None else close[close >= a]:
            mine, other = (slice(one * block, (one + 1) * block) for one in (a, b))
            # p.q - |p|^2/2 - |q|^2/2 = -|p-q|^2/2, which is no less than the correlation minus 1
            near = ours.points[mine] @ theirs.points[other][:, swapped].T >= threshold - 1 - _SLACK
            if right is None and a == b:
                near = np.triu(near, 1)
            if np.count_nonzero(near) > block:  # fine grain: half the work of whole numbers rules most out
                near &= (
                    _units(ours, ours.rows[mine]) @ _units(theirs, theirs.rows[other]).T >= threshold - _SLACK_IN_FULL
                )
            rows, columns = np.flatnonzero(near.any(axis=1)), np.flatnonzero(near.any(axis=0))
            i, j = ours.rows[mine][rows], theirs.rows[other][columns]
            exact = _correlation(ours, i, theirs, j)
            found = np.nonzero(near[np.ix_(rows, columns)] & (exact >= threshold))
            if len(found[0]):
                ends = i[found[0]], j[found[1]]
                yield *(ends if right is not None else (np.minimum(*ends), np.maximum(*ends))), exact[found]


def similar_pairs(
    left: Thumbnails, right: Thumbnails | None, threshold: float, block: int = BLOCK
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All pairs of `similar_blocks` in one (i, j, similarity), sorted by i and j."""
    found = list(similar_blocks(left, right, threshold, block))
    if not found:
        return np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0)
    i, j, similarity = (np.concatenate(parts) for parts in zip(*found, strict=True))
    order = np.lexsort((j, i))
    return i[order], j[order], similarity[order]


@functools.cache
def _waves() -> np.ndarray:
    """float64 [4096,63] of orthonormal columns: cosines of low frequency, the lowest first, without the mean."""
    rows = fft.dct(np.eye(SIDE), axis=0, norm="ortho")[:FREQUENCIES]
    both = np.einsum("ky,lx->klyx", rows, rows).reshape(-1, VALUES)
    order = np.argsort(np.add.outer(*[np.arange(FREQUENCIES) ** 2] * 2).ravel(), kind="stable")
    return np.ascontiguousarray(both[order[1:]].T)


def _prepared(thumbs: Thumbnails, block: int) -> _Side:
    count = len(thumbs)
    sums, spread = np.empty(count), np.empty(count)
    points = np.empty((count, FREQUENCIES**2 + 1), np.float32)
    for start in range(0, count, 256):
        own = slice(start, min(start + 256, count))
        values = thumbs[np.arange(own.start, own.stop)].astype(np.float64)
        sums[own] = values.sum(axis=1)
        spread[own] = VALUES * np.einsum("ij,ij->i", values, values) - sums[own] ** 2
        length = np.sqrt(np.maximum(spread[own], 1) / VALUES)
        points[own, :-2] = values @ _waves() / length[:, None]
        points[own, -2] = -np.square(points[own, :-2], dtype=np.float64).sum(axis=1) / 2
        points[own, -1] = 1
    rows = np.flatnonzero(spread > 0)
    rows = rows[cKDTree(points[rows, :ORDERED_BY], leafsize=min(block, 64)).indices]
    points = points[rows]
    starts = np.arange(0, len(rows), block)
    kept = points[:, :-2]
    low, high = (bound.reduceat(kept, starts) if len(rows) else kept for bound in (np.minimum, np.maximum))
    return _Side(thumbs, sums, spread, rows, points, low, high)


def _units(side: _Side, rows: np.ndarray) -> np.ndarray:
    """float32 [m,4096], some thumbnails with mean 0 and length 1; none is of one grey level."""
    centred = side.thumbs[rows].astype(np.float32)
    centred *= VALUES
    centred -= side.sums[rows].astype(np.float32)[:, None]  # whole numbers below 2^24: exact
    centred *= (1 / np.sqrt(VALUES * side.spread[rows])).astype(np.float32)[:, None]
    return centred


def _correlation(ours: _Side, rows: np.ndarray, theirs: _Side, columns: np.ndarray) -> np.ndarray:
    """Pearson's correlation of some thumbnails of one side with some of the other, none of one grey level.

    Products and sums are whole numbers below 2^53, so that no order of summation changes a bit. Rounding is monotone:
    none is above 1.
    """
    products = ours.thumbs[rows].astype(np.float64) @ theirs.thumbs[columns].astype(np.float64).T
    joint = VALUES * products - np.outer(ours.sums[rows], theirs.sums[columns])
    return joint / np.sqrt(np.outer(ours.spread[rows], theirs.spread[columns]))


def find(pictures: Pictures, threshold: float, block: int = BLOCK, most: int = MOST_PAIRS) -> Duplicates:
    """Groups of pictures tied by chains of pairs: similar at `threshold` or above, or of equal pixels.

    Pictures of equal pixels are compared with others once. All pairs are listed where there are at most `most`; else
    the first of equal pictures stands for all, each of the others is paired with it alone, and of the pairs that are
    left the `most` most similar are listed (ties: in order). Groups and totals are exact in either case.
    """
    copies = pd.factorize(np.array(pictures.pixels, dtype=object))[0]
    first, sizes = np.unique(copies, return_index=True, return_counts=True)[1:]
    identical = int((sizes * (sizes - 1) // 2).sum())
    total, component = identical, np.arange(len(first))
    near = pd.DataFrame({"first": np.empty(0, np.int64), "second": np.empty(0, np.int64), "similarity": np.empty(0)})
    for i, j, similarity in _gathered(similar_blocks(Subset(pictures.thumbnails, first), None, threshold, block)):
        total += int(sizes[i] @ sizes[j])
        component = _joined(component, i, j)
        found = pd.DataFrame({"first": first[i], "second": first[j], "similarity": similarity})
        near = _most_similar(pd.concat([near, found], ignore_index=True), most)
    groups = pd.Series(np.arange(len(copies))).groupby(component[copies]).transform("min").to_numpy()
    same = pd.DataFrame({"first": first[copies], "second": np.arange(len(copies)), "similarity": 1.0})
    same = same[same["first"] < same["second"]]
    if total <= most:
        same, near = _with_copies(same, near, first[copies])
    pairs = pd.concat([same.assign(identical=True), near.assign(identical=False)], ignore_index=True)
    pairs = _most_similar(pairs, most).sort_values(["first", "second"], ignore_index=True)
    return Duplicates(groups, pairs, total, identical)


def _gathered(blocks: Iterator[tuple[np.ndarray, ...]]) -> Iterator[tuple[np.ndarray, ...]]:
    """The same pairs, many at a time: each time costs as much as there are pictures."""
    waiting: list[tuple[np.ndarray, ...]] = []
    count = 0
    for found in blocks:
        waiting.append(found)
        count += len(found[0])
        if count >= WAITING:
            yield tuple(map(np.concatenate, zip(*waiting, strict=True)))
            waiting, count = [], 0
    if waiting:
        yield tuple(map(np.concatenate, zip(*waiting, strict=True)))


def _joined(component: np.ndarray, i: np.ndarray, j: np.ndarray) -> np.ndarray:
    """Component numbers after i[k] and j[k] are joined for each k."""
    count = len(component)
    edges = coo_array((np.ones(len(i), np.int8), (component[i], component[j])), shape=(count, count))
    return connected_components(edges, directed=False)[1][component]


def _most_similar(pairs: pd.DataFrame, most: int) -> pd.DataFrame:
    if len(pairs) <= most:
        return pairs
    return pairs.sort_values(["similarity", "first", "second"], ascending=[False, True, True]).head(most)


def _with_copies(same: pd.DataFrame, near: pd.DataFrame, standing: np.ndarray) -> tuple[pd.DataFrame, pd.DataFrame]:
    """All pairs, from those of the pictures that stand for others; `standing` is that picture for each picture."""
    members = pd.DataFrame({"first": standing, "member": np.arange(len(standing))})
    more = members[members["first"].isin(same["first"])]
    same = more.merge(more, on="first").query("member_x < member_y").assign(similarity=1.0)
    near = near.merge(members, on="first").merge(members.rename(columns={"first": "second"}), on="second")
    columns = ["member_x", "member_y", "similarity"]
    same, near = (f[columns].set_axis(["first", "second", "similarity"], axis=1) for f in (same, near))
    ends = np.sort(near[["first", "second"]].to_numpy(np.int64), axis=1)
    return same, near.assign(first=ends[:, 0], second=ends[:, 1])


def pairs_between(left: Pictures, right: Pictures, threshold: float, block: int = BLOCK) -> pd.DataFrame:
    """All pairs of a picture of `left` and one of `right`: similar at `threshold` or above, or of equal pixels.

    Asked for the lowest of several thresholds, it answers for all of them by `similarity`. It holds every pair in
    memory, some 40 bytes each.

    Returns: columns left, right (numbers in their sets), similarity (float64, 1.0 for equal pixels), identical (bool),
    sorted by left and right.
    """
    i, j, similarity = similar_pairs(left.thumbnails, right.thumbnails, threshold, block)
    near = pd.DataFrame({"left": i, "right": j, "similarity": similarity, "identical": False})
    ours, theirs = (
        pd.DataFrame({"pixels": side.pixels, name: np.arange(len(side.pixels))})
        for name, side in (("left", left), ("right", right))
    )
    same = ours.merge(theirs, on="pixels")[["left", "right"]].assign(similarity=1.0, identical=True)
    pairs = pd.concat([same, near], ignore_index=True).drop_duplicates(["left", "right"])
    return pairs.sort_values(["left", "right"], ignore_index=True)
