"""Batches of images: rows that do not know their neighbours, in order, with errors that say what to do."""

import numpy as np
import pytest
import torch
from PIL import Image

from scripts.common import devices, trivial
from scripts.common.errors import KilnError
from scripts.common.image_batches import batches

BATCH = 5
CPU = torch.device("cpu")


def to_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    noise = np.random.default_rng(0)
    paths = [folder / f"{number}.png" for number in range(2 * BATCH + 1)]
    for path in paths:
        Image.fromarray(noise.integers(0, 256, (24, 24, 3), dtype=np.uint8)).save(path)
    return paths


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(3, 16, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(16, 32, 3), torch.nn.ReLU()]
    head = [torch.nn.AdaptiveAvgPool2d(4), torch.nn.Flatten(), torch.nn.Linear(512, 64)]
    return torch.nn.Sequential(*layers, *head).eval()


def outputs(net, paths, **options) -> np.ndarray:
    with torch.inference_mode():
        rows = [net(images)[:real] for images, real in batches(paths, to_tensor, BATCH, device=CPU, **options)]
    return torch.cat(rows).numpy()


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_row_does_not_know_how_many_follow(net, pictures, workers):
    whole = outputs(net, pictures, workers=0)
    assert len({row.tobytes() for row in whole}) == len(pictures)
    for count in range(1, BATCH + 2) if workers == 0 else (1, BATCH + 2):
        assert outputs(net, pictures[:count], workers=workers).tobytes() == whole[:count].tobytes()


@pytest.mark.parametrize("count", [1, 4, 5, 6, 11])
def test_every_batch_is_of_one_size_and_in_order(pictures, count):
    made = list(batches(pictures[:count], to_tensor, BATCH, 0, CPU))
    assert [len(images) for images, _ in made] == [BATCH] * -(-count // BATCH)
    assert sum(real for _, real in made) == count
    rows = torch.cat([images[:real] for images, real in made])
    for path, row in zip(pictures, rows, strict=False):
        assert torch.equal(row, to_tensor(Image.open(path)))
    last, real = made[-1]
    assert all(torch.equal(row, last[real - 1]) for row in last[real:])
    assert last.dtype == torch.float32
    assert list(batches([], to_tensor, BATCH, 0, CPU)) == []


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("damage", ["gone", "cut"])
def test_a_file_that_changed_is_named(pictures, tmp_path, workers, damage):
    lost = tmp_path / "lost.png"
    if damage == "cut":
        lost.write_bytes(pictures[0].read_bytes()[:300])
    made = batches([*pictures[:6], lost], to_tensor, BATCH, workers, CPU)
    assert next(made)[1] == BATCH
    with pytest.raises(KilnError) as caught:
        next(made)
    assert str(lost) in caught.value.message
    assert "Traceback" not in caught.value.message
    assert caught.value.hint


def test_a_large_jpeg_is_reduced_only_when_asked(tmp_path):
    Image.new("RGB", (640, 320), (200, 100, 50)).save(tmp_path / "a.jpg")
    shapes = [
        next(batches([tmp_path / "a.jpg"], to_tensor, 1, 0, CPU, least))[0].shape[2:] for least in (None, 80, 400)
    ]
    assert [tuple(shape) for shape in shapes] == [(320, 640), (80, 160), (320, 640)]


@pytest.mark.gpu
def test_batches_reach_the_gpu(pictures):
    images, _ = next(batches(pictures, to_tensor, BATCH, 0, torch.device("cuda")))
    assert images.is_cuda
    assert torch.equal(images.cpu()[0], to_tensor(Image.open(pictures[0])))


def test_trivial_features_against_known_pictures(tmp_path):
    half = np.zeros((4, 6, 3), dtype=np.uint8)
    half[:2] = (200, 100, 50)
    Image.fromarray(half).save(tmp_path / "a.png")
    size = (tmp_path / "a.png").stat().st_size / 1000
    assert trivial.image_features([tmp_path / "a.png"]).tolist() == [[100, 50, 25, 6, 4, size]]
    assert trivial.image_features([]).shape == (0, len(trivial.NAMES))


@pytest.fixture
def torch_as_it_was():
    """Device settings are the process's own; put back what a test changes."""
    threads, strict = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(strict)


@pytest.mark.parametrize("device", ["gpu", "cud:0", "CPU", "cuda:x", "cpu:1", "", "cuda:0 "])
def test_unknown_devices_are_refused(torch_as_it_was, device):
    with pytest.raises(KilnError) as caught:
        devices.make_accelerator(device, "fp32", 1)
    assert repr(device) in caught.value.message
    assert "cuda:N" in caught.value.hint


def test_a_gpu_that_is_not_there_is_refused(torch_as_it_was, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for device in ("cuda", "cuda:1"):
        with pytest.raises(KilnError, match="sees no GPU"):
            devices.make_accelerator(device, "fp32", 1)
    for device in ("cpu", "auto"):
        with pytest.raises(KilnError, match="fp16 on a CPU"):
            devices.make_accelerator(device, "fp16", 1)


def test_a_cpu_is_deterministic(torch_as_it_was):
    made = devices.make_accelerator("cpu", "fp32", 1)
    assert made.device.type == "cpu"
    assert torch.get_num_threads() == 1
    assert torch.are_deterministic_algorithms_enabled()
