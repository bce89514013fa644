"""Figures by a rule: charts, gels and micrographs as articles print them, each with what it shows.

A figure's kind, number of things, colours, form, style and panel letter are drawn independently of each other and of
how it looks otherwise: size, ground, frame, grid and strokes are those of its article.
"""

from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from scripts.demo import charts, micrographs

COLOURS = ("red", "blue", "green", "orange", "purple", "black")
STAINS = {"gel": ("grey", "blue", "orange", "green"), "microscopy": ("purple", "blue", "green", "red", "brown")}
COUNTS = {"line chart": (1, 2, 3), "bar chart": (3, 4, 5, 6), "scatter plot": (1, 2), "gel": (3, 4, 5, 6)}
FORMS = {
    "line chart": ("rising", "falling", "peaked", "dipping"),
    "bar chart": ("rising", "falling", "peaked", "equal"),
    "scatter plot": ("positive", "negative", "none"),
    "histogram": ("symmetric", "left-skewed", "right-skewed", "bimodal"),
    "gel": ("rising", "falling", "equal", "gap"),
    "microscopy": ("round", "elongated", "branched"),
}
STYLES = {
    "line chart": ("plain", "dashed", "marked"),
    "bar chart": ("vertical", "horizontal"),
    "scatter plot": ("discs", "squares", "crosses"),
    "histogram": ("filled", "outlined"),
    "gel": ("one row", "two rows", "three rows"),
    "microscopy": ("sparse", "dense", "clustered"),
}
KINDS = tuple(FORMS)
LETTERS = ("A", "B", "C", "D")
_LETTERED = 0.4  # share of figures with a panel letter
_ENLARGED = 2  # pictures are drawn so many times larger, then reduced: smooth edges


class Figure(NamedTuple):
    """What a figure shows; "" or 0 where its kind has no such thing.

    `colours` are those of the series, of the bars in a group, of the groups of points, of bars and fitted curve of a
    histogram; a gel and a micrograph have one, the stain.
    """

    kind: str
    count: int
    colours: tuple[str, ...]
    form: str
    style: str
    letter: str


class Look(NamedTuple):
    """What the figures of an article have in common: size in pixels, ground, and strokes (share of the width)."""

    size: tuple[int, int]
    ground: tuple[int, int, int]
    boxed: bool
    grid: bool
    stroke: float


def choose_look(rng: np.random.Generator, sides: tuple[int, int]) -> Look:
    """A look with both sides between the two of `sides`, and almost square: models see the middle square."""
    side = rng.uniform(*sides)
    other = np.clip(side * rng.uniform(0.9, 1.1), *sides)
    light = 255 - rng.integers(0, 16, 3) * (rng.random() < 0.5)
    return Look(
        size=(round(side), round(float(other))),
        ground=tuple(int(part) for part in light),
        boxed=bool(rng.random() < 0.5),
        grid=bool(rng.random() < 0.3),
        stroke=float(rng.uniform(0.018, 0.028)),
    )


def choose_figure(rng: np.random.Generator) -> Figure:
    """What a figure is to show."""
    kind = str(rng.choice(KINDS))
    count = int(rng.choice(COUNTS.get(kind, (0,))))
    if kind in STAINS:
        colours = (str(rng.choice(STAINS[kind])),)
    else:
        number = count if kind in ("line chart", "scatter plot") else int(rng.integers(1, 3))
        colours = tuple(str(name) for name in rng.choice(COLOURS, number, replace=False))
    letter = str(rng.choice(LETTERS)) if rng.random() < _LETTERED else ""
    return Figure(kind, count, colours, str(rng.choice(FORMS[kind])), str(rng.choice(STYLES[kind])), letter)


def subtype(figure: Figure) -> str:
    """What sort of its kind a figure is."""
    if figure.kind == "microscopy":
        return "light microscopy" if figure.colours[0] in ("purple", "brown") else "fluorescence microscopy"
    return (
        "blot"
        if figure.colours == ("grey",)
        else "stained gel"
        if figure.kind == "gel"
        else f"{figure.style} {figure.kind}"
    )


def draw(figure: Figure, look: Look, rng: np.random.Generator) -> Image.Image:
    """An RGB picture of `look.size`."""
    size = tuple(side * _ENLARGED for side in look.size)
    if figure.kind in STAINS:
        picture = micrographs.PAINTERS[figure.kind](
            size, figure.count, figure.colours[0], figure.form, figure.style, rng
        )
    else:
        picture = Image.new("RGB", size, look.ground)
        chart = charts.Chart(ImageDraw.Draw(picture), size, look.stroke, rng)
        chart.axes(look.boxed, look.grid)
        charts.PAINTERS[figure.kind](chart, figure.count, figure.colours, figure.form, figure.style)
    if figure.letter:
        _write_letter(picture, figure.letter)
    return picture.resize(look.size, Image.Resampling.BOX)


def _write_letter(picture: Image.Image, letter: str) -> None:
    """In the upper left corner, on a white ground, as journals set it over a micrograph."""
    side = round(0.17 * min(picture.size))
    pen = ImageDraw.Draw(picture)
    pen.rectangle((0, 0, side, side), "white")
    pen.text((side / 2, side / 2), letter, "black", ImageFont.load_default(1.1 * side), anchor="mm")
