"""Opening image files safely: one place that decides what each odd file becomes.

| file | becomes |
|---|---|
| truncated, zero bytes, no image, over `max_pixels` | `ImageError` with the reason; never a black picture |
| 16-bit grey | 8 bits by /257 (the full range is kept, nothing is clipped) |
| CMYK | RGB by Pillow's conversion (Adobe's inverted CMYK included) |
| palette, RGBA, grey with alpha | RGB over white |
| EXIF orientation | applied |
| several frames | the first |
| 32-bit integer or float | `ImageError`: their range is unknown |
"""

import hashlib
import io
import struct
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

EXTENSIONS = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP")
Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit would overrule a larger max_pixels; `_open` checks every image
_SIXTEEN_BIT = ("I;16", "I;16B", "I;16L", "I;16N")
# what Pillow raises on damaged files
_BROKEN = (OSError, ValueError, SyntaxError, EOFError, ArithmeticError, LookupError, TypeError, struct.error)


class ImageError(Exception):
    """A file that cannot be used as an image; its text is the reason for a quarantine table."""


def open_rgb(source: Path | bytes, max_pixels: int, at_least: int | None = None) -> Image.Image:
    """The image as 8-bit RGB, upright; see the table above.

    Args:
        source: a file, or the bytes of one.
        max_pixels: larger images are refused from their header, before any memory is taken.
        at_least: a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size as long as both sides keep at
            least this many pixels. None decodes every pixel.

    Raises:
        ImageError: with the reason.
        FileNotFoundError: the file is gone.
    """
    return _decode(_open(source, max_pixels), at_least)


def size(source: Path | bytes, max_pixels: int) -> tuple[int, int]:
    """(width, height) in pixels as stored, from the header alone.

    Raises:
        ImageError: no image, or a larger one.
        FileNotFoundError: the file is gone.
    """
    with _open(source, max_pixels) as image:
        return image.size


def _open(source: Path | bytes, max_pixels: int) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS)
    except UnidentifiedImageError:
        size = len(source) if isinstance(source, bytes) else source.stat().st_size
        raise ImageError("empty file" if size == 0 else "not an image") from None
    except FileNotFoundError:
        raise
    except _BROKEN as error:
        raise ImageError(f"unreadable: {error}") from None
    width, height = image.size
    if width * height > max_pixels:
        image.close()
        raise ImageError(f"over-large: {width}x{height} is over max_pixels {max_pixels}")
    return image


def _decode(image: Image.Image, at_least: int | None) -> Image.Image:
    with image:
        if at_least is not None:
            image.draft("RGB", (at_least, at_least))
        try:
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image))
        except _BROKEN as error:
            raise ImageError(f"truncated or corrupt: {error}") from None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in _SIXTEEN_BIT:
        grey = (np.asarray(image, dtype=np.uint32) + 128) // 257
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ImageError(f"unsupported mode {image.mode}: a 32-bit value has no known range")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def inspect(path: Path, max_pixels: int) -> dict:
    """What a manifest says of one file; the file is read once and wholly decoded.

    Returns: sha256 (hex), bytes, width, height, mode, format (as stored, None if unreadable), status
    ("ok" or "quarantined") and reason ("" when ok).

    Raises:
        FileNotFoundError: the file is gone.
    """
    data = path.read_bytes()
    found = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    found |= {"width": None, "height": None, "mode": None, "format": None}
    try:
        image = _open(data, max_pixels)
        found |= {"width": image.width, "height": image.height, "mode": image.mode, "format": image.format}
        _decode(image, None)
    except ImageError as error:
        return found | {"status": "quarantined", "reason": str(error)}
    return found | {"status": "ok", "reason": ""}
