"""The Arrow dataset of images and labels: shards written, described and read.

The folder is what `datasets.load_from_disk` reads: `dataset_dict.json`, and for each split `dataset_info.json`,
`state.json` and `data-XXXXX-of-YYYYY.arrow`, streams in Arrow's IPC format. Columns: `image`, the file's bytes as they
were and its path; `label`, a class.
"""

import io
import json
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image, UnidentifiedImageError

from scripts.common import artefacts, images
from scripts.common.errors import KilnError
from scripts.common.images import ImageError
from scripts.rae import parquet

BATCH_ROWS = 100
BATCH_BYTES = 2**28  # far below the 2 GiB that 32-bit offsets reach
NO_LIMIT = 2**62  # over-large images were quarantined when the dataset was built
_BAD_HEADER = (OSError, ValueError, SyntaxError, EOFError, ArithmeticError, LookupError, TypeError, struct.error)


class Picture(NamedTuple):
    """An image: its file, the path to store, its label, and its size in bytes when it was listed.

    In a parquet file it is the image of `row`, whose size is not known before it is read.
    """

    file: str
    path: str
    label: int
    size: int | None
    row: int | None = None

    @property
    def place(self) -> str:
        """The file, and the row in it."""
        return self.file if self.row is None else f"{self.file}#{self.row}"


def make_features(classes: Sequence[str]) -> datasets.Features:
    """Columns `image` and `label`, the label's names being `classes`, in order."""
    return datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(classes))})


def verify_image(data: bytes, max_pixels: int, verify: str) -> None:
    """Check one image file.

    A JPEG must have an end marker after its last scan began (an embedded preview has markers of its own, and bytes may
    follow the end), a PNG its end chunk after its last data. `verify="full"` decodes every pixel, too, and so finds
    damage that the decoder refuses; libjpeg passes over damage inside a scan, and no check here sees that.

    Args:
        data: the file's bytes.
        max_pixels: more than these are refused.
        verify: "headers" or "full".

    Raises:
        ImageError: with the reason.
    """
    if not data:
        raise ImageError("empty file")
    try:
        with Image.open(io.BytesIO(data), formats=images.FORMATS) as image:
            width, height = image.size
    except UnidentifiedImageError:
        raise ImageError("not an image") from None
    except _BAD_HEADER as error:
        raise ImageError(f"unreadable: {error}") from None
    if width * height > max_pixels:
        raise ImageError(f"over-large: {width}x{height} is over max_pixels {max_pixels}")
    if data.startswith(b"\xff\xd8") and data.rfind(b"\xff\xd9") <= data.rfind(b"\xff\xda"):
        raise ImageError("truncated or corrupt: no end marker after the last scan")
    if data.startswith(b"\x89PNG") and data.rfind(b"IEND") <= data.rfind(b"IDAT"):
        raise ImageError("truncated or corrupt: no end chunk")
    if verify == "full":
        images.open_rgb(data, max_pixels)


def write_shard(path: Path, pictures: Sequence[Picture], classes: Sequence[str], max_pixels: int, verify: str) -> None:
    """Write one shard of good images, whole or not at all, and its record `path` with ending .json.

    The record, which is written last, is {bytes, sha256, quarantined: [[index in `pictures`, reason], ...], sizes: the
    images' bytes as read}. At most `BATCH_ROWS` images are in memory.

    Args:
        pictures: image files, or rows of one parquet file.

    Raises:
        KilnError: a file is gone, unreadable or of another size than when it was listed.
    """
    schema = make_features(classes).arrow_schema
    bad: list[tuple[int, str]] = []
    sizes: list[int] = []
    with (
        artefacts.atomic_path(path) as temporary,
        pa.OSFile(str(temporary), "wb") as sink,
        pa.ipc.new_stream(sink, schema) as writer,
    ):
        for rows in _batches(_good_rows(pictures, max_pixels, verify, bad, sizes)):
            writer.write_batch(pa.RecordBatch.from_pylist(rows, schema=schema))
    facts = artefacts.describe_files([path])[path.name]
    artefacts.write_json(path.with_suffix(".json"), {**facts, "quarantined": bad, "sizes": sizes})


def _good_rows(
    pictures: Sequence[Picture], max_pixels: int, verify: str, bad: list, sizes: list
) -> Iterator[dict[str, Any]]:
    for index, (picture, data) in enumerate(zip(pictures, _contents(pictures), strict=True)):
        sizes.append(len(data or b""))
        try:
            if data is None:
                raise ImageError("no bytes in its row")
            verify_image(data, max_pixels, verify)
        except ImageError as error:
            bad.append((index, str(error)))
        else:
            yield {"image": {"bytes": data, "path": picture.path}, "label": picture.label}


def _batches(rows: Iterable[dict]) -> Iterator[list[dict]]:
    batch, size = [], 0
    for row in rows:
        batch.append(row)
        size += len(row["image"]["bytes"])
        if len(batch) == BATCH_ROWS or size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _contents(pictures: Sequence[Picture]) -> Iterator[bytes | None]:
    if pictures and pictures[0].row is not None:
        return parquet.read_images(Path(pictures[0].file), [picture.row for picture in pictures])
    return map(_read, pictures)


def _read(picture: Picture) -> bytes:
    again = "run again: the folder is scanned anew"
    try:
        data = Path(picture.file).read_bytes()
    except FileNotFoundError:
        raise KilnError(f"{picture.file}: the file is gone since the folder was scanned", again) from None
    except OSError as error:
        raise KilnError(
            f"{picture.file}: cannot be read ({error.strerror})", "make it readable, or remove it"
        ) from None
    if len(data) != picture.size:
        raise KilnError(f"{picture.file}: {picture.size} bytes when the folder was scanned, now {len(data)}", again)
    return data


def read_record(path: Path) -> dict[str, Any] | None:
    """The record that `write_shard` wrote of the shard `path`; None unless both are whole."""
    try:
        record = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        return record if path.stat().st_size == record["bytes"] else None
    except (FileNotFoundError, ValueError, KeyError):
        return None


def shard_names(count: int) -> list[str]:
    """File names of a split's `count` shards, in order."""
    return [f"data-{index:05d}-of-{count:05d}.arrow" for index in range(count)]


def describe_splits(
    folder: Path, hashes: Mapping[str, Mapping[str, str]], features: datasets.Features
) -> dict[str, dict[str, Any]]:
    """Write what `load_from_disk` needs beside the shards, and `files.json`, which is returned.

    Args:
        folder: holds the shards in one folder per split.
        hashes: {split: {shard's file name: sha256}}, in order.
        features: columns of the shards.
    """
    listing = {}
    for split, shards in hashes.items():
        place = folder / split
        datasets.DatasetInfo(features=features).write_to_directory(str(place))
        state = {
            "_data_files": [{"filename": name} for name in shards],
            "_fingerprint": artefacts.sha256_text(split, *shards.values())[:16],
            "_format_columns": None,
            "_format_kwargs": {},
            "_format_type": None,
            "_output_all_columns": False,
            "_split": split,
        }
        artefacts.write_json(place / "state.json", state)
        for name, sha256 in shards.items():
            listing[f"{split}/{name}"] = {"bytes": (place / name).stat().st_size, "sha256": sha256}
        made = artefacts.describe_files([place / "dataset_info.json", place / "state.json"])
        listing |= {f"{split}/{name}": facts for name, facts in made.items()}
    artefacts.write_json(folder / "dataset_dict.json", {"splits": list(hashes)})
    listing |= artefacts.describe_files([folder / "dataset_dict.json"])
    listing = dict(sorted(listing.items()))
    artefacts.write_json(folder / "files.json", listing)
    return listing


def count_by_class(files: Iterable[Path], classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Images and their bytes in Arrow files, each [classes] int64; the images themselves are not read.

    Raises:
        KilnError: a file is damaged, or a label is no class.
    """
    counts, sizes = np.zeros(classes, dtype=np.int64), np.zeros(classes, dtype=np.int64)
    for file in files:
        try:
            with pa.memory_map(str(file)) as source, pa.ipc.open_stream(source) as batches:
                for batch in batches:
                    labels = batch["label"].fill_null(-1).to_numpy(zero_copy_only=False)
                    if len(labels) and not 0 <= labels.min() <= labels.max() < classes:
                        raise KilnError(
                            f"{file}: labels {labels.min()} to {labels.max()}, expected 0 to {classes - 1}",
                            "the split must have a label for each image: choose another, or label it",
                        )
                    lengths = pc.binary_length(pc.struct_field(batch["image"], "bytes")).fill_null(0)
                    counts += np.bincount(labels, minlength=classes)
                    np.add.at(sizes, labels, lengths.to_numpy(zero_copy_only=False).astype(np.int64))
        except (OSError, pa.ArrowException) as error:
            raise KilnError(f"{file}: damaged Arrow file: {error}", "delete it and run again") from None
    return counts, sizes


def open_split(folder: Path, split: str) -> datasets.Dataset:
    """A split of a dataset folder, memory-mapped: columns `image` (bytes and path) and `label`.

    Raises:
        KilnError: no such split, damaged or empty, other columns, or images that are not in the Arrow files.
    """
    place = folder / split
    if not place.is_dir():
        there = sorted(p.parent.name for p in folder.glob("*/state.json"))
        raise KilnError(
            f"{place}: no such split; {folder} has {', '.join(there) or 'none'}",
            "name a folder that datasets' DatasetDict.save_to_disk or rule rae_build_arrow made, and one of its splits",
        )
    try:
        dataset = datasets.Dataset.load_from_disk(str(place))
    except (OSError, ValueError, LookupError, TypeError, pa.ArrowException) as error:
        raise KilnError(
            f"{place}: not a readable Arrow dataset: {error}", "make it anew, by rule rae_build_arrow or save_to_disk"
        ) from None
    _check(dataset, place)
    return dataset


def _check(dataset: datasets.Dataset, place: Path) -> None:
    found = dataset.features
    image, label = found.get("image"), found.get("label")
    if len(found) != 2 or not isinstance(image, datasets.Image) or not isinstance(label, datasets.ClassLabel):
        columns = ", ".join(f"{name}: {type(feature).__name__}" for name, feature in found.items())
        raise KilnError(
            f"{place}: columns {columns}; expected image: Image, label: ClassLabel",
            "rename, cast or remove columns with the library datasets and save_to_disk anew",
        )
    if len(dataset) == 0:
        raise KilnError(f"{place}: the split is empty", "choose another split, or fill it")
    outside = sum(pc.struct_field(chunk, "bytes").null_count for chunk in dataset.data.column("image").chunks)
    if outside:
        raise KilnError(
            f"{place}: {outside} of {len(dataset)} images are paths to other files, not bytes",
            "save_to_disk embeds them: load the dataset where the files are, and save it anew",
        )


class Pictures:
    """index -> (transformed 8-bit RGB image, label), or a KilnError as an item; see `common.listed_images`.

    A map-style dataset for torch's DataLoader. It does without torch's empty base class, so that the processes that
    build shards need not import torch. Images are decoded as `images.open_rgb` does.
    """

    def __init__(self, dataset: datasets.Dataset, transform: Callable[[Image.Image], Any]):
        self.rows = dataset.cast_column("image", datasets.Image(decode=False))
        self.transform = transform

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Any, int] | KilnError:
        row = self.rows[index]
        try:
            image = images.open_rgb(row["image"]["bytes"], NO_LIMIT)
        except ImageError as error:
            return KilnError(
                f"row {index} ({row['image']['path']}): {error}",
                "build the dataset anew with verify=full, which quarantines such images",
            )
        return self.transform(image), row["label"]


def paths(dataset: datasets.Dataset) -> list[str]:
    """The stored paths of a split's images, in order, without reading the images; of a split that is not selected."""
    column = dataset.data.column("image")
    return [path for chunk in column.chunks for path in pc.struct_field(chunk, "path").to_pylist()]
