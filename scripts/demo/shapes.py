"""Pictures that teach the demo's tiny vision-language model to see, with questions and answers about them.

Two sorts. Coloured: one geometric form with a pattern on it. Grey: flat speckled bands across the picture, at most
one dark blob on them, and at most one straight bar below it. Neither is a vase or an ultrasound picture, and no
pipeline is ever scored on them; but what the questions ask for (colours, forms, outlines, what lies below) is
what those pictures need too.
"""

from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw
from scipy.ndimage import gaussian_filter

COLOURS = {
    "red": (200, 40, 40),
    "green": (50, 150, 60),
    "blue": (50, 70, 200),
    "orange": (205, 105, 45),
    "black": (30, 24, 22),
    "white": (240, 240, 240),
}
FORMS = ("circle", "square", "triangle", "cross", "bar", "diamond", "hourglass", "oval")
PATTERNS = ("spots", "stripes", "zigzag")
OUTLINES = ("smooth", "jagged", "none")
BELOW = ("bright", "dark", "nothing")
EXTENTS = ("wide", "tall", "none")
QUESTIONS = {
    "coloured": {
        "colour": "What colour?",
        "shape": "What shape?",
        "pattern": "What pattern?",
        "describe": "Describe the picture.",
    },
    "grey": {
        "outline": "Which outline?",
        "below": "What lies below it?",
        "extent": "Is it wide or tall?",
        "describe": "Describe the picture.",
    },
}
EMPTY = 1 / 4  # share of grey pictures without a blob
_ENLARGED = 2  # forms are drawn this much larger, then reduced, for even edges


class Sample(NamedTuple):
    """A picture (RGB), its sort (a key of QUESTIONS), and the answer to each question about that sort."""

    picture: Image.Image
    sort: str
    answers: dict[str, str]


def answers() -> dict[tuple[str, str], tuple[str, ...]]:
    """{(sort, kind of question): all answers}, but for `describe`, which combines them."""
    return {
        ("coloured", "colour"): tuple(COLOURS),
        ("coloured", "shape"): FORMS,
        ("coloured", "pattern"): PATTERNS,
        ("grey", "outline"): OUTLINES,
        ("grey", "below"): BELOW,
        ("grey", "extent"): EXTENTS,
    }


def draw(rng: np.random.Generator, sort: str, size: tuple[int, int]) -> Sample:
    """One picture of `sort`, `size` (width, height) pixels."""
    return _coloured(rng, size) if sort == "coloured" else _grey(rng, size)


def _near(rng: np.random.Generator, colour: tuple[int, int, int], spread: int) -> tuple[int, ...]:
    return tuple(int(c) for c in np.clip(np.array(colour) + rng.integers(-spread, spread + 1, 3), 0, 255))


def _coloured(rng: np.random.Generator, size: tuple[int, int]) -> Sample:
    colour, second = (str(name) for name in rng.choice(list(COLOURS), 2, replace=False))
    form, pattern = str(rng.choice(FORMS)), str(rng.choice(PATTERNS))
    width, height = (side * _ENLARGED for side in size)
    canvas = Image.new("RGB", (width, height), _near(rng, (225, 220, 205), 25))
    pen = ImageDraw.Draw(canvas)
    side = min(width, height)
    big = rng.random() < 0.5
    r = side * (rng.uniform(0.32, 0.44) if big else rng.uniform(0.2, 0.3))
    reach = 0.08 if big else 0.18
    x, y = width / 2 + side * rng.uniform(-reach, reach), height / 2 + side * rng.uniform(-reach, reach)
    _draw_form(pen, form, x, y, r, _near(rng, COLOURS[colour], 20))
    _draw_pattern(pen, form, pattern, x, y, r, _near(rng, COLOURS[second], 20))
    text = f"a {colour} {form} with {second} {pattern}"
    known = {"colour": colour, "shape": form, "pattern": pattern, "describe": text}
    return Sample(canvas.resize(size, Image.Resampling.BOX), "coloured", known)


def _draw_form(pen: ImageDraw.ImageDraw, form: str, x: float, y: float, r: float, fill: tuple[int, ...]) -> None:
    boxes = {  # (half width, half height) of rectangles
        "square": [(r, r)],
        "cross": [(r, 0.35 * r), (0.35 * r, r)],
        "bar": [(0.35 * r, r)],
    }
    corners = {
        "triangle": [(0, -1), (1, 1), (-1, 1)],
        "diamond": [(0, -1), (0.8, 0), (0, 1), (-0.8, 0)],
        "hourglass": [(-0.8, -1), (0.8, -1), (0.2, 0), (0.8, 1), (-0.8, 1), (-0.2, 0)],
    }
    if form == "circle":
        pen.ellipse((x - r, y - r, x + r, y + r), fill)
    elif form == "oval":
        pen.ellipse((x - 1.05 * r, y - 0.5 * r, x + 1.05 * r, y + 0.5 * r), fill)
    elif form in boxes:
        for w, h in boxes[form]:
            pen.rectangle((x - w, y - h, x + w, y + h), fill)
    else:
        pen.polygon([(x + r * dx, y + r * dy) for dx, dy in corners[form]], fill)


def _draw_pattern(pen, form: str, pattern: str, x: float, y: float, r: float, fill: tuple[int, ...]) -> None:
    reach = r * {"bar": 0.3, "triangle": 0.6, "hourglass": 0.35}.get(form, 0.75)
    y += {"triangle": 0.3}.get(form, 0) * r
    thick = 0.18 * r
    if pattern == "spots":
        for place in (-1, 0, 1):
            cx = x + reach * place
            pen.ellipse((cx - thick, y - thick, cx + thick, y + thick), fill)
    elif pattern == "stripes":
        for dy in (-0.25, 0.25):
            pen.line([(x - reach, y + dy * r), (x + reach, y + dy * r)], fill, round(thick))
    else:
        points = [(x + reach * (i / 4 - 1), y + r * (0.3 if i % 2 else -0.3)) for i in range(9)]
        pen.line(points, fill, round(thick))


def _grey(rng: np.random.Generator, size: tuple[int, int]) -> Sample:
    width, height = size
    ground = rng.uniform(45, 150)
    picture = np.full((height, width), ground, np.float32)
    for start in rng.uniform(0.1, 0.9, rng.integers(0, 3)):  # flat bands across the picture, to its lower edge
        picture[round(start * height) :] = ground * rng.uniform(0.5, 1.5)
    known = {"outline": "none", "below": "nothing", "extent": "none", "describe": "no blob"}
    if rng.random() >= EMPTY:
        known = {
            "outline": str(rng.choice(OUTLINES[:2])),
            "below": str(rng.choice(BELOW)),
            "extent": str(rng.choice(EXTENTS[:2])),
        }
        known["describe"] = f"a {known['outline']} {known['extent']} blob with {known['below']} below"
        side = min(size)
        mean, stretch = rng.uniform(0.14, 0.22) * side, rng.uniform(1.15, 1.4)
        rx, ry = mean * stretch, mean / stretch
        if known["extent"] == "tall":
            rx, ry = ry, rx
        x = rng.uniform(1.2 * rx, width - 1.2 * rx)
        y = rng.uniform(1.2 * ry, 0.88 * height - ry)  # with room below
        if known["below"] != "nothing":
            half = rx * rng.uniform(0.6, 0.95)
            bar = np.zeros_like(picture)
            bar[round(y) :, max(round(x - half), 0) : round(x + half)] = 1
            change = rng.uniform(0.35, 0.7) if known["below"] == "bright" else -rng.uniform(0.35, 0.7)
            picture += change * ground * gaussian_filter(bar, rng.uniform(0.3, 1.8))
        inside = gaussian_filter(
            _blob(rng, size, (x, y), (rx, ry), known["outline"] == "jagged"), rng.uniform(0.3, 1.0)
        )
        picture += inside * (picture.min() * rng.uniform(0.15, 0.7) - picture)
    grain = gaussian_filter(rng.standard_normal((height, width), np.float32), rng.uniform(0.3, 2.0))
    picture *= 1 + grain * (rng.uniform(0.06, 0.3) / grain.std())  # speckle grows with brightness
    pixels = np.clip(picture, 0, 255).astype(np.uint8)
    return Sample(Image.fromarray(pixels).convert("RGB"), "grey", known)


def _blob(rng: np.random.Generator, size: tuple[int, int], centre, radii, jagged: bool) -> np.ndarray:
    """[height, width] float32: 1 within an ellipse, or within a star that goes in and out of it, else 0."""
    count = 2 * int(rng.integers(6, 10)) if jagged else 72
    angle = np.linspace(0, 2 * np.pi, count, endpoint=False)
    reach = np.ones(count)
    if jagged:
        angle += rng.uniform(-0.3, 0.3, count) * (2 * np.pi / count)
        reach[::2] += rng.uniform(0.2, 0.7, count // 2)
        reach[1::2] -= rng.uniform(0.2, 0.5, count // 2)
    x = centre[0] + radii[0] * reach * np.cos(angle)
    y = centre[1] + radii[1] * reach * np.sin(angle)
    mask = Image.new("L", (size[0] * _ENLARGED, size[1] * _ENLARGED))
    ImageDraw.Draw(mask).polygon([(px * _ENLARGED, py * _ENLARGED) for px, py in zip(x, y, strict=True)], 255)
    return np.asarray(mask.resize(size, Image.Resampling.BOX), np.float32) / 255
