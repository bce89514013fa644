"""What can be wrong with a photograph of a vase: the vase is broken, or the picture is bad."""

from dataclasses import replace

import numpy as np

from scripts.demo.vase_camera import Shot
from scripts.demo.vase_paint import FRACTURE
from scripts.demo.vase_shapes import Surface

_EDGE = 0.014  # width of a break, in the vase's unit of length
FLAWS = ("broken", "shards", "blurred", "cropped", "dark")


def spoil_shot(shot: Shot, flaw: str, rng: np.random.Generator) -> Shot:
    """`shot` with bad focus, aim or exposure."""
    if flaw == "blurred":
        return replace(shot, blur=rng.uniform(2.3, 4.2))
    if flaw == "dark":
        return replace(shot, exposure=rng.uniform(0.15, 0.33))
    if flaw == "cropped":
        angle = rng.uniform(0, 2 * np.pi)
        # of |cos| and |sin| the greater is 1, so that the vase leaves the picture whatever the direction
        far = rng.uniform(0.34, 0.5) / max(abs(np.cos(angle)), abs(np.sin(angle)))
        return replace(shot, shift=(far * np.cos(angle), far * np.sin(angle)), fill=shot.fill * rng.uniform(1, 1.25))
    return shot


def spoil_vase(surface: Surface, flaw: str, shot: Shot, bowl: bool, rng: np.random.Generator) -> Surface:
    """`surface` with a large piece missing, or in shards; `bowl`: wide open, and as dark within as without."""
    if flaw == "shards":
        return _shatter(surface, rng)
    if flaw == "broken":
        # a hole in a bowl hardly shows, and from below a missing mouth does not
        pierced = not bowl and (shot.elevation < -30 or rng.random() < 0.5)
        return _pierce(surface, shot, rng) if pierced else _decapitate(surface, rng)
    return surface


def _jagged(angle: np.ndarray, knots: int, low: float, high: float, rng: np.random.Generator) -> np.ndarray:
    """A random zigzag of period 2 pi with values in low..high, at `angle` in radians."""
    at = np.sort(rng.uniform(-np.pi, np.pi, knots))
    value = rng.uniform(low, high, knots)
    return np.interp(angle, np.r_[at - 2 * np.pi, at, at + 2 * np.pi], np.tile(value, 3)).astype(np.float32)


def _keep(surface: Surface, mask: np.ndarray) -> Surface:
    return Surface(
        tuple(v[mask] for v in surface.xyz),
        tuple(v[mask] for v in surface.normal),
        *(v[mask] for v in surface[2:]),
    )


def _bared(surface: Surface, mask: np.ndarray) -> Surface:
    """`surface` with the clay showing where `mask` holds: the edge of a break."""
    return surface._replace(label=np.where(mask & (surface.piece == 0), np.uint8(FRACTURE), surface.label))


def _decapitate(surface: Surface, rng: np.random.Generator) -> Surface:
    """Everything above a slanting jagged line is gone."""
    tall = float(surface.height.max())
    middle, slant = rng.uniform(0.42, 0.68), rng.uniform(0.05, 0.16)
    wave = slant * np.cos(surface.angle - np.float32(rng.uniform(-np.pi, np.pi)))
    line = tall * (middle + wave + _jagged(surface.angle, int(rng.integers(9, 17)), -0.11, 0.11, rng))
    return _keep(_bared(surface, np.abs(surface.height - line) < _EDGE), surface.height < line)


def _pierce(surface: Surface, shot: Shot, rng: np.random.Generator) -> Surface:
    """A large hole, where the camera sees it."""
    tall = float(surface.height.max())
    middle = rng.uniform(0.45, 0.75) if shot.elevation > -30 else rng.uniform(0.25, 0.4)
    towards = np.deg2rad(shot.azimuth) + rng.uniform(-0.5, 0.5)
    apart = (surface.angle - towards + np.pi) % (2 * np.pi) - np.pi
    wide = float(np.hypot(surface.xyz[0], surface.xyz[2]).max())
    across, up = apart * 0.75 * wide, surface.height - middle * tall
    size = rng.uniform(0.7, 0.95) * max(wide, 0.24 * tall)
    edge = size * _jagged(np.arctan2(up, across), int(rng.integers(9, 15)), 0.55, 1.15, rng)
    distance = np.hypot(across, up)
    gone = (distance < edge) & (surface.piece != 1)
    return _keep(_bared(surface, np.abs(distance - edge) < _EDGE), ~gone)


def _shatter(surface: Surface, rng: np.random.Generator) -> Surface:
    """A few pieces of the vase, each turned and moved away from where it was."""
    count = int(rng.integers(6, 10))
    angle, height = rng.uniform(-np.pi, np.pi, count), rng.uniform(0.05, 1, count) * surface.height.max()
    x, y, z = surface.xyz
    wide = float(np.hypot(x, z).max())
    nearest = np.full(len(x), np.inf, np.float32)
    second = nearest.copy()
    piece = np.zeros(len(x), np.int8)
    for i in range(count):
        apart = (surface.angle - angle[i] + np.pi) % (2 * np.pi) - np.pi
        across, up = apart * wide, surface.height - height[i]
        # distances that depend on the direction make the borders jagged
        distance = np.hypot(across, up) * _jagged(np.arctan2(up, across), 9, 0.75, 1.3, rng)
        closer = distance < nearest
        second = np.where(closer, nearest, np.minimum(second, distance))
        nearest[closer], piece[closer] = distance[closer], i
    surface = _bared(surface, second - nearest < _EDGE)
    kept = rng.permutation(count)[: int(rng.integers(3, 6))]
    surface, piece = (_keep(surface, np.isin(piece, kept)), piece[np.isin(piece, kept)])
    points, normals = np.stack(surface.xyz), np.stack(surface.normal)
    for number, i in enumerate(kept):
        mine = piece == i
        if not mine.any():
            continue
        middle = points[:, mine].mean(1, keepdims=True)
        turn = _rotation(rng)
        place = np.pi * 2 * (number + rng.uniform(-0.25, 0.25)) / len(kept)
        away = np.array([np.cos(place), 0.5 + 0.75 * np.sin(place), rng.uniform(-0.2, 0.2)]) * rng.uniform(0.36, 0.5)
        points[:, mine] = _rotate(turn, points[:, mine] - middle) + away[:, None].astype(np.float32)
        normals[:, mine] = _rotate(turn, normals[:, mine])
    return surface._replace(xyz=tuple(points), normal=tuple(normals))


def _rotation(rng: np.random.Generator) -> np.ndarray:
    """A random turn (3, 3), float32, by at most about a right angle."""
    axis = rng.normal(size=3)
    axis /= np.sqrt((axis**2).sum())
    angle = rng.uniform(0.4, 1.6)
    x, y, z = axis
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    square = axis[:, None] * axis[None, :] - np.eye(3)
    return (np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * square).astype(np.float32)


def _rotate(turn: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.stack([row[0] * v[0] + row[1] * v[1] + row[2] * v[2] for row in turn])
