"""How large a model is, by the headers of its files alone: no weight is read, and torch is not needed."""

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path


def weight_bytes(model: Path) -> int | None:
    """Bytes of a model's safetensors, or of the one file that it is; None: there are none, or not yet."""
    files = [model] if model.is_file() else sorted(model.glob("*.safetensors"))
    return sum(file.stat().st_size for file in files) or None


def shapes(model: Path) -> Mapping[str, tuple[int, ...]] | None:
    """{tensor: shape} of a model's safetensors; None: there are none, or they are damaged."""
    found: dict[str, tuple[int, ...]] = {}
    files = [model] if model.is_file() else sorted(model.glob("*.safetensors"))
    try:
        for file in files:
            with file.open("rb") as handle:
                (length,) = struct.unpack("<Q", handle.read(8))
                header = json.loads(handle.read(length))
            found |= {name: tuple(one["shape"]) for name, one in header.items() if name != "__metadata__"}
    except (OSError, ValueError, KeyError, TypeError, struct.error, MemoryError, OverflowError):
        return None  # whoever loads the model says what is wrong with it
    return found or None


def count(found: Mapping[str, tuple[int, ...]]) -> int:
    """Parameters of tensors of such shapes."""
    return sum(math.prod(shape) for shape in found.values())
