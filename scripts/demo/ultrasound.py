"""Breast ultrasound pictures: echo strengths and attenuation of drawn tissue, speckled as a scanner would show them.

A picture is a B-mode frame of a linear probe, the skin on top. Lengths are in units of the picture's
width, strengths in decibels. Speckle is the envelope of complex Gaussian scatterers under a point
spread that is wider than it is deep, hence Rayleigh-distributed (Burckhardt 1978); what is below a
lesion follows from what the lesion absorbs, not from its class.
"""

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image
from scipy import ndimage

CLASSES = ("normal", "benign", "malignant")
SIMILAR = 0.986  # least correlation of near-twins' thumbnails, whatever the way of reducing them
_SIDE = 64  # of a thumbnail


@dataclass(frozen=True)
class Frame:
    """A picture, grey uint8 [height, width], and one bool mask of the same size per lesion."""

    pixels: np.ndarray
    masks: tuple[np.ndarray, ...]


@dataclass
class _Scene:
    """What a probe sees. Arrays are float32 [height, width]; x and y are a pixel's place, y the depth."""

    x: np.ndarray
    y: np.ndarray
    echo: np.ndarray  # strength in dB
    loss: np.ndarray  # dB lost per unit of depth, beyond what the scanner makes up for


def draw_frame(kind: str, ambiguous: bool, second: bool, size: int, rng: np.random.Generator) -> Frame:
    """A frame of class `kind` ("normal", "benign", "malignant").

    Args:
        ambiguous: the lesion has few of its class's signs.
        second: there is a second, smaller lesion of the same class.
        size: mean side in pixels; both sides vary by 18 %.
    """
    height, width = (int(round(size * v)) for v in rng.uniform(0.82, 1.18, 2))
    scene = _tissue(height, width, rng)
    masks = []
    if kind != "normal":
        deep = rng.uniform(0.3, 0.5) * height / width
        if second:  # one to each side, so that they and what is below them stay apart
            places, radii = rng.permutation([[0.3, 0.8], [0.7, 0.2]])[0], (rng.uniform(0.11, 0.15), 0.08)
        else:
            places, radii = [rng.uniform(0.3, 0.7)], [rng.uniform(0.09, 0.2)]
        for across, radius in zip(places, radii, strict=True):
            place = across, deep * rng.uniform(0.9, 1.1)
            masks.append(_lesion(scene, kind, ambiguous, place, radius, rng))
    return Frame(_scan(scene, rng), tuple(masks))


def _noise(shape: tuple[int, int], deep: float, wide: float, rng: np.random.Generator) -> np.ndarray:
    """Smooth noise of unit variance; `deep` and `wide` are its grain in pixels."""
    made = rng.standard_normal(shape, dtype=np.float32)
    made = ndimage.gaussian_filter(made, (max(deep, 0.3), max(wide, 0.3)), mode="wrap", truncate=3)
    return (made - made.mean()) / made.std()


def _curve(x: np.ndarray, swing: float, rng: np.random.Generator) -> np.ndarray:
    """A gentle curve over `x` in 0..1, within about +-`swing`."""
    waves = ((rng.uniform(0.3, 0.8), 1.0), (rng.uniform(0.9, 1.6), 0.35), (rng.uniform(1.6, 3), 0.1))
    made = sum(share * np.sin(2 * np.pi * (turns * x + rng.random())) for turns, share in waves)
    return (swing * made + swing * rng.uniform(-1, 1) * (x - 0.5)).astype(np.float32)


def _step(distance: np.ndarray, width: float) -> np.ndarray:
    """0 to 1 where `distance` passes from below to above 0, over about `width`."""
    return np.clip(distance / width + 0.5, 0, 1)


def _ridge(distance: np.ndarray, width: float) -> np.ndarray:
    """1 where `distance` is 0, less to both sides."""
    return np.exp(-((distance / width) ** 2))


def _tissue(height: int, width: int, rng: np.random.Generator) -> _Scene:
    """Skin, fat with septa, gland with ducts and fibres, fascia and muscle, of a patient drawn at random."""
    shape, px = (height, width), 1 / width
    y, x = (np.float32(px) * v for v in np.mgrid[:height, :width].astype(np.float32))
    row, depth = x[0], height * px
    skin = rng.uniform(0.02, 0.04)
    fat = skin + depth * rng.uniform(0.05, 0.26) + _curve(row, rng.uniform(0.01, 0.05), rng)
    gland = fat + depth * rng.uniform(0.3, 0.6) + _curve(row, rng.uniform(0.01, 0.05), rng)
    bend = _curve(row, rng.uniform(0.02, 0.1), rng)  # layers of fibres run along it
    back = np.arange(height)[:, None] + np.rint(bend * width).astype(int)[None, :]

    def bent(noise: np.ndarray) -> np.ndarray:
        return np.take_along_axis(noise, back % height, 0)

    grain = width * rng.uniform(0.75, 1.3)
    septa = _ridge(bent(_noise(shape, 0.028 * grain, 0.11 * grain, rng)), 0.22)
    in_fat = rng.uniform(-14, -8) + rng.uniform(6, 12) * septa
    streaks = _ridge(bent(_noise(shape, 0.02 * grain, rng.uniform(0.07, 0.16) * grain, rng)), 0.25)
    lobules = bent(_noise(shape, 0.018 * grain, rng.uniform(0.024, 0.05) * grain, rng))
    clouds = _noise(shape, 0.09 * grain, 0.12 * grain, rng)
    in_gland = (
        rng.uniform(1, 3.5) * clouds
        + rng.uniform(3, 9) * streaks * _step(clouds + 0.5, 1.5)
        - rng.uniform(3, 12) * _step(lobules - rng.uniform(0.5, 1.6), 0.5)
    )
    fibres = bent(_noise(shape, 0.007 * grain, 0.14 * grain, rng))
    in_muscle = rng.uniform(-14, -7) + rng.uniform(3, 6) * fibres * _step(clouds + 1, 2) + 2 * clouds

    echo = in_fat + (in_gland - in_fat) * _step(y - fat, 0.03)
    echo += (in_muscle - echo) * _step(y - gland, 0.03)
    echo += rng.uniform(5, 11) * _ridge(y - gland, 0.011) + rng.uniform(2, 6) * _ridge(y - fat, 0.012)
    echo += rng.uniform(6, 12) * (_ridge(y, 0.012) + _ridge(y - skin, 0.009)) - 3 * _ridge(y - skin / 2, 0.008)
    loss = np.zeros(shape, np.float32)
    scene = _Scene(x, y, echo.astype(np.float32), loss)
    for _ in range(rng.integers(0, 4)):
        _lobule(scene, (rng.random(), rng.uniform(0.12, 0.8) * depth), rng)
    for _ in range(rng.integers(0, 3)):
        # a ligament, or skin that the probe hardly touches, dims what is below it
        start, place = rng.uniform(0, 0.5) * depth, rng.random()
        scene.loss += rng.uniform(4, 16) * _ridge(x - place, rng.uniform(0.02, 0.07)) * _ridge(y - start, 0.15)
    return scene


def _lobule(scene: _Scene, place: tuple[float, float], rng: np.random.Generator) -> None:
    """A lobule of fat: dark and oval as a lesion is, but without a border, and the same below it."""
    wide, flat, tilt = rng.uniform(0.03, 0.1), rng.uniform(0.4, 0.7), rng.uniform(-0.3, 0.3)
    across, down = scene.x - place[0], scene.y - place[1]
    inside = _step(1 - np.hypot(across, (down - tilt * across) / flat) / wide, rng.uniform(0.4, 0.9))
    scene.echo -= rng.uniform(3, 11) * inside


def _lesion(
    scene: _Scene, kind: str, ambiguous: bool, place: tuple[float, float], radius: float, rng: np.random.Generator
) -> np.ndarray:
    """Put a lesion into `scene` around `place`; its mask. `radius` is that of a circle of its area."""
    benign = kind == "benign"
    if ambiguous:  # both classes from the same range, but for slight tendencies
        aspect = rng.uniform(1.0, 1.35) if benign else rng.uniform(0.9, 1.2)
        waves, spikes, lost = rng.uniform(0.03, 0.06), 0, rng.uniform(-2, 1) if benign else rng.uniform(0, 4)
        border, halo = rng.uniform(0.1, 0.2), rng.uniform(0, 3)
    elif benign:
        aspect, waves, spikes = rng.uniform(1.3, 2.0), rng.uniform(0.0, 0.03), 0
        lost = rng.uniform(-11, -5) if rng.random() < 0.8 else rng.uniform(-2, 1)
        border, halo = rng.uniform(0.04, 0.1), rng.uniform(6, 11)
    else:
        aspect, waves, spikes = rng.uniform(0.65, 0.95), rng.uniform(0.05, 0.09), rng.integers(9, 18)
        lost = rng.uniform(10, 22) if rng.random() < 0.85 else rng.uniform(2, 6)
        border, halo = rng.uniform(0.2, 0.4), rng.uniform(3, 7)

    wide, high = radius * np.sqrt(aspect), radius / np.sqrt(aspect)
    tilt = rng.uniform(-0.25, 0.25)
    across, down = scene.x - np.float32(place[0]), scene.y - np.float32(place[1])
    u = (np.cos(tilt) * across + np.sin(tilt) * down) / wide
    v = (np.cos(tilt) * down - np.sin(tilt) * across) / high
    angle, far = np.arctan2(v, u), np.hypot(u, v)
    turn = np.linspace(-np.pi, np.pi, 721)
    edge = np.ones_like(turn)
    for k in range(2, 9):
        edge += waves * rng.normal() * min(1, 3 / k) * np.cos(k * turn + rng.uniform(0, 2 * np.pi))
    edge = np.clip(edge, 0.6, 1.5)
    spiked = edge.copy()
    for at in rng.uniform(-np.pi, np.pi, spikes):
        apart = (turn - at + np.pi) % (2 * np.pi) - np.pi
        spiked += rng.exponential(0.2) * np.exp(-np.abs(apart) / rng.uniform(0.04, 0.16))
    spiked = np.minimum(spiked, 1.9)
    outline, reach = np.interp(angle, turn, edge), np.interp(angle, turn, spiked)

    within = _step(1 - far / reach, border).astype(np.float32)
    dark = rng.uniform(-28, -9) if benign and not ambiguous else rng.uniform(-24, -10)
    rough = 1.5 if benign else 3.0
    inner = dark + rough * _noise(scene.echo.shape, 4, 5, rng)
    # a smooth wall answers best where it lies across the beam; a frayed one scatters all around
    outer = far / outline - 1 - border / 2
    facing = np.abs(np.sin(angle)) ** 0.5 if benign else 1
    rim = halo * facing * (_ridge(outer, 0.09) if benign else _ridge(outer - 0.2, 0.25))
    scene.echo += rim * (1 - within)
    scene.echo += within * (np.minimum(inner, scene.echo) - scene.echo)
    if not benign and rng.random() < 0.5:  # microcalcifications
        for _ in range(rng.integers(2, 7)):
            point = rng.normal(0, 0.35, 2)
            scene.echo += rng.uniform(12, 22) * _ridge(np.hypot(u - point[0], v - point[1]), 0.06)
    scene.loss += lost / (2 * high) * within
    if benign and not ambiguous:  # the beam is bent away along the sides of a round wall
        sides = _ridge(np.abs(u) - 1, 0.05) * _ridge(v, 0.4)
        scene.loss += rng.uniform(0, 5) / high * sides
    return ndimage.binary_opening(far < (outline + reach) / 2)  # as drawn by hand: not into the tips of the spikes


def _scan(scene: _Scene, rng: np.random.Generator) -> np.ndarray:
    """The picture uint8 of a scene: speckle, attenuation, gain, noise, log compression, grey map."""
    height, width = scene.echo.shape
    depth = scene.y / scene.y[-1, 0]
    passed = -np.cumsum(scene.loss, axis=0) / width  # dB; the probe's beam runs down a column
    passed -= rng.uniform(0, 13) * depth**2 + rng.uniform(-3, 3) * depth  # where time-gain falls short
    passed += rng.uniform(0, 4) * _ridge(depth - rng.uniform(0.25, 0.7), rng.uniform(0.15, 0.3))  # focus
    passed += rng.uniform(0, 1.5) * np.interp(depth, np.linspace(0, 1, 8), rng.normal(size=8))  # sliders
    passed = ndimage.gaussian_filter1d(passed, 0.012 * width, axis=1)
    amplitude = np.power(np.float32(10), (scene.echo + passed).astype(np.float32) / 20)
    spread = rng.uniform(0.5, 0.65) * width / 144, rng.uniform(1.0, 1.5) * width / 144  # deep, wide
    floor = 10 ** (rng.uniform(-44, -36) / 20)
    # compounding: a few looks at the same tissue
    envelope = sum(look(amplitude, spread, floor, rng) for _ in range(rng.integers(1, 4)))
    level = 20 * np.log10(envelope)
    level = ndimage.gaussian_filter(level, rng.uniform(0.4, 0.6))  # the display's interpolation
    shades, mean = 255 / rng.uniform(42, 58), rng.uniform(62, 104)  # per dB; of the picture
    # gain is turned until the picture is as bright as wanted, so that brightness tells nothing of the class
    low, high = -80.0, 40.0
    for _ in range(20):
        black = (low + high) / 2
        grey = np.clip((level - black) * shades, 0, 255)
        low, high = (black, high) if grey.mean() > mean else (low, black)
    steps = rng.integers(40, 256)  # grey levels of the scanner's map
    return np.rint(np.rint(grey / 255 * steps) * (255 / steps)).astype(np.uint8)


def look(amplitude: np.ndarray, spread: tuple[float, float], floor: float, rng: np.random.Generator) -> np.ndarray:
    """The envelope (float64) seen from one angle: Rayleigh-distributed where `amplitude` is even.

    Args:
        amplitude: strength of the scatterers, float32 [height, width].
        spread: standard deviations of the point spread in pixels, along the beam and across.
        floor: amplitude of the electronic noise.
    """
    parts = (
        ndimage.gaussian_filter(amplitude * rng.standard_normal(amplitude.shape, dtype=np.float32), spread, truncate=3)
        for _ in range(2)
    )
    return np.sqrt(sum(part**2 for part in parts) + floor**2 * rng.standard_exponential(amplitude.shape))


def thumbnails(pixels: np.ndarray) -> np.ndarray:
    """64x64 thumbnails of a grey picture by three filters, without mean and of unit norm: float64 [3, 4096]."""
    filters = (Image.Resampling.BOX, Image.Resampling.BILINEAR, Image.Resampling.LANCZOS)
    image = Image.fromarray(pixels)
    made = np.stack([np.asarray(image.resize((_SIDE, _SIDE), f), np.float64).ravel() for f in filters])
    made -= made.mean(1, keepdims=True)
    return made / np.sqrt((made**2).sum(1, keepdims=True))


def near_twin(frame: Frame, others: list[Frame], rng: np.random.Generator) -> Frame:
    """`frame` grabbed once more: cropped by 1-2 %, with another gain, noise or compression.

    Its thumbnail's correlation with those of `frame` and `others` is at least `SIMILAR`.
    """
    known = [thumbnails(each.pixels) for each in (frame, *others)]
    strength = 1.0
    while True:
        made = _regrab(frame, strength, rng)
        new = thumbnails(made.pixels)
        if min((new * old).sum(1).min() for old in known) >= SIMILAR:
            return made
        strength *= 0.8


def _regrab(frame: Frame, strength: float, rng: np.random.Generator) -> Frame:
    height, width = frame.pixels.shape
    top, bottom, left, right = (int(round(strength * rng.uniform(0, 0.02) * n)) for n in (height, height, width, width))
    window = slice(top, height - bottom), slice(left, width - right)
    grey = frame.pixels[window] * (1 + strength * rng.choice([-1, 1]) * rng.uniform(0.03, 0.15))
    grey += strength * rng.uniform(-8, 8)
    if rng.random() < 0.5:
        grey += strength * rng.normal(0, rng.uniform(1, 4), grey.shape)
    pixels = np.clip(np.rint(grey), 0, 255).astype(np.uint8)
    if rng.random() < 0.4:
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=int(rng.integers(70, 93)))
        pixels = np.asarray(Image.open(buffer))
    return Frame(pixels, tuple(mask[window] for mask in frame.masks))
