"""Ancient vases that never were: what each one is, and its photographs from six sides."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from scripts.demo import vase_paint
from scripts.demo.vase_camera import Shot, photograph
from scripts.demo.vase_flaws import FLAWS, spoil_shot, spoil_vase
from scripts.demo.vase_shapes import SHAPES, Surface, make_surface, make_wall

# azimuth and elevation of the camera in degrees, and how much of the main face it sees
SIDES = {
    "front": (0, 8, 1.0),
    "left": (-90, 8, 0.55),
    "back": (180, 8, 0.6),
    "right": (90, 8, 0.55),
    "top": (0, 58, 0.25),
    "bottom": (0, -62, 0.15),
}
TECHNIQUES = ("black-figure", "red-figure")
_BOWLS = ("krater", "kylix")  # glazed within
_EARLIEST = {"black-figure": -575, "red-figure": -525}
_LATER = {"amphora": 0, "krater": 50, "kylix": 0, "hydria": 25, "oinochoe": 50, "lekythos": 25}
_ATTRIBUTION = {
    "meander": "Key Painter",
    "dots": "Pearl Painter",
    "tongues": "Tongue Painter",
    "waves": "Harbour Painter",
    "chevrons": "Zigzag Painter",
    "checkers": "Chessboard Painter",
}
_BACKDROPS = ((236, 236, 234), (200, 200, 202), (150, 150, 152), (92, 94, 98), (40, 40, 42), (14, 14, 15))
_BACKDROPS += ((216, 204, 184), (150, 164, 180), (120, 104, 92), (74, 88, 104))


def describe(rng: np.random.Generator, shapes: Sequence[str]) -> dict[str, Any]:
    """What one vase is: fabric, technique, shape, decoration, band, attribution, date_from, date_to."""
    shape = str(rng.choice(list(shapes)))
    technique = str(rng.choice(TECHNIQUES))
    band = str(rng.choice(vase_paint.BANDS))
    start = _EARLIEST[technique] + _LATER[shape] + 25 * int(rng.integers(0, 2))
    return {
        "fabric": str(rng.choice(list(vase_paint.FABRICS), p=(0.6, 0.2, 0.2))),
        "technique": technique,
        "shape": shape,
        "decoration": str(rng.choice(vase_paint.SCENES)),
        "band": band,
        "attribution": _ATTRIBUTION[band] if rng.random() < 0.85 else "unattributed",
        "date_from": start,
        "date_to": start + 25,
    }


class Vase:
    """One vase, painted once and photographed often."""

    def __init__(self, rng: np.random.Generator, shapes: Sequence[str] = tuple(SHAPES)):
        self.facts = describe(rng, shapes)
        shape = SHAPES[self.facts["shape"]]
        stretch = (rng.uniform(0.92, 1.1), rng.uniform(0.95, 1.05))
        wall = make_wall(shape, stretch)
        labels = vase_paint.paint(shape, wall, stretch[1], self.facts, rng)
        self.surface: Surface = make_surface(shape, wall, stretch, labels, vase_paint.GLAZE)
        self.palette = vase_paint.palette(self.facts["fabric"], rng)
        self.bowl = self.facts["shape"] in _BOWLS
        self.inside = self.palette[vase_paint.GLAZE] if self.bowl else self.palette[vase_paint.CLAY] * np.float32(0.8)
        self.backdrop = _backdrop(rng)

    def photograph(self, side: str, flaw: str | None, size: int, rng: np.random.Generator) -> np.ndarray:
        """The picture (size, size, 3) uint8 of one side (a key of SIDES), with a flaw (of FLAWS) or none."""
        azimuth, elevation, _ = SIDES[side]
        shot = Shot(
            azimuth=azimuth + rng.normal(0, 5),
            elevation=elevation + rng.normal(0, 3),
            roll=rng.normal(0, 1.2),
            fill=rng.uniform(0.74, 0.9),
            shift=tuple(rng.uniform(-0.03, 0.03, 2)),
            light=(rng.choice((-1, 1)) * rng.uniform(15, 60), rng.uniform(20, 60)),
            contrast=rng.uniform(0.45, 0.85),
            exposure=rng.uniform(0.75, 1.3),
            # a vase stays in its studio, but for one picture in five
            backdrop=self.backdrop if rng.random() < 0.8 else _backdrop(rng),
            blur=max(rng.uniform(-0.5, 0.6), 0),
        )
        surface = self.surface
        if flaw is not None:
            surface = spoil_vase(surface, flaw, shot, self.bowl, rng)
            shot = spoil_shot(shot, flaw, rng)
        return photograph(surface, self.palette, self.inside, shot, size, rng)


def _backdrop(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    colour = np.array(_BACKDROPS[rng.integers(len(_BACKDROPS))]) * rng.normal(1, 0.02, 3)
    return np.clip(colour * rng.uniform(0.75, 1), 0, 255), np.clip(colour * rng.uniform(0.9, 1.15), 0, 255)


def choose_flaw(share: float, rng: np.random.Generator) -> str | None:
    """A flaw with probability `share`, else None."""
    flaw = str(rng.choice(FLAWS, p=(0.25, 0.15, 0.2, 0.2, 0.2)))
    return flaw if rng.random() < share else None
