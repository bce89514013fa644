"""The demo's digits and encoders: equal bytes from equal settings, each digit in its class, encoders that load."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from scripts.demo import draw_digits, initialise_encoder
from scripts.demo.settings import DemoEncodersSettings, DigitsSettings
from scripts.rae.encoder import Encoder

SMALL = {"pictures": 40, "seed": 3}


def draw(folder, **changes):
    settings = json.dumps({**SMALL, **changes})
    meta = folder.with_name(f"{folder.name}.meta.json")
    draw_digits.main(["--output-folder", str(folder), "--settings", settings, "--meta", str(meta), "--threads", "1"])
    return folder


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    return draw(tmp_path_factory.mktemp("demo") / "draw")


def test_equal_settings_give_equal_bytes(drawn, tmp_path):
    again = draw(tmp_path / "again")
    assert (again / "files.json").read_bytes() == (drawn / "files.json").read_bytes()
    other = draw(tmp_path / "other", seed=4)
    assert (other / "files.json").read_bytes() != (drawn / "files.json").read_bytes()


def test_the_number_of_processes_decides_no_byte(drawn, tmp_path):
    (tmp_path / "two").mkdir()
    draw_digits.write_demo(tmp_path / "two", DigitsSettings(**SMALL), processes=2)
    assert (tmp_path / "two" / "files.json").read_bytes() == (drawn / "files.json").read_bytes()


def test_each_picture_lies_in_the_folder_of_its_digit(drawn):
    folders = sorted(p.name for p in (drawn / "images").iterdir())
    pictures = sorted((drawn / "images").rglob("*.jpg"))
    assert folders == [str(digit) for digit in range(10)] and len(pictures) == SMALL["pictures"]
    for path in pictures:
        assert path.parent.name == str(load_digits().target[int(path.stem)])
        with Image.open(path) as image:
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (64, 64))


def test_files_json_lists_every_file(drawn):
    listing = json.loads((drawn / "files.json").read_text())
    files = {str(p.relative_to(drawn)): p.stat().st_size for p in drawn.rglob("*") if p.is_file()}
    files.pop("files.json")
    assert {name: record["bytes"] for name, record in listing.items()} == files


def test_the_digit_is_what_was_drawn(drawn):
    """The dark strokes, brought back to 8 x 8, resemble their own digit more than any other of the pictures'."""
    digits = load_digits().images
    pictures = sorted((drawn / "images").rglob("*.jpg"))
    right = 0
    for path in pictures:
        dark = 255 - np.asarray(Image.open(path).convert("L"), float)
        rows, columns = (np.flatnonzero((dark > 150).sum(axis=axis) > 1) for axis in (1, 0))
        box = dark[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        small = np.asarray(Image.fromarray(box.astype(np.uint8)).resize((8, 8), Image.Resampling.BOX), float)
        likeness = [np.corrcoef(small.ravel(), _box(digits[int(p.stem)]).ravel())[0, 1] for p in pictures]
        right += pictures[int(np.argmax(likeness))] == path
    assert right > len(pictures) / 4  # by chance one


def _box(digit: np.ndarray) -> np.ndarray:
    rows, columns = np.flatnonzero(digit.sum(1) > 8), np.flatnonzero(digit.sum(0) > 8)
    cut = digit[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return np.asarray(Image.fromarray((cut * 15).astype(np.uint8)).resize((8, 8), Image.Resampling.BOX), float)


@pytest.mark.parametrize("name", ["dinov2", "siglip2"])
def test_encoders_are_of_the_real_classes_and_load(name, tmp_path):
    values = getattr(DemoEncodersSettings(), name)
    for folder in (tmp_path / "one", tmp_path / "two"):
        initialise_encoder.main(
            ["--name", name, "--output-folder", str(folder), "--settings", values.model_dump_json(),
             "--meta", str(folder / "meta.json"), "--threads", "1"]
        )  # fmt: skip
    one, two = (tmp_path / part / "files.json" for part in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    assert set(json.loads(one.read_text())) == {"config.json", "model.safetensors", "preprocessor_config.json"}
    encoder = Encoder(Path(one).parent, values.input_size)
    assert (encoder.dim, encoder.grid, encoder.patch) == (values.width, 8, values.patch)
    assert encoder.prefix_tokens == (5 if name == "dinov2" else 0)
    assert encoder(torch.rand(2, 3, 64, 64)).shape == (2, values.width, 8, 8)
