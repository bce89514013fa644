"""A camera and a lamp for points: weak perspective, z-buffer, shading, backdrop with a soft shadow."""

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter

from scripts.demo.vase_paint import FRACTURE
from scripts.demo.vase_shapes import Surface

DISTANCE = 4.0  # of the camera from the vase's middle, in the vase's unit of length
_EMPTY = np.int64(-1)
_LEAST_EXTENT = 0.85  # nothing is enlarged so far that its points come apart


@dataclass(frozen=True)
class Shot:
    """One photograph's conditions; angles in degrees."""

    azimuth: float  # 0 looks at the front
    elevation: float  # positive looks down
    roll: float
    fill: float  # share of the picture's side that the vase takes
    shift: tuple[float, float]  # of the vase's middle from the picture's, as shares of its side
    light: tuple[float, float]  # azimuth relative to the camera, elevation
    contrast: float  # share of light that comes from the lamp, 0..1
    exposure: float  # factor on the finished picture
    backdrop: tuple[np.ndarray, np.ndarray]  # colours (3,) in 0..255 at the top and at the bottom
    blur: float = 0.0  # radius in pixels of the finished picture at 128 pixels a side


def _turn(vectors, shot: Shot):
    """World vectors in camera axes: x right, y up, z towards the camera."""
    (x, y, z), f = vectors, np.float32
    a, e, r = (np.deg2rad(v) for v in (shot.azimuth, shot.elevation, shot.roll))
    ca, sa, ce, se, cr, sr = (f(v) for v in (np.cos(a), np.sin(a), np.cos(e), np.sin(e), np.cos(r), np.sin(r)))
    # element by element, not by a matrix product: BLAS may round differently with other thread counts
    right, back = x * ca - z * sa, x * sa + z * ca
    up, near = y * ce - back * se, y * se + back * ce
    return right * cr - up * sr, right * sr + up * cr, near


def photograph(surface: Surface, palette: np.ndarray, inside: np.ndarray, shot: Shot, size: int, rng) -> np.ndarray:
    """The picture (size, size, 3) uint8 of the points.

    Args:
        palette: colours (labels, 3) in 0..255.
        inside: colour (3,) of the wall seen from within.
        rng: for the grain of clay and film.
    """
    side = 2 * size
    x, y, z = _turn(surface.xyz, shot)
    grow = np.float32(DISTANCE) / (np.float32(DISTANCE) - (z - np.float32((z.min() + z.max()) / 2)))
    px, py = x * grow, y * grow
    left, right, low, high = px.min(), px.max(), py.min(), py.max()
    scale = shot.fill * side / max(right - left, high - low, _LEAST_EXTENT)
    centre_x = side * (0.5 + shot.shift[0]) - scale * (left + right) / 2
    centre_y = side * (0.5 + shot.shift[1]) + scale * (low + high) / 2
    column = (px * np.float32(scale) + np.float32(centre_x)).astype(np.int32)
    row = (np.float32(centre_y) - py * np.float32(scale)).astype(np.int32)
    nearest = _z_buffer(column, row, z, side)
    seen = np.flatnonzero(nearest != _EMPTY)
    point = nearest[seen] & 0xFFFFFFFF

    normal = np.stack(_turn([n[point] for n in surface.normal], shot))
    towards = np.stack([-px[point], -py[point], np.float32(DISTANCE) - z[point]])
    towards /= np.sqrt((towards**2).sum(0))
    facing = (normal * towards).sum(0)
    within = (facing < 0) & (surface.piece[point] == 0)
    label = surface.label[point]
    normal *= np.where(facing < 0, -1, 1).astype(np.float32)
    colour = np.where((within & (label != FRACTURE))[:, None], inside, palette[label]).astype(np.float32)
    colour *= rng.normal(1, 0.05, len(point)).astype(np.float32)[:, None]
    gloss = np.where(within, 0.15, 1.0).astype(np.float32)
    dim = np.where(within | (surface.piece[point] == 1), 0.6, 1.0).astype(np.float32)

    a, e = np.deg2rad(shot.light[0]), np.deg2rad(shot.light[1])
    lamp = np.array([np.sin(a) * np.cos(e), np.sin(e), np.cos(a) * np.cos(e)], np.float32)[:, None]
    half = lamp + towards
    half /= np.sqrt((half**2).sum(0))
    diffuse = np.maximum((normal * lamp).sum(0), 0)
    shine = np.maximum((normal * half).sum(0), 0) ** 36 * 120 * gloss
    rest = np.float32(1.15 - shot.contrast) * (0.8 + 0.2 * normal[1])
    lit = colour * ((rest + np.float32(shot.contrast) * diffuse) * dim)[:, None] + (shine * dim)[:, None]

    layer = np.zeros((side * side, 4), np.float32)
    layer[seen, :3], layer[seen, 3] = lit, 1
    layer = layer.reshape(size, 2, size, 2, 4).mean((1, 3))
    # the shadow lies around the lowest point of the vase as it is seen
    foot = (0.5 + shot.shift[0], (centre_y - low * scale) / side)
    picture = layer[..., :3] + (1 - layer[..., 3:]) * _backdrop(shot, size, foot, scale * (right - left) / side)
    return _develop(picture, shot, size, rng)


def _z_buffer(column, row, z, side: int) -> np.ndarray:
    """Per pixel (side * side) the nearest point, as depth << 32 | index; -1 where there is none."""
    inside = np.flatnonzero((column >= 0) & (column < side) & (row >= 0) & (row < side))
    depth = ((z[inside] + np.float32(4)) * np.float32(1e5)).astype(np.int64)
    packed = np.full(side * side, _EMPTY)
    np.maximum.at(packed, row[inside] * side + column[inside], depth << 32 | inside)
    # points are not dense everywhere: a pixel that lies far behind three of its neighbours is a gap between points
    grid = packed.reshape(side, side)
    padded = np.pad(grid, 1, constant_values=_EMPTY)
    around = np.stack([padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:]])
    ahead = (around > grid + (np.int64(4000) << 32)).sum(0) >= 3
    return np.where(ahead, around.max(0), grid).reshape(-1)


def _backdrop(shot: Shot, size: int, foot: tuple[float, float], width: float) -> np.ndarray:
    """The empty scene (size, size, 3): a vertical gradient, darker at the corners, a shadow at `foot`."""
    at = (np.arange(size, dtype=np.float32) + 0.5) / size
    top, bottom = (np.asarray(c, np.float32) for c in shot.backdrop)
    scene = top + (bottom - top) * at[:, None, None]
    squares = (at - 0.5) ** 2
    shade = 1 - 0.35 * (squares[:, None] + squares[None, :])
    if shot.elevation > -10:
        flat = 0.04 + 0.12 * np.sin(np.deg2rad(max(shot.elevation, 0)))
        across = np.exp(-(((at - foot[0]) / (0.42 * width)) ** 2))[None, :]
        shade = shade * (1 - 0.45 * np.exp(-(((at - foot[1]) / flat) ** 2))[:, None] * across)
    return scene * shade[..., None]


def _develop(picture: np.ndarray, shot: Shot, size: int, rng) -> np.ndarray:
    picture = picture * shot.exposure
    if shot.blur > 0:
        soft = Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8))
        picture = np.asarray(soft.filter(ImageFilter.GaussianBlur(shot.blur * size / 128)), np.float32)
    grain = rng.normal(0, 2.2, (size, size, 1)).astype(np.float32)
    return np.clip(picture + grain + 0.5, 0, 255).astype(np.uint8)
