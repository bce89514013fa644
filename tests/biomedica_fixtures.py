"""Shards for tests of pipeline biomedica: the real layout by webdataset's own writer, odd ones by tarfile."""

import io
import json
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import webdataset
from PIL import Image

MTIME = 1_700_000_000  # of members, so that equal pairs give equal shards
PANELS = ("Plots and Charts", "Microscopy", "Immuno Assays")


def picture(number: int, size: tuple[int, int] = (32, 24), kind: str = "JPEG") -> bytes:
    """An image file that depends on its number."""
    noise = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, kind)
    return file.getvalue()


def pair(number: int, **changed) -> dict:
    """One pair as webdataset writes it; three figures are of one article. A member that is None is left out."""
    panel = {"image_panel_type": PANELS[number % 3], "image_panel_subtype": "x"}
    made = {"__key__": key(number), "jpg": picture(number), "txt": f" Figure {number}. \n", "json": panel} | changed
    return {name: value for name, value in made.items() if value is not None}


def key(number: int) -> str:
    """The key of a pair."""
    return f"{number // 200}-PMC{1000 + number // 3}-{number % 3}-f{number:05x}"


def write_shard(path: Path, pairs: Iterable[dict]) -> Path:
    """A shard in the real layout: jpg, json, txt by key."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with webdataset.TarWriter(str(path), mtime=MTIME) as writer:
        for one in pairs:
            writer.write(one)
    return path


def write_shards(folder: Path, count: int, per_shard: int, first: int = 0) -> list[Path]:
    """`count` shards of pairs numbered from `first` on."""
    starts = range(first, first + count * per_shard, per_shard)
    return [
        write_shard(folder / f"0_200{i:06d}.tar", map(pair, range(start, start + per_shard)))
        for i, start in enumerate(starts)
    ]


def members(one: dict) -> list[tuple[str, bytes]]:
    """(name, data) of a pair's members in the real order."""
    encoded = {kind: value.encode() if isinstance(value, str) else value for kind, value in one.items()}
    encoded = {k: v if isinstance(v, bytes) else json.dumps(v).encode() for k, v in encoded.items()}
    return [(f"{one['__key__']}.{kind}", encoded[kind]) for kind in sorted(encoded) if kind != "__key__"]


def tar_bytes(
    content: Sequence[tuple[str, bytes] | tarfile.TarInfo], format: int = tarfile.GNU_FORMAT, ended: bool = True
) -> bytes:
    """A tar of members, in this order: (name, data), or a header without data."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format) as tar:
        for one in content:
            info, data = (one, b"") if isinstance(one, tarfile.TarInfo) else (tarfile.TarInfo(one[0]), one[1])
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        end = file.tell()
    return file.getvalue() if ended else file.getvalue()[:end]


def special(name: str, kind: bytes, link: str = "") -> tarfile.TarInfo:
    """The header of a link, a device or a folder."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info
