"""Figures of the reports, in one style: legible, colour-blind safe, with Chinese text, equal bytes for equal data.

Figures are made without pyplot, so they need no display, share no state, and leave nothing open.
"""

import contextlib
import functools
import importlib.util
import itertools
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from cycler import cycler
from matplotlib import font_manager
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike
from PIL import Image, ImageDraw, ImageFont

from scripts.common import images
from scripts.common.artefacts import atomic_path
from scripts.common.errors import KilnError

log = logging.getLogger("kiln")

# Okabe & Ito, "Color Universal Design" (2008); yellow is left out: on white it cannot be read.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
GOOD, BAD, GREY, INK = "#009E73", "#D55E00", "#8C8C8C", "#222222"
DPI = 110
CJK_FAMILY = "Noto Sans CJK SC"
_MAX_SHEET_PIXELS = 100_000_000


@functools.cache
def cjk_font_file() -> Path | None:
    """The packaged font with Chinese glyphs; None, with one warning, where `mplfonts` is not installed."""
    found = importlib.util.find_spec("mplfonts")  # located, not imported: importing it changes global settings
    for folder in (found.submodule_search_locations or []) if found else []:
        path = Path(folder) / "fonts" / "NotoSansCJKsc-Regular.otf"
        if path.is_file():
            return path
    log.warning("no font for Chinese text: figures show boxes in its place; pip install mplfonts")
    return None


@functools.cache
def _families() -> list[str]:
    path = cjk_font_file()
    if path is None:
        return ["DejaVu Sans"]
    font_manager.fontManager.addfont(path)
    return ["DejaVu Sans", CJK_FAMILY]


@contextlib.contextmanager
def style() -> Iterator[None]:
    """Context in which figures are made: fonts, colours, sizes; matplotlib's own settings come back after it."""
    cycle = cycler(linestyle=["-", "--", ":", "-."]) * cycler(color=PALETTE)
    wanted = {
        "font.family": _families(),
        "font.size": 11,
        "axes.titlesize": 12,
        "axes.titlepad": 10,
        "axes.labelsize": 11,
        "axes.edgecolor": INK,
        "axes.labelcolor": INK,
        "text.color": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.prop_cycle": cycle,
        "axes.unicode_minus": True,
        "grid.color": "#E3E3E3",
        "grid.linewidth": 0.8,
        "legend.frameon": False,
        "legend.fontsize": 10,
        "lines.linewidth": 1.8,
        "figure.constrained_layout.use": True,
        "figure.constrained_layout.h_pad": 0.09,
        "figure.constrained_layout.w_pad": 0.09,
        "figure.facecolor": "white",
        "figure.dpi": DPI,
    }
    # From the defaults, not from the user's matplotlibrc: equal data must give equal bytes.
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **wanted, "backend": matplotlib.rcParams["backend"]}):
        yield


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG of `figure size in inches x DPI` pixels, atomically, with no date or version in it."""
    with style(), atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=DPI, metadata={"Software": None})


def curves(
    path: Path,
    series: Mapping[str, tuple[ArrayLike, ArrayLike]],
    xlabel: str,
    ylabel: str,
    title: str,
    floors: Mapping[str, float] | None = None,
) -> None:
    """Lines {label: (x, y)}, and dashed horizontal `floors` {label: y} to compare them with.

    x and y are (n,) each; a y that is not finite leaves a gap.

    Raises:
        KilnError: no series, an empty one, or x and y of different length.
    """
    if not series:
        raise KilnError(f"{path.name}: nothing to draw", "look at what was logged")
    with style():
        figure, axes = _axes(7.5, 4.6, title)
        for label, (x, y) in series.items():
            x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
            if x.shape != y.shape or x.ndim != 1 or not len(x):
                raise KilnError(f"{path.name}: {label}: {x.shape} x and {y.shape} y", "give one y per x")
            axes.plot(x, y, label=label, marker="o" if len(x) <= 20 else None, markersize=4)
        for (label, y), dash in zip((floors or {}).items(), itertools.cycle([(5, 3), (2, 2), (8, 2, 2, 2)])):
            axes.axhline(y, color=GREY, linewidth=1.4, dashes=dash, label=label)
        axes.set(xlabel=xlabel, ylabel=ylabel)
        if all(float(value).is_integer() for x, _ in series.values() for value in np.asarray(x).ravel()[:1000]):
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _legend(figure, len(series) + len(floors or {}))
        save(figure, path)


def confusion_matrix(
    path: Path, matrix: ArrayLike, labels: Sequence[str], title: str, columns: Sequence[str] | None = None
) -> None:
    """Counts (R, C), rows are true classes; each cell has its count and its share of the row, which colours it.

    Over 20 classes cells have no text, over 40 the classes no names: neither could be read. `columns` are
    the names of the predictions where they are not the classes (with "no answer", say).

    Raises:
        KilnError: names that do not fit the matrix.
    """
    matrix = np.asarray(matrix)
    columns = labels if columns is None else columns
    if matrix.shape != (len(labels), len(columns)) or not matrix.size:
        raise KilnError(f"{path.name}: {len(labels)} x {len(columns)} names for {matrix.shape}", "name each class once")
    totals = matrix.sum(axis=1, keepdims=True)
    shares = np.divide(matrix, totals, out=np.zeros(matrix.shape), where=totals > 0)
    rows, wide = matrix.shape
    longest, tallest = (max(len(str(name)) for name in names) for names in (labels, columns))
    with style():
        width, height = 2.6 + 0.09 * longest + 0.85 * wide, 1.8 + 0.06 * tallest + 0.7 * rows
        figure, axes = _axes(min(max(width, 4.8), 20), min(max(height, 3.6), 20), title)
        axes.grid(False)
        shown = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        figure.colorbar(shown, ax=axes, label="share of the true class", fraction=0.05)
        if max(rows, wide) <= 40:
            axes.set_xticks(range(wide), columns, **({"rotation": 35, "ha": "right"} if tallest > 8 else {}))
            axes.set_yticks(range(rows), labels)
        axes.set(xlabel="predicted", ylabel="true")
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        for row, column in np.ndindex(matrix.shape) if max(rows, wide) <= 20 else ():
            share = shares[row, column]
            text = f"{matrix[row, column]:,}\n{share:.0%}"
            axes.text(column, row, text, ha="center", va="center", color="white" if share > 0.55 else INK, fontsize=10)
        save(figure, path)


def distribution(
    path: Path, values: ArrayLike, title: str, xlabel: str, marks: Mapping[str, float] | None = None
) -> None:
    """Histogram of (n,) finite values, with vertical lines at `marks` {label: x}.

    Raises:
        KilnError: no values, or one that is not finite.
    """
    values = np.asarray(values, dtype=float).ravel()
    if not len(values) or not np.isfinite(values).all():
        raise KilnError(f"{path.name}: no values, or one that is not finite", "find out which item it is and why")
    with style():
        figure, axes = _axes(7.5, 4.2, f"{title}  (n = {len(values):,})")
        edges = np.histogram_bin_edges(values, bins="auto")
        if len(edges) > 61:  # a far outlier makes thousands of bins
            edges = np.histogram_bin_edges(values, bins=60)
        axes.hist(values, bins=edges, color=PALETTE[4], edgecolor="white", linewidth=0.6)
        for (label, x), colour in zip((marks or {}).items(), itertools.cycle((PALETTE[1], PALETTE[6], PALETTE[2]))):
            axes.axvline(x, color=colour, linestyle="--", label=f"{label}: {x:.4g}")
        axes.set(xlabel=xlabel, ylabel="items")
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        _legend(figure, len(marks or {}))
        save(figure, path)


def funnel(path: Path, stages: Sequence[tuple[str, int]], title: str) -> None:
    """How many items are left after each stage [(label, count)], with shares of the first and of the one before.

    Raises:
        KilnError: no stage, or a negative count.
    """
    if not stages or min(count for _, count in stages) < 0:
        raise KilnError(f"{path.name}: stages {list(stages)}", "give at least one stage, and counts of 0 or more")
    names, counts = [name for name, _ in stages], [count for _, count in stages]
    most = max(*counts, 1)
    with style():
        figure, axes = _axes(8.2, 1.2 + 0.55 * len(stages), title)
        axes.grid(False)
        axes.barh(range(len(counts)), counts, color=PALETTE[0], height=0.62)
        for i, count in enumerate(counts):
            text = f"{count:,}"
            if i and counts[0]:
                text += f"   {count / counts[0]:.1%} of all"
            if i > 1 and counts[i - 1]:
                text += f", {count / counts[i - 1]:.1%} of the stage before"
            axes.text(count + 0.012 * most, i, text, va="center", fontsize=10)
        axes.set_yticks(range(len(names)), names)
        axes.set_xlim(0, most * 1.75)  # room for the text of a full bar
        axes.set_xticks([])
        axes.invert_yaxis()
        axes.tick_params(length=0)
        axes.spines["bottom"].set_visible(False)
        save(figure, path)


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
        draw.text((margin, margin + 26 * i), text, font=large, fill=INK)
    for i, (label, tiles) in enumerate(lines):
        y = top + i * row_height
        label_lines = _wrapped(label, small, label_width, 4)
        for j, text in enumerate(label_lines):
            middle = y + (size - line_height * len(label_lines)) // 2
            draw.text((margin, middle + j * line_height), text, font=small, fill=INK)
        for j, tile in enumerate(tiles):
            x = left + j * (size + gap)
            _paste(sheet, draw, tile, x, y, size, max_pixels)
            for k, text in enumerate(_wrapped(tile.caption, small, size, captions)):
                centred = x + (size - small.getlength(text)) / 2
                draw.text((centred, y + size + 6 + k * line_height), text, font=small, fill=INK)
    with atomic_path(path) as temporary:
        sheet.save(temporary, format="PNG")


def _axes(width: float, height: float, title: str):
    figure = Figure(figsize=(width, height))
    axes = figure.add_subplot()
    # On the figure, not the axes: there it is wrapped at the edge of the picture, and takes its room.
    figure.suptitle(title, fontsize=13, wrap=True)
    return figure, axes


def _legend(figure: Figure, entries: int) -> None:
    if entries:  # below the axes, where it hides no data
        figure.legend(loc="outside lower center", ncols=1 if entries == 1 else min(3, entries))


@functools.cache
def _font(pixels: int) -> ImageFont.FreeTypeFont:
    # Pillow does not fall back from font to font; the Chinese one has Latin letters too.
    path = cjk_font_file() or font_manager.findfont("DejaVu Sans")
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
    draw.rectangle(frame, outline=GOOD if tile.mark == "good" else BAD, width=4)
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
    badge = Image.new("RGBA", (large, large), GOOD if mark == "good" else BAD)
    draw = ImageDraw.Draw(badge)
    strokes = (
        [[(0.22, 0.52), (0.43, 0.74), (0.80, 0.28)]]
        if mark == "good"
        else [[(0.26, 0.26), (0.74, 0.74)], [(0.74, 0.26), (0.26, 0.74)]]
    )
    for stroke in strokes:
        draw.line([(a * large, b * large) for a, b in stroke], fill="white", width=large // 8, joint="curve")
    return badge.resize((side, side), Image.Resampling.LANCZOS)
