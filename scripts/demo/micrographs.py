"""Pictures that look like gels and micrographs, by numpy and Pillow."""

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

# stain: (ground, mark)
GELS = {
    "grey": ((205, 205, 205), (30, 30, 30)),
    "blue": ((225, 230, 245), (30, 50, 150)),
    "orange": ((30, 15, 10), (255, 150, 50)),
    "green": ((8, 25, 12), (90, 245, 120)),
}
TISSUES = {
    "purple": ((245, 205, 225), (95, 40, 140)),
    "blue": ((8, 8, 25), (70, 110, 255)),
    "green": ((8, 22, 8), (70, 230, 90)),
    "red": ((25, 6, 8), (245, 60, 60)),
    "brown": ((225, 225, 235), (130, 75, 30)),
}
_GRAIN = 5.0  # standard deviation of the noise, of 255


def gel(size: tuple[int, int], count: int, stain: str, form: str, style: str, rng: np.random.Generator) -> Image.Image:
    """`count` lanes with bands in one to three rows; `form` is how strong the bands are from left to right."""
    width, height = size
    rows = {"one row": 1, "two rows": 2, "three rows": 3}[style]
    strengths = {
        "rising": np.linspace(0.15, 1, count),
        "falling": np.linspace(1, 0.15, count),
        "equal": np.full(count, 0.9),
        "gap": np.where(np.arange(count) == rng.integers(count), 0.0, 0.9),
    }[form]
    mask = Image.new("L", size)
    pen = ImageDraw.Draw(mask)
    lane = 0.92 * width / count
    half = lane * rng.uniform(0.32, 0.4)
    tops = np.linspace(0.28, 0.82, rows) if rows > 1 else np.array([rng.uniform(0.4, 0.65)])
    tops += rng.uniform(-0.03, 0.03, rows)
    thick = height * rng.uniform(0.04, 0.055)
    for number, strength in enumerate(strengths):
        x = 0.04 * width + (number + 0.5) * lane
        smile = rng.normal(0, 0.006) * height
        for top in tops:
            y, bold = top * height + smile, thick * (0.55 + 0.45 * strength)
            pen.rounded_rectangle((x - half, y - bold, x + half, y + bold), bold, round(255 * strength))
    return _stained(mask.filter(ImageFilter.GaussianBlur(0.012 * width)), GELS[stain], rng)


def microscopy(
    size: tuple[int, int], count: int, stain: str, form: str, style: str, rng: np.random.Generator
) -> Image.Image:
    """Cells of one form on a ground; `style` is how many there are and whether they lie together."""
    del count
    side = min(size)
    mask = Image.new("L", size, 25)
    pen = ImageDraw.Draw(mask)
    number = {"sparse": 8, "dense": 45, "clustered": 22}[style] + int(rng.integers(-2, 3))
    mean = side * {"sparse": 0.06, "dense": 0.05, "clustered": 0.05}[style]
    for x, y in _spots(size, number, style, rng):
        r, angle, light = mean * rng.uniform(0.85, 1.2), rng.uniform(0, np.pi), int(rng.integers(170, 256))
        if form == "branched":
            for turn in angle + np.arange(4) * np.pi / 2 + rng.uniform(-0.3, 0.3, 4):
                reach = r * rng.uniform(1.7, 2.4)
                tip = (x + reach * np.cos(turn), y + reach * np.sin(turn))
                pen.line((x, y, *tip), light, max(round(0.4 * r), 1))
            pen.ellipse((x - 0.7 * r, y - 0.7 * r, x + 0.7 * r, y + 0.7 * r), light)
        else:
            long, short = (1.9 * r, 0.5 * r) if form == "elongated" else (r, r)
            turn = np.linspace(0, 2 * np.pi, 20, endpoint=False)
            dx, dy = long * np.cos(turn), short * np.sin(turn)
            across, down = np.cos(angle) * dx - np.sin(angle) * dy, np.sin(angle) * dx + np.cos(angle) * dy
            pen.polygon([*zip((x + across).tolist(), (y + down).tolist(), strict=True)], light)
    return _stained(mask.filter(ImageFilter.GaussianBlur(0.006 * side)), TISSUES[stain], rng)


def _spots(size: tuple[int, int], number: int, style: str, rng: np.random.Generator) -> np.ndarray:
    """Middles of cells in pixels, [number,2]: anywhere, or around two places."""
    if style == "clustered":
        middles = np.array([(0.28, 0.3), (0.72, 0.7)] if rng.random() < 0.5 else [(0.72, 0.3), (0.28, 0.7)])
        places = middles[rng.integers(2, size=number)] + rng.normal(0, 0.09, (number, 2))
        return np.clip(places, 0.03, 0.97) * size
    # the most distant of some candidates each time: cells lie apart
    places = rng.uniform(0.05, 0.95, (1, 2))
    for _ in range(number - 1):
        tried = rng.uniform(0.05, 0.95, (6, 2))
        nearest = ((tried[:, None] - places[None]) ** 2).sum(-1).min(1)
        places = np.concatenate([places, tried[[nearest.argmax()]]])
    return places * size


def _stained(mask: Image.Image, stain: tuple, rng: np.random.Generator) -> Image.Image:
    """From the ground's colour to the mark's by the mask, with grain and one side lighter than the other."""
    ground, mark = (np.array(colour, np.float32) + rng.normal(0, 6, 3).astype(np.float32) for colour in stain)
    share = np.asarray(mask, np.float32)[..., None] / 255
    picture = ground + share * (mark - ground)
    across = np.linspace(-1, 1, mask.width, dtype=np.float32)[None, :, None] * np.float32(rng.uniform(-10, 10))
    grain = rng.standard_normal((mask.height, mask.width, 1), np.float32) * np.float32(2 * _GRAIN)
    return Image.fromarray(np.clip(picture + across + grain, 0, 255).astype(np.uint8))


PAINTERS = {"gel": gel, "microscopy": microscopy}
