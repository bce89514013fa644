"""Which pictures show the same: near-twins by the correlation of small grey thumbnails, and equal pixels.

A thumbnail is the whole picture in 64x64 grey levels, each the mean of its area; the similarity of two is
Pearson's correlation of their 4096 values. Thumbnails are kept as bytes, so that sums and products are
whole numbers: a similarity has the same bits whatever the block size, the threads or the order.

Cost, on one core of an AMD EPYC. Reading: 3 ms per BUSI image. Comparing grows with the square of n: 0.1 s for 780
pictures, 16 s for 20,000 (both measured), hence 7 minutes for 100,000 (extrapolated); eight times that where nearly all
are near-twins. Memory: three times 4 KB per picture at most, and blocks; 0.43 GB for 20,000 in blocks of 2048
(measured), hence 1.5 GB for 100,000 (extrapolated), and 0.6 GB more in blocks where all are near-twins. There is never
an n x n matrix, and the list of pairs is bounded.
"""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import joblib
import numpy as np
import pandas as pd
from PIL import Image
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from scripts.common import images, progress
from scripts.common.errors import KilnError

SIDE = 64
VALUES = SIDE * SIDE
BLOCK = 1024
MOST_PAIRS = 1_000_000
NO_LIMIT = 2**62  # the listing has refused over-large files already
# Products of unit vectors in float32 err by at most 4096 * 2^-24 = 2.4e-4, and by 2e-7 for the vectors' own rounding.
_SLACK = 3e-4


class Pictures(NamedTuple):
    """What is compared of n pictures.

    Attributes:
        thumbnails: uint8 [n, 4096], grey.
        pixels: n hex digests of size and decoded RGB pixels, whatever the file's format.
    """

    thumbnails: np.ndarray
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


def read(folder: Path, paths: Sequence[str], processes: int) -> Pictures:
    """Decode the pictures at `paths` below `folder`, each once; see `images.open_rgb` for odd formats.

    Raises:
        KilnError: a file is gone or no longer readable.
    """
    work = (joblib.delayed(_read_one)(folder / path) for path in progress.bar(paths, "read"))
    # threads, not processes: Pillow and hashlib release the GIL while they work
    made = joblib.Parallel(n_jobs=processes, prefer="threads")(work)
    return Pictures(np.array([t for t, _ in made], np.uint8).reshape(-1, VALUES), [digest for _, digest in made])


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


def similar_blocks(
    left: np.ndarray, right: np.ndarray | None, threshold: float, block: int = BLOCK
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Pairs of thumbnails at or above `threshold`, block by block.

    A float32 matrix product names the candidates, with some slack; their similarities are then computed from whole
    numbers. A thumbnail of one grey level has no correlation and is in no pair.

    Args:
        left: uint8 [n, 4096].
        right: uint8 [m, 4096], or None for the pairs i < j within `left`.
        threshold: in (0, 1].
        block: thumbnails of either side at a time.

    Yields: (i, j, similarity), int64, int64 and float64 arrays of one length, maybe none.
    """
    other = left if right is None else right
    ours = _moments(left)
    theirs = ours if right is None else _moments(right)
    starts = [
        (a, b) for a in range(0, len(left), block) for b in range(0 if right is not None else a, len(other), block)
    ]
    held, units = None, None
    for a, b in progress.bar(starts, "compare blocks"):
        if a != held:
            held, units = a, _units(left, ours, a, block)
        near = units @ _units(other, theirs, b, block).T >= threshold - _SLACK
        if right is None and a == b:
            near = np.triu(near, 1)
        rows, columns = np.flatnonzero(near.any(axis=1)), np.flatnonzero(near.any(axis=0))
        exact = _correlation(left, ours, a + rows, other, theirs, b + columns)
        found = np.nonzero(near[np.ix_(rows, columns)] & (exact >= threshold))
        yield a + rows[found[0]], b + columns[found[1]], exact[found]


def similar_pairs(
    left: np.ndarray, right: np.ndarray | None, threshold: float, block: int = BLOCK
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All pairs of `similar_blocks` in one (i, j, similarity), sorted by i and j."""
    found = list(similar_blocks(left, right, threshold, block))
    if not found:
        return np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0)
    i, j, similarity = (np.concatenate(parts) for parts in zip(*found, strict=True))
    order = np.lexsort((j, i))
    return i[order], j[order], similarity[order]


def _moments(thumbs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Per thumbnail the sum of its values, and 4096 times their squared distance from the mean; whole float64."""
    sums, squares = np.empty(len(thumbs)), np.empty(len(thumbs))
    for start in range(0, len(thumbs), 256):
        values = thumbs[start : start + 256].astype(np.float64)
        sums[start : start + 256] = values.sum(axis=1)
        squares[start : start + 256] = np.einsum("ij,ij->i", values, values)
    return sums, VALUES * squares - sums**2


def _units(thumbs: np.ndarray, moments: tuple[np.ndarray, np.ndarray], start: int, block: int) -> np.ndarray:
    """float32 [block, 4096] of mean 0 and length 1; zeros for a thumbnail of one grey level."""
    sums, spread = (values[start : start + block] for values in moments)
    centred = thumbs[start : start + block].astype(np.float32)
    centred *= VALUES
    centred -= sums.astype(np.float32)[:, None]  # whole numbers below 2^24: exact
    length = np.sqrt(VALUES * spread)
    centred *= np.divide(1, length, out=np.zeros_like(length), where=length > 0).astype(np.float32)[:, None]
    return centred


def _correlation(left, ours, rows: np.ndarray, right, theirs, columns: np.ndarray) -> np.ndarray:
    """Pearson's correlation of some rows of `left` with some of `right`; 0 for a thumbnail of one grey level.

    Products and sums are whole numbers below 2^53, so that no order of summation changes a bit. Rounding is monotone:
    none is above 1.
    """
    products = left[rows].astype(np.float64) @ right[columns].astype(np.float64).T
    joint = VALUES * products - np.outer(ours[0][rows], theirs[0][columns])
    scale = np.sqrt(np.outer(ours[1][rows], theirs[1][columns]))
    return np.divide(joint, scale, out=np.zeros_like(joint), where=scale > 0)


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
    for i, j, similarity in similar_blocks(pictures.thumbnails[first], None, threshold, block):
        if len(i):
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
