"""Contact sheets: pictures in rows, with captions and marks."""

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont

from scripts.common import images, plots
from scripts.common.artefacts import atomic_path
from scripts.common.errors import KilnError

_MAX_SHEET_PIXELS = 100_000_000


class Tile(NamedTuple):
    """One picture of a contact sheet.

    Attributes:
        image: an image file, a PIL image, or None for an item without a picture (a grey box is shown).
        caption: any length; what does not fit its lines ends in an ellipsis.
        mark: "good" (green frame and tick), "bad" (red frame and cross), or None.
    """

    image: Path | Image.Image | None
    caption: str = ""
    mark: str | None = None


def contact_sheet(
    path: Path,
    rows: Sequence[tuple[str, Sequence[Tile]]],
    title: str,
    columns: int = 8,
    size: int = 160,
    caption_lines: int = 2,
    max_pixels: int = 100_000_000,
) -> None:
    """Thumbnails in rows [(label, tiles)]; a row with more than `columns` tiles goes on in the next line.

    Args:
        size: side of a thumbnail in pixels. JPEGs are decoded at a reduced size, so that large ones are cheap.
        caption_lines: lines kept for captions.
        max_pixels: images over this are refused.

    Raises:
        KilnError: a file that is missing or is no image, or more tiles than one picture can show.
        ValueError: an unknown mark.
    """
    lines = []
    for label, tiles in rows:
        tiles = [Tile(*tile) for tile in tiles]
        for start in range(0, max(len(tiles), 1), columns):
            lines.append((label if start == 0 else "", tiles[start : start + columns]))
    small, large = _font(13), _font(19)
    gap, margin, line_height = 14, 16, 18
    label_width = min(200, max((math.ceil(small.getlength(label)) for label, _ in lines), default=0))
    left = margin + (label_width + gap if label_width else 0)
    used = max((len(tiles) for _, tiles in lines), default=0)
    captions = caption_lines if any(tile.caption for _, tiles in lines for tile in tiles) else 0
    row_height = size + captions * line_height + gap + 6
    width = max(left + used * (size + gap) - gap + margin, 480)
    heading = _wrapped(title, large, width - 2 * margin, 3)
    top = margin + 26 * len(heading) + gap
    height = top + len(lines) * row_height + margin - gap
    if width * height > _MAX_SHEET_PIXELS:
        raise KilnError(f"{path.name}: {len(lines)} lines of thumbnails are too many", "show a sample, or smaller ones")
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    for i, text in enumerate(heading):
        draw.text((margin, margin + 26 * i), text, font=large, fill=plots.INK)
    for i, (label, tiles) in enumerate(lines):
        y = top + i * row_height
        label_lines = _wrapped(label, small, label_width, 4)
        for j, text in enumerate(label_lines):
            middle = y + (size - line_height * len(label_lines)) // 2
            draw.text((margin, middle + j * line_height), text, font=small, fill=plots.INK)
        for j, tile in enumerate(tiles):
            x = left + j * (size + gap)
            _paste(sheet, draw, tile, x, y, size, max_pixels)
            for k, text in enumerate(_wrapped(tile.caption, small, size, captions)):
                centred = x + (size - small.getlength(text)) / 2
                draw.text((centred, y + size + 6 + k * line_height), text, font=small, fill=plots.INK)
    with atomic_path(path) as temporary:
        sheet.save(temporary, format="PNG")


@functools.cache
def _font(pixels: int) -> ImageFont.FreeTypeFont:
    # Pillow does not fall back from font to font; the Chinese one has Latin letters too.
    path = plots.cjk_font_file() or font_manager.findfont("DejaVu Sans")
    return ImageFont.truetype(str(path), pixels)


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width: float, lines: int) -> list[str]:
    """`text` in at most `lines` lines of at most `width` pixels; broken at spaces, else anywhere."""
    made: list[str] = []
    rest = " ".join(str(text).split())
    while rest and len(made) < lines:
        fits = _fitting(rest, font, width)
        if fits == len(rest):
            return [*made, rest]
        if len(made) == lines - 1:
            kept = _fitting(rest, font, width, "…")
            return [*made, rest[:kept].rstrip() + "…"]
        space = rest.rfind(" ", 0, fits + 1)
        cut = space if space > fits // 2 else fits
        made.append(rest[:cut].rstrip())
        rest = rest[cut:].lstrip()
    return made


def _fitting(text: str, font: ImageFont.FreeTypeFont, width: float, tail: str = "") -> int:
    """How many letters of `text`, with `tail` after them, are at most `width` pixels wide."""
    low, high = 1, len(text)  # at least one letter, or wrapping would not end
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if font.getlength(text[:middle] + tail) <= width else (low, middle - 1)
    return low


def _paste(sheet: Image.Image, draw: ImageDraw.ImageDraw, tile: Tile, x: int, y: int, size: int, max_pixels: int):
    box = (x, y, x + size - 1, y + size - 1)
    if tile.image is None:
        draw.rectangle(box, fill="#EEEEEE")
        draw.line((x, y, x + size, y + size), fill="#CCCCCC", width=2)
        draw.line((x, y + size, x + size, y), fill="#CCCCCC", width=2)
    else:
        draw.rectangle(box, fill="#F4F4F4")
        picture = _thumbnail(tile.image, size, max_pixels)
        sheet.paste(picture, (x + (size - picture.width) // 2, y + (size - picture.height) // 2))
    if tile.mark is None:
        return
    if tile.mark not in ("good", "bad"):
        raise ValueError(f"mark {tile.mark!r} is not good, bad or None")
    frame = (x - 4, y - 4, x + size + 3, y + size + 3)  # around the picture: it hides none of it
    draw.rectangle(frame, outline=plots.GOOD if tile.mark == "good" else plots.BAD, width=4)
    badge = _badge(tile.mark)
    sheet.paste(badge, (x + size - badge.width, y), badge)


def _thumbnail(image: Path | Image.Image, size: int, max_pixels: int) -> Image.Image:
    if isinstance(image, Image.Image):
        picture = image.convert("RGB")
    else:
        try:
            picture = images.open_rgb(Path(image), max_pixels, at_least=size)
        except FileNotFoundError:
            raise KilnError(f"{image}: no such image (for a contact sheet)", "was it moved or deleted?") from None
        except images.ImageError as error:
            raise KilnError(f"{image}: {error}", "show it as a tile without a picture") from None
    scale = size / max(picture.size)
    wanted = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    # Enlarged pictures keep their pixels: a reader should see that they are small.
    return picture.resize(wanted, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)


@functools.cache
def _badge(mark: str, side: int = 26) -> Image.Image:
    """A tick or a cross on a square, for readers who cannot tell the frames' colours apart."""
    large = 4 * side  # drawn large and reduced: smooth edges
    badge = Image.new("RGBA", (large, large), plots.GOOD if mark == "good" else plots.BAD)
    draw = ImageDraw.Draw(badge)
    strokes = (
        [[(0.22, 0.52), (0.43, 0.74), (0.80, 0.28)]]
        if mark == "good"
        else [[(0.26, 0.26), (0.74, 0.74)], [(0.74, 0.26), (0.26, 0.74)]]
    )
    for stroke in strokes:
        draw.line([(a * large, b * large) for a, b in stroke], fill="white", width=large // 8, joint="curve")
    return badge.resize((side, side), Image.Resampling.LANCZOS)
