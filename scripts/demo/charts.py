"""Line charts, bar charts, scatter plots and histograms, by Pillow."""

import numpy as np
from PIL import ImageDraw

INKS = {
    "red": (214, 39, 40),
    "blue": (31, 90, 200),
    "green": (44, 150, 44),
    "orange": (250, 140, 20),
    "purple": (140, 70, 190),
    "black": (25, 25, 25),
}
_AXIS = (70, 70, 70)
_BINS = 9  # bars of a histogram


class Chart:
    """The plot area of a picture. Points are given in [0, 1], from left to right and from below upwards."""

    def __init__(self, pen: ImageDraw.ImageDraw, size: tuple[int, int], stroke: float, rng: np.random.Generator):
        self.pen, self.rng = pen, rng
        self.width = max(round(stroke * size[0]), 2)
        self.left, self.right = 0.13 * size[0], 0.96 * size[0]
        self.top, self.bottom = 0.1 * size[1], 0.88 * size[1]

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Pixels of a point."""
        return self.left + x * (self.right - self.left), self.bottom + y * (self.top - self.bottom)

    def axes(self, boxed: bool, grid: bool) -> None:
        """Two axes with ticks, or a box; with horizontal grid lines."""
        tick, thin = 1.5 * self.width, max(self.width // 2, 1)
        for part in np.linspace(0, 1, 5)[1:]:
            y, x = self.place(0, part)[1], self.place(part, 0)[0]
            if grid:
                self.pen.line((self.left, y, self.right, y), (215, 215, 215), thin)
            self.pen.line((self.left - tick, y, self.left, y), _AXIS, thin)
            self.pen.line((x, self.bottom, x, self.bottom + tick), _AXIS, thin)
        if boxed:
            self.pen.rectangle((self.left, self.top, self.right, self.bottom), outline=_AXIS, width=thin)
        else:
            self.pen.line((self.left, self.top, self.left, self.bottom, self.right, self.bottom), _AXIS, thin)

    def line(self, points: np.ndarray, ink: tuple[int, ...], dashed: bool = False) -> None:
        """A line through `points` [N,2]; with gaps if `dashed`."""
        pixels = [self.place(x, y) for x, y in points]
        if dashed:
            along = np.concatenate([[0], np.cumsum(np.hypot(*np.diff(pixels, axis=0).T))])
            starts = np.arange(0, along[-1], 6 * self.width)
            ends = np.stack([starts, np.minimum(starts + 3 * self.width, along[-1])], axis=1)
            for pair in ends:
                xs, ys = (np.interp(pair, along, [pixel[i] for pixel in pixels]) for i in (0, 1))
                self.pen.line((xs[0], ys[0], xs[1], ys[1]), ink, self.width)
        else:
            self.pen.line(pixels, ink, self.width, joint="curve")

    def mark(self, x: float, y: float, shape: str, ink: tuple[int, ...], size: float = 1.6) -> None:
        """A disc, square or cross; `size` in strokes from its middle to its side."""
        (cx, cy), r = self.place(x, y), size * self.width
        if shape == "discs":
            self.pen.ellipse((cx - r, cy - r, cx + r, cy + r), ink)
        elif shape == "squares":
            self.pen.rectangle((cx - r, cy - r, cx + r, cy + r), ink)
        else:
            thin = max(round(0.7 * self.width), 1)
            self.pen.line((cx - r, cy - r, cx + r, cy + r), ink, thin)
            self.pen.line((cx - r, cy + r, cx + r, cy - r), ink, thin)

    def bar(self, box: tuple[float, float, float, float], ink: tuple[int, ...], filled: bool = True) -> None:
        """A rectangle from (x0, y0) to (x1, y1)."""
        (x0, y0), (x1, y1) = self.place(*box[:2]), self.place(*box[2:])
        corners = (min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1))
        self.pen.rectangle(corners, ink if filled else None, ink, self.width)


def _course(form: str, x: np.ndarray) -> np.ndarray:
    """Heights in [0, 1] at places `x` in [0, 1]."""
    return {
        "rising": x,
        "falling": 1 - x,
        "peaked": 1 - np.abs(2 * x - 1),
        "dipping": np.abs(2 * x - 1),
        "equal": np.full_like(x, 0.5),
    }[form]


def line_chart(chart: Chart, count: int, colours: tuple[str, ...], form: str, style: str) -> None:
    """`count` lines of one form, one above the other in the order of `colours`."""
    rng = chart.rng
    gap = rng.uniform(0.14, 0.2)
    height = rng.uniform(0.4, 0.9 - gap * (count - 1))
    floor = rng.uniform(0.04, 0.95 - height - gap * (count - 1))
    x = np.linspace(0.04, 0.96, int(rng.integers(6, 9)))
    for number, colour in enumerate(colours):
        y = floor + gap * (count - 1 - number) + height * _course(form, x) + rng.normal(0, 0.015, len(x))
        points = np.stack([x, np.clip(y, 0.01, 0.99)], axis=1)
        chart.line(points, INKS[colour], dashed=style == "dashed")
        if style == "marked":
            for point in points:
                chart.mark(*point, "discs", INKS[colour])


def bar_chart(chart: Chart, count: int, colours: tuple[str, ...], form: str, style: str) -> None:
    """`count` bars, or as many pairs of bars in two colours."""
    rng = chart.rng
    low, high = rng.uniform(0.15, 0.3), rng.uniform(0.75, 0.95)
    lengths = low + (high - low) * _course(form, np.linspace(0, 1, count))
    if form == "equal":
        lengths[:] = rng.uniform(0.4, 0.9)
    share = rng.uniform(0.6, 0.8) / (count * len(colours))  # width of a bar
    for place, length in enumerate(lengths):
        centre = (place + 0.5) / count
        for number, colour in enumerate(colours):
            start = centre + (number - len(colours) / 2) * share
            end = np.clip(length + rng.normal(0, 0.015), 0.05, 1)
            box = (start, 0, start + share, end) if style == "vertical" else (0, 1 - start, end, 1 - start - share)
            chart.bar(box, INKS[colour])


def scatter_plot(chart: Chart, count: int, colours: tuple[str, ...], form: str, style: str) -> None:
    """Points of `count` groups along one slope, or without any; groups lie among each other."""
    rng = chart.rng
    slope = {"positive": 1, "negative": -1, "none": 0}[form]
    for colour in colours:
        x = rng.uniform(0.04, 0.96, int(rng.integers(18, 30)) // count)
        spread = 0.07 if slope else 0.24
        y = 0.5 + slope * rng.uniform(0.75, 0.95) * (x - 0.5) + rng.normal(0, spread, len(x))
        for point in zip(x, np.clip(y, 0.03, 0.97), strict=True):
            chart.mark(*point, style, INKS[colour], 1.7 if style == "crosses" else 1.35)


def histogram(chart: Chart, count: int, colours: tuple[str, ...], form: str, style: str) -> None:
    """Bars without gaps, and a curve through their tops if there is a second colour."""
    del count
    rng = chart.rng
    x = (np.arange(_BINS) + 0.5) / _BINS
    heights = {
        "symmetric": np.exp(-(((x - 0.5) / 0.2) ** 2)),
        "right-skewed": (x / 0.18) * np.exp(1 - x / 0.18),
        "left-skewed": ((1 - x) / 0.18) * np.exp(1 - (1 - x) / 0.18),
        "bimodal": np.exp(-(((x - 0.22) / 0.1) ** 2)) + np.exp(-(((x - 0.78) / 0.1) ** 2)),
    }[form]
    heights = rng.uniform(0.75, 0.92) * np.clip(heights + rng.normal(0, 0.03, _BINS), 0.03, 1.05)
    for place, height in enumerate(heights):
        chart.bar((place / _BINS, 0, (place + 1) / _BINS, height), INKS[colours[0]], filled=style == "filled")
        if style == "filled":  # a thin edge between neighbours
            edge = [chart.place((place + 1) / _BINS, y) for y in (0, height)]
            chart.pen.line(edge, "white", max(chart.width // 2, 1))
    for colour in colours[1:]:
        chart.line(np.stack([x, np.clip(heights + 0.04, 0, 0.99)], axis=1), INKS[colour])


PAINTERS = {"line chart": line_chart, "bar chart": bar_chart, "scatter plot": scatter_plot, "histogram": histogram}
