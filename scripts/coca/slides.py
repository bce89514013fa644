"""Tile embeddings of a slide in an HDF5 file: what is in it, and its tiles by slab.

A file holds one data set of features [N,D] or [1,N,D] in float16 or float32, in any layout. What would read other
files (external links, external raw data, virtual data sets) and object references are refused, and never followed.
h5py keeps a lock over all of HDF5: read several slides in processes, not in threads.
"""

import contextlib
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np

from scripts.common.errors import KilnError

DTYPES = ("float16", "float32")
SLAB_BYTES = 16 * 2**20
_HOPS = 16  # soft links that may lead to one data set


class SlideError(KilnError):
    """A file that is no usable slide; `reason` says why, without its path."""

    def __init__(self, path: Path, reason: str, hint: str = "write the file anew, or take it out of the folder"):
        super().__init__(f"{path}: {reason}", hint)
        self.path, self.reason = path, reason

    def __reduce__(self):
        return type(self), (self.path, self.reason, self.hint)


class SlideFile(NamedTuple):
    """The features of a slide: data set `key` of file `path`, [tiles,dim] or, if `batched`, [1,tiles,dim], in chunks of
    `chunk` tiles (1: in one piece)."""

    path: Path
    key: str
    tiles: int
    dim: int
    dtype: str
    batched: bool
    chunk: int

    def slabs(self, size: int = SLAB_BYTES) -> list[tuple[int, int]]:
        """(start, stop) of slabs of about `size` bytes, of whole chunks, so that none is unpacked twice."""
        rows = size // (self.dim * np.dtype(self.dtype).itemsize)
        rows = self.chunk * max(1, math.ceil(rows / self.chunk))
        return [(start, min(start + rows, self.tiles)) for start in range(0, self.tiles, rows)]


def open_slide(path: Path, keys: Sequence[str]) -> SlideFile:
    """What `path` holds under the first of `keys` that is a data set in it; no tile is read.

    Raises:
        SlideError: no HDF5 file, truncated, damaged, with links out of it or object references; none of the keys;
            another shape or type; no tiles, or tiles that were never written.
        KilnError: the file is gone or may not be read.
    """
    with _opened(path) as file:
        _refuse_links(path, file)
        for key in keys:
            dataset = _dataset(path, file, key)
            if dataset is not None:
                return _describe(path, key, dataset)
        there = ", ".join(sorted(map(ascii, file))) or "nothing"
        raise SlideError(path, f"no data set {' or '.join(keys)}: it has {there}", "name it in coca.list.keys")


def open_listed(path: Path, key: str, tiles: int, dim: int) -> SlideFile:
    """The slide at `path`, which had so many tiles of that width under `key` when it was listed.

    Raises:
        SlideError: as `open_slide`.
        KilnError: it has others now, or is gone.
    """
    slide = open_slide(path, (key,))
    if (slide.tiles, slide.dim) != (tiles, dim):
        raise KilnError(
            f"{path}: {slide.tiles} tiles of {slide.dim}; when it was listed, {tiles} of {dim}",
            "run again: the folder is scanned anew, and what is done stays done",
        )
    return slide


def read_tiles(slide: SlideFile, start: int = 0, stop: int | None = None) -> np.ndarray:
    """Tiles `start` to `stop` (all: None), [n,dim] in the type that they are stored in, in this machine's byte order.

    Raises:
        SlideError: the file is no longer what it was, or is damaged.
        KilnError: it is gone.
    """
    stop = slide.tiles if stop is None else stop
    if not 0 <= start <= stop <= slide.tiles:
        raise ValueError(f"tiles {start} to {stop} of {slide.tiles}")
    with _opened(slide.path) as file:
        return _read(slide, _same(slide, file), start, stop)


def iterate_tiles(slide: SlideFile) -> Iterator[np.ndarray]:
    """All tiles in order, in slabs of about 16 MiB.

    Raises:
        SlideError, KilnError: as `read_tiles`.
    """
    with _opened(slide.path) as file:
        dataset = _same(slide, file)
        for start, stop in slide.slabs():
            yield _read(slide, dataset, start, stop)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[h5py.File]:
    try:
        with path.open("rb") as handle:
            empty = not handle.read(1)
    except OSError as error:
        raise KilnError(
            f"{path}: cannot be read ({error.strerror})", "was it moved? Run again: the folder is scanned anew"
        ) from None
    if empty:
        raise SlideError(path, "empty file")
    try:
        with h5py.File(path, "r", locking="best-effort") as file:
            yield file
    except (OSError, RuntimeError, LookupError, TypeError, ValueError, UnicodeError) as error:  # whatever h5py raises
        raise SlideError(path, _explain(path, str(error))) from None


def _explain(path: Path, said: str) -> str:
    cut = re.search(r"truncated file: eof = (\d+).*stored_eof = (\d+)", said)
    if cut:
        return f"truncated: {cut[1]} of {cut[2]} bytes"
    return f"unreadable: {said}" if h5py.is_hdf5(path) else "no HDF5 file"


def _refuse_links(path: Path, file: h5py.File) -> None:
    """Refuse external links and object references, wherever they are in the file; soft links may stay in it."""

    def external(name, link):
        if isinstance(link, h5py.ExternalLink):
            return _external(path, name, link)

    def references(name, item):
        if isinstance(item, h5py.Dataset) and _has_references(item.dtype):
            return SlideError(path, f"object references: {ascii(name)}", "write the file anew, with the features alone")

    error = file.visititems_links(external) or file.visititems(references)  # what is returned ends the visit
    if error is not None:
        raise error


def _external(path: Path, name: str, link: h5py.ExternalLink) -> SlideError:
    return SlideError(path, f"external link: {ascii(name)} leads to {ascii(link.filename)}", "copy the data in")


def _has_references(dtype: np.dtype) -> bool:
    if h5py.check_ref_dtype(dtype) is not None:
        return True
    inner = h5py.check_vlen_dtype(dtype)
    if isinstance(inner, np.dtype):
        return _has_references(inner)
    if dtype.subdtype:
        return _has_references(dtype.subdtype[0])
    return any(_has_references(dtype[name]) for name in dtype.names or ())


def _dataset(path: Path, file: h5py.File, key: str) -> h5py.Dataset | None:
    """Data set `key`, reached by hard links and by soft links within the file; None if there is none."""
    place, parts, hops = file, _parts(key), 0
    while parts:
        link = place.get(parts[0], getlink=True) if isinstance(place, h5py.Group) else None
        if link is None:
            return None
        if isinstance(link, h5py.ExternalLink):
            raise _external(path, key, link)
        if isinstance(link, h5py.SoftLink):
            hops += 1
            if hops > _HOPS:
                raise SlideError(path, f"soft link in a circle: {ascii(key)}")
            place = file if link.path.startswith("/") else place
            parts = _parts(link.path) + parts[1:]
        else:
            place, parts = place[parts[0]], parts[1:]
    return place if isinstance(place, h5py.Dataset) else None


def _parts(name: str) -> list[str]:
    return [part for part in name.split("/") if part not in ("", ".")]


def _describe(path: Path, key: str, dataset: h5py.Dataset) -> SlideFile:
    shape, dtype = dataset.shape, dataset.dtype.newbyteorder("=").name
    if dataset.is_virtual or dataset.external:
        raise SlideError(path, f"external data: {ascii(key)} lies in other files", "copy the data in")
    if dtype not in DTYPES:
        raise SlideError(path, f"type: {ascii(key)} is {dtype}, expected {' or '.join(DTYPES)}")
    batched = shape is not None and len(shape) == 3 and shape[0] == 1
    if shape is None or not (len(shape) == 2 or batched) or shape[-1] == 0:
        raise SlideError(path, f"shape: {ascii(key)} is {_show(shape)}, expected [N,D] or [1,N,D]")
    if shape[-2] == 0:
        raise SlideError(path, "no tiles")
    if not _is_written(dataset):
        raise SlideError(path, f"unfinished: tiles of {ascii(key)} were never written")
    chunk = dataset.chunks[-2] if dataset.chunks else 1
    return SlideFile(path, key, shape[-2], shape[-1], dtype, batched, chunk)


def _show(shape: tuple[int, ...] | None) -> str:
    return "empty" if shape is None else f"[{','.join(map(str, shape))}]"


def _is_written(dataset: h5py.Dataset) -> bool:
    """Whether all is stored; HDF5 reads zeros, without an error, where a killed writer left a gap."""
    if dataset.chunks is None:
        return dataset.id.get_storage_size() > 0
    chunks = math.prod(math.ceil(n / chunk) for n, chunk in zip(dataset.shape, dataset.chunks, strict=True))
    return dataset.id.get_num_chunks() >= chunks


def _same(slide: SlideFile, file: h5py.File) -> h5py.Dataset:
    dataset = _dataset(slide.path, file, slide.key)
    now = None if dataset is None else _describe(slide.path, slide.key, dataset)
    if now != slide:
        raise SlideError(
            slide.path,
            f"changed: {ascii(slide.key)} had {slide.tiles} tiles of {slide.dim} {slide.dtype} when it was listed",
            "run again: the folder is scanned anew",
        )
    return dataset


def _read(slide: SlideFile, dataset: h5py.Dataset, start: int, stop: int) -> np.ndarray:
    tiles = np.empty((stop - start, slide.dim), slide.dtype)
    if stop > start:
        dataset.read_direct(tiles, (0, slice(start, stop)) if slide.batched else slice(start, stop))
    return tiles
