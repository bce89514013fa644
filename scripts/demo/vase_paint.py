"""What is painted on a vase: figures on the main face, a lesser figure behind, bands around it.

A painting is a (rows, columns) array of labels over a `vase_shapes.Wall`: rows from lip to foot,
columns by angle, the front in the middle.
"""

import numpy as np
from PIL import Image, ImageChops, ImageDraw

from scripts.demo.vase_shapes import Shape, Wall

CLAY, GLAZE, PURPLE, CREAM, FRACTURE = range(5)
FABRICS = {"Athenian": (196, 108, 58), "Corinthian": (205, 168, 112), "Apulian": (172, 88, 66)}
BANDS = ("meander", "dots", "tongues", "waves", "chevrons", "checkers")
SCENES = ("warriors", "dancers", "riders", "athletes")

_MEANDER = np.array(
    [[int(c) for c in row] for row in ("11111110", "10000010", "10111010", "10101010", "10001010", "11111011")],
    dtype=bool,
)


def palette(fabric: str, rng: np.random.Generator) -> np.ndarray:
    """Colours (5, 3) in 0..255 of the labels, slightly different for each vase."""
    clay = np.array(FABRICS[fabric]) * rng.uniform(0.9, 1.1) + rng.normal(0, 5, 3)
    glaze = np.array([26, 22, 21]) * rng.uniform(0.7, 1.6) + rng.uniform(0, 8) * np.array([1, 0.4, 0])
    return np.clip(np.stack([clay, glaze, [112, 34, 38], [222, 208, 178], clay * 1.12 + 8]), 0, 255).astype(np.float32)


def paint(shape: Shape, wall: Wall, stretch: float, style: dict, rng: np.random.Generator) -> np.ndarray:
    """The labels (rows, columns) of one vase.

    Args:
        stretch: factor on the shape's heights.
        style: `technique`, `decoration` (of SCENES) and `band` (of BANDS).
    """
    black_figure = style["technique"] == "black-figure"
    ground, ink = (CLAY, GLAZE) if black_figure else (GLAZE, CLAY)
    rows, columns = len(wall.height), wall.columns
    canvas = Image.new("L", (columns, rows), ground)
    draw = ImageDraw.Draw(canvas)

    def row(height: float) -> int:
        return int(np.interp(-height * stretch, -wall.height, np.arange(rows)))

    def zone(low: float, high: float, label: int) -> None:
        draw.rectangle((0, row(high), columns, row(low)), fill=label)

    low, high = shape.frieze
    top = wall.height.max() / stretch
    belt = 0.045 if top > 0.5 else 0.03
    zone(0, shape.foot, GLAZE)
    zone(top - 0.035, top, GLAZE)
    if black_figure:
        zone(low - 2.2 * belt, low - 1.4 * belt, GLAZE)
        _band(canvas, "rays", row(low - 2.2 * belt), row(shape.foot), CLAY, GLAZE)
    else:
        zone(shape.foot, shape.foot + 0.008, CLAY)
    _band(canvas, style["band"], row(low), row(low - belt), ground, ink)
    above = min(high + belt, top - 0.04)
    _band(canvas, style["band"] if rng.random() < 0.5 else "tongues", row(above), row(high), ground, ink)
    if shape.shoulder < 1:
        if shape.shoulder - above > 0.05:
            _band(canvas, "tongues", row(shape.shoulder), row(shape.shoulder - 0.05), ground, ink)
        if black_figure:
            _band(canvas, "chevrons", row(top - 0.06), row(shape.shoulder + 0.02), CLAY, GLAZE)
    place = (row(high) + 3, row(low) - 2)
    count = int(rng.integers(2, 5)) if style["decoration"] != "riders" else int(rng.integers(1, 3))
    draw_scene(canvas, style["decoration"], count, columns // 2, place, ground, ink, rng)
    canvas = ImageChops.offset(canvas, columns // 2, 0)
    # the back carries a lone cloaked figure or a palmette: that is what tells it from the front
    if rng.random() < 0.6:
        _cloaked(Pen(canvas, columns // 2, place, 1 if rng.random() < 0.5 else -1, ground, ink))
    else:
        _palmette(Pen(canvas, columns // 2, place, 1, ground, ink), 0.5, 0.9)
    canvas = ImageChops.offset(canvas, columns // 4, 0)
    for side in (0.5, 0.0):  # below the handles
        turned = ImageChops.offset(canvas, int(side * columns), 0)
        _palmette(Pen(turned, columns // 2, place, 1, ground, ink), 0.45, 0.6)
        canvas = ImageChops.offset(turned, -int(side * columns), 0)
    return np.asarray(ImageChops.offset(canvas, columns // 4, 0))


def _band(canvas: Image.Image, name: str, first: int, last: int, ground: int, ink: int) -> None:
    """One ornament all around, between two rows, with a line above and below."""
    columns = canvas.width
    tall = last - first
    if tall < 6:
        return
    wide = {"meander": 1.2, "waves": 1.6, "tongues": 0.55, "rays": 0.45, "chevrons": 0.8, "dots": 0.8, "checkers": 0.8}
    cells = max(int(columns / (tall * wide[name])), 8)
    u = (np.arange(columns) * cells / columns % 1)[None, :]
    v = ((np.arange(tall) + 0.5) / tall)[:, None]
    if name == "meander":
        inside = np.clip((v - 0.12) / 0.76, 0, 0.999)
        rows, places = np.broadcast_arrays((inside * 6).astype(int), (u * 8).astype(int))
        on = _MEANDER[rows, places] & (v > 0.12) & (v < 0.88)
    elif name == "dots":
        on = (u - 0.5) ** 2 * wide[name] ** 2 + (v - 0.5) ** 2 < 0.085
    elif name == "tongues":
        on = (np.abs(u - 0.5) < 0.3) & ((v < 0.62) | ((u - 0.5) ** 2 / 0.09 + (v - 0.62) ** 2 / 0.09 < 1)) & (v > 0.12)
    elif name == "rays":
        on = np.abs(u - 0.5) < 0.42 * v
    elif name == "waves":
        on = v > 0.5 + 0.3 * np.sin(2 * np.pi * (u + 0.18 * np.sin(2 * np.pi * u)))
    elif name == "chevrons":
        on = (v + 1.2 * np.abs(u - 0.5)) % 0.5 < 0.22
    else:
        on = (u < 0.5) ^ (v < 0.5)
    patch = np.where(on, ink, ground).astype(np.uint8)
    edge = max(tall // 14, 1)
    if name != "rays":
        patch[:edge] = patch[-edge:] = ink
    canvas.paste(Image.fromarray(np.ascontiguousarray(patch)), (0, first))


class Pen:
    """Draws one figure in a box of unit height: x to the figure's front, y from 0 (head) to 1 (feet)."""

    def __init__(self, canvas: Image.Image, centre: float, rows: tuple[int, int], facing: int, ground: int, ink: int):
        self.draw = ImageDraw.Draw(canvas)
        self.centre, self.top, self.size = centre, rows[0], rows[1] - rows[0]
        self.facing, self.ground, self.ink = facing, ground, ink

    def at(self, x: float, y: float) -> tuple[float, float]:
        return self.centre + self.facing * x * self.size, self.top + y * self.size

    def limb(self, *places: tuple[float, float], width: float = 0.07, label: int | None = None) -> None:
        label = self.ink if label is None else label
        points = [self.at(*p) for p in places]
        thick = max(int(width * self.size), 1)
        self.draw.line(points, fill=label, width=thick, joint="curve")
        if thick > 2:
            for x, y in points:
                self.draw.ellipse((x - thick / 2, y - thick / 2, x + thick / 2, y + thick / 2), fill=label)

    def line(self, *places: tuple[float, float], width: float = 0.014) -> None:
        self.limb(*places, width=width, label=self.ground)

    def area(self, *places: tuple[float, float], label: int | None = None) -> None:
        self.draw.polygon([self.at(*p) for p in places], fill=self.ink if label is None else label)

    def disc(self, x: float, y: float, rx: float, ry: float, label: int | None = None, rim: int | None = None) -> None:
        (cx, cy), s = self.at(x, y), self.size
        box = (cx - rx * s, cy - ry * s, cx + rx * s, cy + ry * s)
        self.draw.ellipse(box, fill=self.ink if label is None else label, outline=rim, width=max(int(0.012 * s), 1))


def draw_scene(canvas, kind: str, count: int, centre: int, rows: tuple[int, int], ground, ink, rng) -> None:
    """`count` figures of one kind side by side around column `centre`, turned towards the middle."""
    tall = rows[1] - rows[0]
    step = (0.95 if kind == "riders" else 0.5) * tall
    # a flat bowl has room for small figures only, so more of them
    room = canvas.width * 0.3
    if tall < 0.18 * room:
        count += 1
    while count > 1 and step * count > room * 1.15:
        count -= 1
    ground_line = ImageDraw.Draw(canvas)
    half = min(step * count / 2 + 0.15 * tall, canvas.width * 0.21)
    ground_line.rectangle((centre - half, rows[1] - 1, centre + half, rows[1]), fill=ink)
    figure = {"warriors": _warrior, "dancers": _dancer, "riders": _rider, "athletes": _athlete}[kind]
    for i in range(count):
        offset = (i - (count - 1) / 2) * step
        facing = 1 if offset < 0 or (offset == 0 and rng.random() < 0.5) else -1
        figure(Pen(canvas, centre + offset, rows, facing, ground, ink), rng)


def _head(pen: Pen, x: float = 0.02, y: float = 0.1) -> None:
    pen.disc(x, y, 0.052, 0.065)
    pen.area((x + 0.04, y - 0.02), (x + 0.075, y + 0.02), (x + 0.04, y + 0.035))
    pen.limb((x - 0.01, y), (x - 0.01, y + 0.1), width=0.045)
    pen.line((x - 0.045, y - 0.025), (x + 0.04, y - 0.03))
    pen.disc(x + 0.022, y - 0.002, 0.01, 0.01, label=pen.ground)


def _body(pen: Pen) -> None:
    pen.area((-0.1, 0.19), (0.1, 0.19), (0.065, 0.42), (0.075, 0.5), (-0.065, 0.5), (-0.06, 0.42))
    pen.line((-0.06, 0.44), (0.065, 0.44))
    pen.line((0.0, 0.22), (0.01, 0.4))


def _legs(pen: Pen, stride: float) -> None:
    pen.limb((0.03, 0.5), (0.05 + stride * 0.7, 0.7), (stride, 0.95), width=0.085)
    pen.limb((-0.03, 0.5), (-stride * 0.5, 0.72), (-stride, 0.95), width=0.08)
    pen.limb((stride, 0.965), (stride + 0.07, 0.97), width=0.04)
    pen.limb((-stride, 0.965), (-stride + 0.07, 0.97), width=0.04)


def _warrior(pen: Pen, rng) -> None:
    _legs(pen, rng.uniform(0.08, 0.17))
    _body(pen)
    _head(pen)
    pen.limb((-0.08, 0.05), (-0.05, -0.0), (0.03, -0.0), width=0.05, label=PURPLE)
    pen.limb((-0.08, 0.05), (-0.1, 0.15), width=0.04, label=PURPLE)
    slope = rng.uniform(-0.15, 0.35)
    pen.limb((-0.24, 0.22 - 0.2 * slope), (0.3, 0.22 + 0.5 * slope), width=0.02)
    pen.limb((-0.08, 0.2), (-0.15, 0.28), (-0.1, 0.24), width=0.045)
    shield = CREAM if rng.random() < 0.4 else pen.ink
    pen.disc(0.1, 0.36, 0.15, 0.16, label=shield, rim=pen.ground)
    pen.disc(0.1, 0.36, 0.05, 0.05, label=PURPLE if rng.random() < 0.5 else pen.ground)


def _athlete(pen: Pen, rng) -> None:
    _legs(pen, rng.uniform(0.1, 0.19))
    _body(pen)
    _head(pen)
    if rng.random() < 0.5:
        pen.limb((-0.08, 0.21), (-0.19, 0.25), (-0.23, 0.16), width=0.05)
        pen.disc(-0.24, 0.12, 0.055, 0.055, rim=pen.ground)
        pen.limb((0.08, 0.21), (0.16, 0.32), (0.22, 0.3), width=0.05)
    else:
        pen.limb((-0.08, 0.21), (-0.16, 0.29), (-0.09, 0.31), width=0.05)
        pen.limb((0.08, 0.21), (0.17, 0.22), (0.22, 0.14), width=0.05)
        pen.limb((-0.2, 0.36), (0.3, 0.06), width=0.016)


def _dancer(pen: Pen, rng) -> None:
    sway = rng.uniform(0.0, 0.08)
    pen.area((-0.08, 0.19), (0.08, 0.19), (0.06, 0.4), (0.15 + sway, 0.93), (-0.17, 0.93), (-0.06, 0.4))
    for x in (-0.11, -0.05, 0.01, 0.07):
        pen.line((x * 0.4, 0.42), (x + 0.4 * sway, 0.91))
    pen.limb((-0.06, 0.4), (0.06, 0.4), width=0.035, label=PURPLE)
    pen.limb((0.02, 0.95), (0.1, 0.965), width=0.04)
    _head(pen)
    pen.limb((0.07, 0.21), (0.17, 0.18), (0.2, 0.02 + sway), width=0.045)
    pen.limb((-0.07, 0.21), (-0.17, 0.29), (-0.21, 0.14), width=0.045)


def _rider(pen: Pen, rng) -> None:
    pen.disc(0.0, 0.6, 0.25, 0.105)
    pen.limb((0.2, 0.55), (0.3, 0.36), width=0.11)
    pen.limb((0.29, 0.34), (0.41, 0.42), width=0.07)
    pen.limb((0.24, 0.42), (0.27, 0.29), width=0.03, label=PURPLE)
    lift = rng.uniform(0, 0.1)
    pen.limb((0.2, 0.65), (0.27, 0.78 - lift), (0.25, 0.95 - lift), width=0.05)
    pen.limb((0.15, 0.66), (0.16, 0.8), (0.12, 0.96), width=0.05)
    pen.limb((-0.19, 0.64), (-0.25, 0.8), (-0.2, 0.96), width=0.055)
    pen.limb((-0.15, 0.66), (-0.16, 0.8), (-0.11, 0.96 - lift), width=0.055)
    pen.limb((-0.23, 0.56), (-0.33, 0.62), (-0.34, 0.8), width=0.035)
    pen.area((-0.1, 0.24), (0.05, 0.24), (0.06, 0.5), (-0.07, 0.5))
    pen.limb((0.0, 0.5), (0.07, 0.62), (0.02, 0.78), width=0.06)
    pen.line((-0.06, 0.52), (0.05, 0.52), (0.1, 0.63), (0.05, 0.79))
    _head(pen, -0.01, 0.15)
    pen.limb((0.03, 0.27), (0.12, 0.36), (0.24, 0.42), width=0.04)


def _cloaked(pen: Pen) -> None:
    pen.area((-0.09, 0.18), (0.09, 0.18), (0.13, 0.5), (0.11, 0.94), (-0.12, 0.94), (-0.12, 0.5))
    pen.line((-0.08, 0.2), (0.11, 0.5))
    pen.line((-0.1, 0.35), (0.1, 0.7))
    pen.line((-0.1, 0.55), (0.04, 0.9))
    _head(pen)
    pen.limb((0.22, 0.2), (0.22, 0.96), width=0.018)


def _palmette(pen: Pen, y: float, size: float) -> None:
    for turn in np.linspace(-1.9, 1.9, 9):
        reach = size * (0.62 - 0.13 * abs(turn))
        x, up = 0.55 * reach * np.sin(turn), reach * np.cos(turn)
        pen.limb((0, y + 0.12 * size), (x, y + 0.12 * size - 0.75 * up), width=0.055 * size)
    pen.disc(0, y + 0.14 * size, 0.09 * size, 0.08 * size, label=PURPLE)
    for side in (-1, 1):
        pen.limb(
            (0, y + 0.3 * size), (side * 0.2 * size, y + 0.38 * size), (side * 0.32 * size, y + 0.26 * size), width=0.03
        )
