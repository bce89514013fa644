"""Vases as thin bodies of revolution with handles, sampled as points with normals.

World axes: y up, the main face looks along +z, lengths in units of the vase's height (kylix: of its
width). A point of the wall has an angle (0 = front, growing towards +x) and a place along the profile.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

SPACING = 0.0037  # between neighbouring points: below one pixel of the renderer's enlarged picture


@dataclass(frozen=True)
class Shape:
    """What makes a vase an amphora, a krater, ...; places are (radius, height) from foot to lip."""

    profile: tuple[tuple[float, float], ...]
    foot: float  # height where the foot ends
    frieze: tuple[float, float]  # lowest and highest place of the figures
    shoulder: float  # height where the neck begins; above the lip where there is none
    floor: float  # height of the inner floor
    handles: tuple[tuple, ...]  # ("vertical", angle in degrees, lower, upper, reach) or ("loop", angle, height, reach)
    trefoil: float = 0.0  # how far the mouth is pinched into three lobes


SHAPES = {
    "amphora": Shape(
        ((0.125, 0), (0.145, 0.012), (0.14, 0.035), (0.085, 0.06), (0.1, 0.1), (0.2, 0.25), (0.285, 0.45), (0.3, 0.58))
        + ((0.255, 0.69), (0.15, 0.765), (0.105, 0.82), (0.105, 0.9), (0.13, 0.955), (0.165, 0.97), (0.165, 1.0)),
        foot=0.07,
        frieze=(0.27, 0.65),
        shoulder=0.775,
        floor=0.1,
        handles=(("vertical", 90, 0.68, 0.925, 0.14), ("vertical", -90, 0.68, 0.925, 0.14)),
    ),
    "krater": Shape(
        ((0.17, 0), (0.185, 0.015), (0.17, 0.04), (0.095, 0.07), (0.09, 0.11), (0.18, 0.17), (0.275, 0.28))
        + ((0.31, 0.42), (0.32, 0.58), (0.34, 0.7), (0.395, 0.8), (0.41, 0.815), (0.405, 0.84)),
        foot=0.12,
        frieze=(0.3, 0.68),
        shoulder=9.0,
        floor=0.17,
        handles=(("loop", 90, 0.32, 0.16), ("loop", -90, 0.32, 0.16)),
    ),
    "kylix": Shape(
        ((0.175, 0), (0.185, 0.012), (0.1, 0.03), (0.045, 0.06), (0.04, 0.09), (0.09, 0.12), (0.23, 0.165))
        + ((0.34, 0.25), (0.395, 0.36), (0.41, 0.42), (0.415, 0.445)),
        foot=0.12,
        frieze=(0.185, 0.385),
        shoulder=9.0,
        floor=0.145,
        handles=(("loop", 90, 0.34, 0.14), ("loop", -90, 0.34, 0.14)),
    ),
    "hydria": Shape(
        ((0.14, 0), (0.155, 0.015), (0.14, 0.04), (0.09, 0.065), (0.12, 0.11), (0.225, 0.26), (0.305, 0.47))
        + (
            (0.325, 0.61),
            (0.285, 0.71),
            (0.16, 0.77),
            (0.105, 0.81),
            (0.1, 0.9),
            (0.13, 0.96),
            (0.18, 0.98),
            (0.18, 1),
        ),
        foot=0.08,
        frieze=(0.26, 0.62),
        shoulder=0.76,
        floor=0.11,
        handles=(("loop", 90, 0.53, 0.13), ("loop", -90, 0.53, 0.13), ("vertical", 180, 0.7, 0.96, 0.17)),
    ),
    "oinochoe": Shape(
        ((0.15, 0), (0.165, 0.015), (0.15, 0.04), (0.13, 0.055), (0.2, 0.15), (0.275, 0.32), (0.295, 0.46))
        + ((0.24, 0.62), (0.13, 0.74), (0.1, 0.8), (0.105, 0.86), (0.15, 0.93), (0.165, 0.97), (0.16, 1.0)),
        foot=0.06,
        frieze=(0.18, 0.57),
        shoulder=0.72,
        floor=0.07,
        handles=(("vertical", 90, 0.55, 1.0, 0.2),),
        trefoil=0.3,
    ),
    "lekythos": Shape(
        (
            (0.115, 0),
            (0.13, 0.012),
            (0.125, 0.035),
            (0.06, 0.05),
            (0.055, 0.07),
            (0.12, 0.15),
            (0.155, 0.3),
            (0.17, 0.5),
        )
        + (
            (0.17, 0.61),
            (0.15, 0.665),
            (0.06, 0.715),
            (0.045, 0.76),
            (0.045, 0.84),
            (0.075, 0.875),
            (0.1, 0.96),
            (0.1, 1),
        ),
        foot=0.075,
        frieze=(0.24, 0.59),
        shoulder=0.68,
        floor=0.1,
        handles=(("vertical", 180, 0.64, 0.86, 0.11),),
    ),
}


class Surface(NamedTuple):
    """Points of one vase; every array has one entry per point.

    `xyz` and `normal`: three float32 arrays each; `label`: index into `vase_paint.palette` (uint8);
    `angle` (radians, 0 = front) and `height`: where on the vase; `piece`: 0 wall, 1 floor, 2 handles.
    """

    xyz: tuple[np.ndarray, np.ndarray, np.ndarray]
    normal: tuple[np.ndarray, np.ndarray, np.ndarray]
    label: np.ndarray
    angle: np.ndarray
    height: np.ndarray
    piece: np.ndarray


class Wall(NamedTuple):
    """The grid on which a vase is painted: rows from lip to foot, columns by angle from -pi to pi."""

    radius: np.ndarray  # per row
    height: np.ndarray  # per row
    columns: int


def curve(places: Sequence[Sequence[float]], spacing: float) -> np.ndarray:
    """A smooth (Catmull-Rom) curve through `places`, at equal steps of about `spacing`: (n, dimensions)."""
    p = np.asarray(places, dtype=np.float64)
    p = np.concatenate([2 * p[:1] - p[1:2], p, 2 * p[-1:] - p[-2:-1]])
    t = np.linspace(0, 1, 24, endpoint=False)[:, None, None]
    a, b, c, d = p[:-3], p[1:-2], p[2:-1], p[3:]
    # tension 0.4 instead of 0.5: it keeps flat necks flat
    tangent_b, tangent_c = 0.4 * (c - a), 0.4 * (d - b)
    h = 2 * t**3 - 3 * t**2
    fine = (h + 1) * b - h * c + (t**3 - 2 * t**2 + t) * tangent_b + (t**3 - t**2) * tangent_c
    fine = np.concatenate([fine.transpose(1, 0, 2).reshape(-1, p.shape[1]), p[-2:-1]])
    length = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(fine, axis=0), axis=1))])
    at = np.linspace(0, length[-1], max(int(length[-1] / spacing), 4))
    return np.stack([np.interp(at, length, fine[:, i]) for i in range(p.shape[1])], axis=1)


def make_wall(shape: Shape, stretch: tuple[float, float], spacing: float = SPACING) -> Wall:
    """The painting grid of `shape`, its radii and heights multiplied by `stretch`."""
    profile = curve([(r * stretch[0], y * stretch[1]) for r, y in shape.profile], spacing)[::-1]
    columns = int(2 * np.pi * profile[:, 0].max() / spacing) // 8 * 8
    return Wall(profile[:, 0], profile[:, 1], columns)


def make_surface(shape: Shape, wall: Wall, stretch: tuple[float, float], labels: np.ndarray, glaze: int) -> Surface:
    """All points of a vase.

    Args:
        labels: (rows, columns) uint8, the painted wall.
        glaze: label of handles and floor.
    """
    parts = [_wall_points(shape, wall, stretch, labels), _floor_points(shape, wall, stretch, glaze)]
    parts += [_handle_points(wall, stretch, handle, glaze) for handle in shape.handles]
    columns = [np.concatenate([part[i] for part in parts]) for i in range(10)]
    return Surface(tuple(columns[:3]), tuple(columns[3:6]), *columns[6:])


def _wall_points(shape: Shape, wall: Wall, stretch, labels) -> list[np.ndarray]:
    radius, height, n = wall.radius, wall.height, wall.columns
    angle = (np.arange(n) + 0.5) / n * 2 * np.pi - np.pi
    along = np.gradient(radius), np.gradient(height)
    norm = np.hypot(*along)
    out, up = -along[1] / norm, along[0] / norm  # rows run downwards, so the outward normal is (-dy, dr)
    # narrow rows need fewer points: every second column below half of the widest, and so on
    stride = 2 ** np.clip(np.floor(np.log2(radius.max() / np.maximum(radius, 1e-3))), 0, 3).astype(int)
    keep = np.arange(n)[None, :] % stride[:, None] == 0
    row, column = np.nonzero(keep)
    a = angle[column]
    lobes = 1.0
    if shape.trefoil:
        share = np.clip((height / stretch[1] - 0.84) / 0.16, 0, 1) ** 1.5
        lobes = 1 + shape.trefoil * share[row] * np.cos(3 * (a + np.pi / 2))
    r, sin, cos = radius[row] * lobes, np.sin(a), np.cos(a)
    values = [r * sin, height[row], r * cos, out[row] * sin, up[row], out[row] * cos]
    return [*_float32(values), labels[row, column], *_float32([a, height[row]]), np.zeros(len(a), np.uint8)]


def _floor_points(shape: Shape, wall: Wall, stretch, glaze) -> list[np.ndarray]:
    y = shape.floor * stretch[1]
    reach = np.interp(y, wall.height[::-1], wall.radius[::-1])
    radii = np.arange(SPACING, reach, SPACING)
    counts = np.maximum((2 * np.pi * radii / SPACING).astype(int), 6)
    r = np.repeat(radii, counts)
    a = np.concatenate([np.linspace(-np.pi, np.pi, c, endpoint=False) for c in counts])
    zero, one = np.zeros_like(r), np.ones_like(r)
    values = [r * np.sin(a), y * one, r * np.cos(a), zero, one, zero]
    return [*_float32(values), np.full(len(r), glaze, np.uint8), *_float32([a, y * one]), np.ones(len(r), np.uint8)]


def _handle_points(wall: Wall, stretch, handle: tuple, glaze) -> list[np.ndarray]:
    kind, degrees, *numbers = handle

    def radius_at(y):
        return float(np.interp(y, wall.height[::-1], wall.radius[::-1]))

    # the path of a handle in (outward, up, sideways), before it is turned to its angle
    if kind == "vertical":
        low, high, reach = numbers[0] * stretch[1], numbers[1] * stretch[1], numbers[2]
        r_low, r_high = radius_at(low), radius_at(high)
        out = max(r_low, r_high) - 0.35 * reach + (0.6 if r_low > r_high + 0.05 else 1.0) * reach
        rise = high + 0.12 * reach
        path = [(r_high - 0.01, high, 0), (r_high + 0.45 * (out - r_high), rise, 0)]
        path += [(out, high - 0.25 * (high - low), 0), (out, low + 0.35 * (high - low), 0), (r_low - 0.005, low, 0)]
        side = np.array([0.0, 0.0, 1.0])
    else:
        y, reach = numbers[0] * stretch[1], numbers[1]
        r = radius_at(y)
        foot, back = 0.1, 0.1**2 / (2 * r)
        tilt = np.array([0.85, 0.53])
        path = [(r - back - 0.015, y, -foot)]
        path += [(r + f * reach * tilt[0], y + f * reach * tilt[1], s) for f, s in ((0.6, -0.105), (1.0, -0.05))]
        path += [(r + f * reach * tilt[0], y + f * reach * tilt[1], s) for f, s in ((1.0, 0.05), (0.6, 0.105))]
        path += [(r - back - 0.015, y, foot)]
        side = np.array([-tilt[1], tilt[0], 0.0])
    line = curve(path, SPACING)
    tangent = np.gradient(line, axis=0)
    tangent /= np.linalg.norm(tangent, axis=1, keepdims=True)
    other = np.cross(tangent, side)
    thick = 0.021
    around = np.linspace(0, 2 * np.pi, int(2 * np.pi * thick / SPACING) + 1, endpoint=False)
    normal = np.cos(around)[None, :, None] * side + np.sin(around)[None, :, None] * other[:, None, :]
    point = (line[:, None, :] + thick * normal).reshape(-1, 3)
    normal = normal.reshape(-1, 3)
    turn = np.deg2rad(degrees)
    sin, cos = np.sin(turn), np.cos(turn)

    def turned(v):
        return v[:, 0] * sin + v[:, 2] * cos, v[:, 1], v[:, 0] * cos - v[:, 2] * sin

    x, y, z = turned(point)
    floats = _float32([x, y, z, *turned(normal)])
    angle_height = _float32([np.arctan2(x, z), y])
    return [*floats, np.full(len(x), glaze, np.uint8), *angle_height, np.full(len(x), 2, np.uint8)]


def _float32(values) -> list[np.ndarray]:
    return [np.ascontiguousarray(v, dtype=np.float32) for v in values]
