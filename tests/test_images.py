"""Odd image files: each becomes what the table in `scripts.common.images` says, or an `ImageError`."""

import hashlib
import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from scripts.common.images import EXTENSIONS, ImageError, inspect, open_rgb

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # it tells of what is damaged
MANY = 10**8
RNG = np.random.default_rng(0)
NOISE = RNG.integers(0, 256, (23, 31, 3), dtype=np.uint8)
# smooth, so that a JPEG of it is nearly the picture itself
SMOOTH = np.stack(np.broadcast_arrays(*np.ogrid[40:200:48j, 30:220:64j], 90.0), axis=-1).round().astype(np.uint8)


def encode(picture, form: str, **options) -> bytes:
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def pixels(data: bytes, **options) -> np.ndarray:
    image = open_rgb(data, MANY, **options)
    assert image.mode == "RGB"
    return np.asarray(image)


def over_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Colour over white, in real numbers."""
    share = alpha[..., None].astype(float) / 255
    return colour * share + 255 * (1 - share)


@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("PNG", {}),
        ("BMP", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("TIFF", {"compression": "tiff_deflate"}),
        ("WEBP", {"lossless": True}),
    ],
)
def test_lossless_files_give_their_very_pixels(tmp_path, form, options):
    data = encode(NOISE, form, **options)
    np.testing.assert_array_equal(pixels(data), NOISE)
    (tmp_path / "picture.jpg").write_bytes(data)  # a wrong ending does no harm
    np.testing.assert_array_equal(np.asarray(open_rgb(tmp_path / "picture.jpg", MANY)), NOISE)


@pytest.mark.parametrize(("form", "within"), [("JPEG", 4), ("WEBP", 8), ("MPO", 4)])
def test_lossy_files_are_close(form, within):
    got = pixels(encode(SMOOTH, form, quality=95)).astype(int)
    assert np.abs(got - SMOOTH).max() <= within


def sixteen() -> np.ndarray:
    return np.array([[0, 127, 128, 129, 256, 257], [511, 4000, 32767, 32768, 65406, 65535]], dtype=np.uint16)


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_sixteen_bit_grey_keeps_its_range(form):
    got = pixels(encode(sixteen(), form))
    exact = np.floor(sixteen() / 257 + 0.5)  # nearest of 256 levels
    np.testing.assert_array_equal(got, np.repeat(exact[..., None], 3, axis=2))
    assert got.min() == 0
    assert got.max() == 255


def test_big_endian_sixteen_bit_tiff():
    values = sixteen().astype(">u2")
    tags = [
        (256, 4, 1, values.shape[1]), (257, 4, 1, values.shape[0]), (258, 3, 1, 16 << 16), (259, 3, 1, 1 << 16),
        (262, 3, 1, 1 << 16), (273, 4, 1, 8), (277, 3, 1, 1 << 16), (278, 4, 1, values.shape[0]),
        (279, 4, 1, values.nbytes),
    ]  # fmt: skip
    directory = struct.pack(">H", len(tags)) + b"".join(struct.pack(">HHII", *tag) for tag in tags) + bytes(4)
    data = b"MM\0*" + struct.pack(">I", 8 + values.nbytes) + values.tobytes() + directory
    assert Image.open(io.BytesIO(data)).mode == "I;16B"
    np.testing.assert_array_equal(pixels(data)[..., 0], np.floor(sixteen() / 257 + 0.5))


def test_grey_and_one_bit():
    np.testing.assert_array_equal(pixels(encode(NOISE[..., 0], "PNG")), np.repeat(NOISE[..., :1], 3, axis=2))
    bits = NOISE[..., 0] > 127
    for form in ("PNG", "TIFF", "BMP"):
        np.testing.assert_array_equal(pixels(encode(Image.fromarray(bits), form))[..., 1], np.where(bits, 255, 0))


def test_cmyk_jpeg():
    """Naive inks: channel = 255 (1 - ink)(1 - black); Pillow's JPEGs carry Adobe's inversion."""
    image = Image.new("CMYK", (32, 32), (51, 102, 153, 51))
    expected = [255 * (1 - ink / 255) * (1 - 51 / 255) for ink in (51, 102, 153)]
    assert b"Adobe" in encode(image, "JPEG")
    for form in ("JPEG", "TIFF"):
        got = pixels(encode(image, form))
        assert np.abs(got - np.array(expected)).max() <= 3


def palette(transparent: int | None) -> tuple[bytes, np.ndarray]:
    """A PNG with a palette of four colours and its pixels over white."""
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [10, 20, 30]], dtype=np.uint8)
    index = (np.arange(20 * 12).reshape(12, 20) % 4).astype(np.uint8)
    image = Image.fromarray(index, "P")
    image.putpalette(colours.tobytes())
    expected = colours[index].copy()
    if transparent is None:
        return encode(image, "PNG"), expected
    expected[index == transparent] = 255
    return encode(image, "PNG", transparency=transparent), expected


@pytest.mark.parametrize("transparent", [None, 0, 2])
def test_palette_with_and_without_transparency(transparent):
    data, expected = palette(transparent)
    assert Image.open(io.BytesIO(data)).mode == "P"
    np.testing.assert_array_equal(pixels(data), expected)


def test_palette_with_graded_transparency():
    image = Image.fromarray(np.zeros((4, 4), dtype=np.uint8), "P")
    image.putpalette([100, 0, 200])
    got = pixels(encode(image, "PNG", transparency=bytes([128])))
    expected = over_white(np.array([[[100, 0, 200]]]), np.array([[128]]))
    assert np.abs(got - expected).max() <= 1


def test_colour_key_transparency():
    picture = NOISE.copy()
    picture[:5] = (1, 2, 3)
    expected = picture.copy()
    expected[:5] = 255
    np.testing.assert_array_equal(pixels(encode(picture, "PNG", transparency=(1, 2, 3))), expected)
    grey = np.where(np.arange(64).reshape(8, 8) < 32, 7, 200).astype(np.uint8)
    got = pixels(encode(grey, "PNG", transparency=7))
    np.testing.assert_array_equal(got[..., 2], np.where(grey == 7, 255, 200))


@pytest.mark.parametrize("form", ["PNG", "TIFF", "WEBP"])
def test_alpha_is_over_white(form):
    alpha = RNG.integers(0, 256, NOISE.shape[:2], dtype=np.uint8)
    alpha[0], alpha[1] = 0, 255
    data = encode(np.dstack([NOISE, alpha]), form, **({"lossless": True, "exact": True} if form == "WEBP" else {}))
    got = pixels(data)
    assert np.abs(got - over_white(NOISE, alpha)).max() <= 1
    assert (got[0] == 255).all()
    np.testing.assert_array_equal(got[1], NOISE[1])


def test_grey_with_alpha_is_over_white():
    alpha = RNG.integers(0, 256, NOISE.shape[:2], dtype=np.uint8)
    got = pixels(encode(Image.fromarray(np.dstack([NOISE[..., 0], alpha]), "LA"), "PNG"))
    assert np.abs(got - over_white(NOISE[..., :1].repeat(3, axis=2), alpha)).max() <= 1


# EXIF orientation -> how the upright picture comes from the stored one
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("form", ["PNG", "TIFF", "WEBP", "JPEG"])
def test_orientation_is_applied(form, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    expected = UPRIGHT[orientation](SMOOTH).astype(int)
    got = pixels(encode(SMOOTH, form, exif=exif, quality=95, **({"lossless": True} if form == "WEBP" else {})))
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() <= (4 if form == "JPEG" else 0)


def test_orientation_of_sixteen_bit_grey():
    exif = Image.Exif()
    exif[0x0112] = 6
    assert pixels(encode(sixteen(), "PNG", exif=exif)).shape == (6, 2, 3)


@pytest.mark.parametrize(("form", "options"), [("TIFF", {}), ("WEBP", {"lossless": True}), ("PNG", {})])
def test_of_several_frames_the_first(form, options):
    others = [Image.new("RGB", (31, 23), colour) for colour in ("red", "blue")]
    data = encode(NOISE, form, save_all=True, append_images=others, **options)
    np.testing.assert_array_equal(pixels(data), NOISE)


@pytest.mark.parametrize("kind", ["float32", "int32"])
def test_unknown_ranges_are_refused(kind):
    with pytest.raises(ImageError, match="no known range"):
        open_rgb(encode(np.ones((4, 4), dtype=kind), "TIFF"), MANY)


def reason(tmp_path: Path, data: bytes, max_pixels: int = MANY) -> str:
    """Why these bytes are refused; bytes, file and `inspect` must agree."""
    path = tmp_path / "x.png"
    path.write_bytes(data)
    reasons = []
    for source in (data, path):
        with pytest.raises(ImageError) as caught:
            open_rgb(source, max_pixels)
        reasons.append(str(caught.value))
    found = inspect(path, max_pixels)
    assert found["status"] == "quarantined"
    assert {found["reason"], *reasons} == {found["reason"]}
    return found["reason"]


@pytest.mark.parametrize("form", ["PNG", "JPEG", "TIFF", "BMP", "WEBP"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
def test_truncated_files_are_no_black_pictures(tmp_path, form, share):
    data = encode(np.tile(NOISE, (8, 8, 1)), form)
    assert reason(tmp_path, data[: int(len(data) * share)])


def test_a_jpeg_cut_in_its_last_bytes(tmp_path):
    data = encode(np.tile(NOISE, (8, 8, 1)), "JPEG")
    assert reason(tmp_path, data[:-200]).startswith("truncated")


def test_what_is_no_image(tmp_path):
    assert reason(tmp_path, b"") == "empty file"
    assert reason(tmp_path, b"vase,label\n1,0\n") == "not an image"
    assert reason(tmp_path, encode(NOISE, "GIF")) == "not an image"
    assert reason(tmp_path, b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n") == "not an image"
    with pytest.raises(ImageError):
        open_rgb(tmp_path, MANY)


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that declares any size."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    return start + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(100_000, 100_000), (30_000, 30_000), (10_001, 10_000), (2**31 - 1, 1)])
def test_bombs_are_refused_from_their_header(tmp_path, size):
    text = reason(tmp_path, bomb(*size))
    assert text == f"over-large: {size[0]}x{size[1]} is over max_pixels {MANY}"


def test_max_pixels_is_the_only_limit(tmp_path):
    """At the limit a picture is whole, one pixel above it is refused; no other library's limit comes in between."""
    count = NOISE.shape[0] * NOISE.shape[1]
    data = encode(NOISE, "PNG")
    np.testing.assert_array_equal(np.asarray(open_rgb(data, count)), NOISE)
    assert "over-large" in reason(tmp_path, data, count - 1)
    large = encode(Image.new("1", (20_000, 10_000)), "PNG")
    assert "over-large" in reason(tmp_path, large)
    with pytest.raises(ImageError, match="truncated"):
        open_rgb(large[: len(large) // 2], 2 * MANY)


def reduced(size: tuple[int, int], least: int) -> tuple[int, int]:
    image = open_rgb(encode(Image.new("L", size, 90), "JPEG"), MANY, least)
    return image.size


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 150))
def test_a_reduced_jpeg_keeps_both_sides(width, height, least):
    got = reduced((width, height), least)
    for whole, part in zip((width, height), got, strict=True):
        assert part >= min(least, whole)
        assert part in {-(-whole // scale) for scale in (1, 2, 4, 8)}


def test_a_reduced_jpeg_is_smaller_and_other_formats_are_not():
    assert reduced((640, 480), 60) == (80, 60)
    assert reduced((640, 480), 61) == (160, 120)
    assert reduced((640, 480), 481) == (640, 480)
    assert open_rgb(encode(SMOOTH, "PNG"), MANY, 8).size == (64, 48)


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_reduced_jpeg_resizes_to_nearly_the_same(orientation):
    y, x = np.mgrid[0:600, 0:800]
    texture = [127 + 100 * np.sin(x / a) * np.cos(y / b) for a, b in ((40, 31), (25, 60), (90, 22))]
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(np.stack(texture, axis=-1).astype(np.uint8), "JPEG", quality=95, exif=exif)
    whole, part = (open_rgb(data, MANY, least) for least in (None, 128))
    assert part.size[0] < whole.size[0]
    whole, part = (
        np.asarray(i.resize((64, 64), Image.Resampling.BICUBIC, reducing_gap=None), dtype=float) for i in (whole, part)
    )
    assert np.abs(whole - part).mean() < 1.0
    assert np.abs(whole - part).max() < 12


def test_inspect_says_what_a_file_is(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(encode(NOISE, "JPEG"))
    assert inspect(path, MANY) == {
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "bytes": path.stat().st_size,
        "width": 31,
        "height": 23,
        "mode": "RGB",
        "format": "JPEG",
        "status": "ok",
        "reason": "",
    }


def test_inspect_of_a_file_that_is_gone(tmp_path):
    for function in (inspect, open_rgb):
        with pytest.raises(FileNotFoundError):
            function(tmp_path / "none.png", MANY)


def samples() -> dict[str, bytes]:
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "maker"
    alpha = np.dstack([NOISE, NOISE[..., :1]])
    return {
        "png": encode(NOISE, "PNG", exif=exif),
        "palette": palette(2)[0],
        "grey16": encode(sixteen(), "PNG"),
        "alpha": encode(alpha, "PNG"),
        "jpeg": encode(NOISE, "JPEG", exif=exif),
        "progressive": encode(NOISE, "JPEG", progressive=True),
        "cmyk": encode(Image.fromarray(NOISE).convert("CMYK"), "JPEG"),
        "mpo": encode(NOISE, "MPO", save_all=True, append_images=[Image.fromarray(NOISE)]),
        "tiff": encode(NOISE, "TIFF", exif=exif),
        "lzw": encode(NOISE, "TIFF", compression="tiff_lzw"),
        "jpeg in tiff": encode(NOISE, "TIFF", compression="jpeg"),
        "fax": encode(Image.fromarray(NOISE).convert("1"), "TIFF", compression="group4"),
        "bmp": encode(NOISE, "BMP"),
        "webp": encode(alpha, "WEBP", exif=exif),
    }


SAMPLES = samples()


def agree(data: bytes, path: Path, max_pixels: int) -> None:
    """`open_rgb` and `inspect` say the same of any bytes, and raise nothing but `ImageError`."""
    path.write_bytes(data)
    found = inspect(path, max_pixels)
    try:
        image = open_rgb(data, max_pixels)
    except ImageError as error:
        assert (found["status"], found["reason"]) == ("quarantined", str(error))
        assert found["reason"]
        return
    assert (found["status"], found["reason"]) == ("ok", "")
    assert sorted(image.size) == sorted((found["width"], found["height"]))


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=400))
def test_random_bytes(tmp_path_factory, data):
    agree(data, tmp_path_factory.getbasetemp() / "random", 10**6)


STARTS = (
    b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"II*\0\x08\0\0\0", b"MM\0*\0\0\0\x08", b"BM",
    b"RIFF\x40\0\0\0WEBPVP8 ",
)  # fmt: skip


@settings(deadline=None, max_examples=300)
@given(st.sampled_from(STARTS), st.binary(max_size=300))
def test_random_bytes_behind_a_true_start(tmp_path_factory, start, data):
    agree(start + data, tmp_path_factory.getbasetemp() / "random", 10**6)


@settings(deadline=None, max_examples=500)
@given(
    st.sampled_from(sorted(SAMPLES)),
    st.floats(0, 1),
    st.lists(st.tuples(st.floats(0, 1) | st.floats(0, 0.1), st.integers(0, 255)), max_size=6),
)
def test_damaged_files(tmp_path_factory, name, share, edits):
    """Cut anywhere, with any bytes overwritten."""
    data = bytearray(SAMPLES[name])
    for place, value in edits:
        data[int(place * (len(data) - 1))] = value
    data = bytes(data[: round(share * len(data))]) if share < 0.9 else bytes(data)
    agree(data, tmp_path_factory.getbasetemp() / "damaged", 10**6)


@pytest.mark.parametrize("name", SAMPLES)
def test_samples_are_good_when_whole(tmp_path, name):
    (tmp_path / "x").write_bytes(SAMPLES[name])
    assert inspect(tmp_path / "x", MANY)["status"] == "ok"


@pytest.mark.realdata
def test_real_images_are_read(realdata):
    """Each real file opens, upright or whole as Pillow alone has it, and most are reduced to fewer pixels."""
    files = sorted(p for p in realdata.rglob("*") if p.suffix.lower() in EXTENSIONS)[::25]
    assert files
    for path in files:
        assert inspect(path, MANY)["status"] == "ok", path
        with Image.open(path) as image:
            size = image.size
        assert sorted(open_rgb(path, MANY).size) == sorted(size)
        assert min(open_rgb(path, MANY, 64).size) >= min(64, *size)
