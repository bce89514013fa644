"""What only a GPU can show of the quality classifier: half precision, channels_last, deterministic kernels."""

import numpy as np
import pytest
from vase_fixtures import picture

from scripts.common import devices
from scripts.vase import classifier
from scripts.vase.classifier_training import Fit
from scripts.vase.classify_images import classify
from scripts.vase.settings import ClassifierSettings

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """64 pictures: reddish ones of class 0, bluish ones of class 1."""
    folder = tmp_path_factory.mktemp("pictures")
    tints = ((170, 80, 80), (80, 80, 170))
    paths = [picture(folder / f"{i}.png", i, size=64, tint=tints[i % 2]) for i in range(64)]
    return paths, np.arange(64) % 2


def fit(pictures, device: str, **changed) -> Fit:
    import torch

    values = ClassifierSettings(
        arch="resnet18", weights=None, image_size=64, epochs=4, batch_size=16, schedule="cosine", **changed
    )
    torch.manual_seed(0)
    accelerator = devices.make_accelerator(device, values.precision, 2, values.deterministic)
    paths, labels = pictures
    one = Fit(classifier.build(values), (paths[:48], labels[:48]), (paths[48:], labels[48:]), values, accelerator, 0)
    one.run(lambda _: None, lambda _: None)
    return one


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_learns_in_every_precision(pictures, precision):
    assert fit(pictures, "cuda:0", precision=precision).at.history[-1]["val_accuracy"] >= 0.9


def test_deterministic_runs_are_equal_to_the_byte(pictures):
    first, second = (fit(pictures, "cuda:0", deterministic=True).at.best for _ in range(2))
    assert all((first[name] == second[name]).all() for name in first)


def test_gpu_and_cpu_predict_the_same(pictures):
    one = fit(pictures, "cuda:0")
    model, values, paths = one.accelerator.unwrap_model(one.model).eval(), one.settings, pictures[0]
    on_gpu = classify(model, values, paths, 16, 0, one.accelerator)
    on_cpu = classify(model.cpu(), values, paths, 16, 0, devices.make_accelerator("cpu", "fp32", 2))
    np.testing.assert_allclose(on_gpu, on_cpu, atol=2e-3)
