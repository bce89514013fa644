"""Draw the demo's pictures for autoencoders: a handwritten digit among coloured shapes, in ten class folders of JPEGs.

Rule `demo_draw_digits`. The digits are the 1,797 that come with scikit-learn (8 x 8 pixels, UCI ML handwritten
digits), each in one picture, enlarged and coloured. Writes `images/<digit>/<number>.jpg` and `files.json`. Equal
settings give equal bytes.
"""

import colorsys
from collections.abc import Sequence
from pathlib import Path

import joblib
import numpy as np
from PIL import Image, ImageDraw
from sklearn.datasets import load_digits

from scripts.common import artefacts, progress, step, workers
from scripts.demo.settings import DigitsSettings

SHAPES = ("disc", "ring", "square", "triangle", "cross", "stripes")
_ENLARGED = 4  # shapes are drawn so many times larger, then reduced: smooth edges


def draw_picture(digit: np.ndarray, number: int, values: DigitsSettings) -> Image.Image:
    """An RGB picture of `digit` [8,8] in 0 to 16, on a ground of its own, over three or four shapes."""
    rng = np.random.default_rng([values.seed, number])
    side, hue = values.image_size, rng.random()
    picture = Image.new("RGB", (side * _ENLARGED,) * 2, _colour(hue, rng.uniform(0.1, 0.5), rng.uniform(0.75, 1.0)))
    pen = ImageDraw.Draw(picture)
    for kind in rng.choice(SHAPES, rng.integers(3, 5), replace=False):
        colour = _colour(hue + rng.uniform(0.15, 0.85), rng.uniform(0.4, 0.9), rng.uniform(0.55, 0.95))
        _draw_shape(pen, kind, rng.uniform(0.12, 0.88, 2) * side, rng.uniform(0.11, 0.2) * side, colour)
    picture = picture.resize((side, side), Image.Resampling.BOX)
    height = round(rng.uniform(0.5, 0.75) * side)
    ink = Image.fromarray((digit * (255 / 16)).astype(np.uint8)).resize((height, height), Image.Resampling.BICUBIC)
    ink = ink.point(lambda value: min(255, max(0, round((value - 90) * 3))))  # sharper strokes
    left, top = (int(rng.integers(0, side - height + 1)) for _ in range(2))
    dark = _colour(hue + 0.5, rng.uniform(0.5, 1.0), rng.uniform(0.05, 0.3))
    picture.paste(Image.new("RGB", ink.size, dark), (left, top), ink)
    return picture


def _colour(hue: float, saturation: float, value: float) -> tuple[int, ...]:
    return tuple(round(255 * part) for part in colorsys.hsv_to_rgb(hue % 1, saturation, value))


def _draw_shape(pen: ImageDraw.ImageDraw, kind: str, centre: np.ndarray, radius: float, colour) -> None:
    (x, y), r = (float(part) * _ENLARGED for part in centre), radius * _ENLARGED
    box = (x - r, y - r, x + r, y + r)
    if kind == "disc":
        pen.ellipse(box, fill=colour)
    elif kind == "ring":
        pen.ellipse(box, outline=colour, width=round(0.4 * r))
    elif kind == "square":
        pen.rectangle(box, fill=colour)
    elif kind == "triangle":
        pen.polygon([(x, y - r), (x + r, y + r), (x - r, y + r)], fill=colour)
    elif kind == "cross":
        pen.line((x - r, y - r, x + r, y + r), fill=colour, width=round(0.45 * r))
        pen.line((x - r, y + r, x + r, y - r), fill=colour, width=round(0.45 * r))
    else:
        for part in (-0.8, 0.0, 0.8):
            pen.rectangle((x - r, y + (part - 0.2) * r, x + r, y + (part + 0.2) * r), fill=colour)


def _save_picture(path: Path, digit: np.ndarray, number: int, values: DigitsSettings) -> None:
    draw_picture(digit, number, values).save(path, "JPEG", quality=92)


def write_demo(folder: Path, values: DigitsSettings, processes: int) -> int:
    """Fill an existing empty `folder`; the number of pictures written."""
    digits = load_digits()
    for name in digits.target_names:
        (folder / "images" / str(name)).mkdir(parents=True)
    work = workers.pool(processes, return_as="generator")(
        joblib.delayed(_save_picture)(
            folder / "images" / str(digits.target[number]) / f"{number:04d}.jpg", digits.images[number], number, values
        )
        for number in range(values.pictures)
    )
    for _ in progress.bar(work, "draw", values.pictures):
        pass
    return len(artefacts.write_listing(folder))


def main(argv: Sequence[str] | None = None) -> None:
    made = step.parser(__doc__, DigitsSettings)
    made.add_argument("--output-folder", type=Path, required=True, help="folder to make or replace")
    args = made.parse_args(argv)
    values = step.read_settings(args)
    record = step.record(args, "scripts.demo.draw_digits", values, {})
    folder = args.output_folder
    with artefacts.atomic_folder(folder) as temporary:
        count = write_demo(temporary, values, step.threads(args))
    record.write(args.meta, [folder / "files.json"], items=count)


if __name__ == "__main__":
    step.run(main)
