"""Parquet files of a data set of the Hugging Face hub: columns `image` (bytes and path) and `label` (a ClassLabel)."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from scripts.common.errors import KilnError

BATCH_ROWS, BUFFER_BYTES = 20, 2**20


def read_classes(file: Path) -> list[str]:
    """Names of the classes, in the order of labels.

    Raises:
        KilnError: the file is damaged, or its columns are others.
    """
    try:
        schema = pq.read_schema(file)
        found = datasets.Features.from_arrow_schema(schema)
    except (OSError, pa.ArrowException) as error:
        raise _damaged(file, error) from None
    image, label = found.get("image"), found.get("label")
    if not isinstance(image, datasets.Image) or not isinstance(label, datasets.ClassLabel):
        columns = ", ".join(f"{name}: {type(feature).__name__}" for name, feature in found.items())
        raise KilnError(
            f"{file}: columns {columns}; expected image: Image, label: ClassLabel",
            "choose a data set of labelled images, or rename and cast the columns with the library datasets and push "
            "it to the hub anew",
        )
    return label.names


def read_listing(file: Path, classes: int) -> tuple[list[int], list[str | None]]:
    """Label and stored path of each row, without reading the images.

    Raises:
        KilnError: the file is damaged, or a label is no class.
    """
    try:
        with pq.ParquetFile(file) as source:
            table = source.read(columns=["image.path", "label"])
    except (OSError, pa.ArrowException) as error:
        raise _damaged(file, error) from None
    labels = table["label"].fill_null(-1).to_numpy()
    outside = np.flatnonzero((labels < 0) | (labels >= classes))
    if len(outside):
        raise KilnError(
            f"{file}: row {outside[0]} (counted from 0) has label {labels[outside[0]]}, expected 0 to {classes - 1}; "
            f"{len(outside)} of {len(labels)} rows are so",
            "the split must have a label for each image (a test split often has -1): choose another",
        )
    return labels.tolist(), pc.struct_field(table["image"], "path").to_pylist()


def read_images(file: Path, rows: Sequence[int]) -> Iterator[bytes | None]:
    """Bytes of the images in `rows`, which ascend, or None where a row has none; few rows are in memory at a time.

    Raises:
        KilnError: the file is damaged.
    """
    start = 0
    try:
        # else a row group, which may be the whole file, is read at once
        with pq.ParquetFile(file, buffer_size=BUFFER_BYTES, pre_buffer=False) as source:
            for batch in source.iter_batches(BATCH_ROWS, columns=["image.bytes"]):
                images = pc.struct_field(batch["image"], "bytes")
                first, last = np.searchsorted(rows, (start, start + len(images)))
                for row in rows[first:last]:
                    yield images[row - start].as_py()
                start += len(images)
    except (OSError, pa.ArrowException) as error:
        raise _damaged(file, error) from None


def _damaged(file: Path, error: Exception) -> KilnError:
    return KilnError(f"{file}: damaged parquet file: {error}", "delete it and its files.json, and retrieve it again")
