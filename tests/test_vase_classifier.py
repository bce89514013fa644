"""The quality classifier: its architecture, its training, and that no interruption changes a byte of it.

`python tests/test_vase_classifier.py` writes the golden loss curve of tests/golden/vase.json anew, which
is right only after a change that is meant to change what training computes.
"""

import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torchvision
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from vase_fixtures import ROOT, command_line, error_of, picture, run, write

from scripts.common import devices
from scripts.common.data_order import EpochBatches
from scripts.common.errors import KilnError
from scripts.common.training_state import OutOfTime
from scripts.vase import classifier, classifier_training, train_classifier
from scripts.vase.classifier_training import Fit, LabelledImages, class_weights, predict
from scripts.vase.settings import ClassifierSettings

GOLDEN = ROOT / "tests/golden/vase.json"
SMALL = {"arch": "resnet18", "weights": None, "image_size": 32, "hidden": (16, 8), "batch_size": 8, "workers": 0}
TINY = {**SMALL, "epochs": 3, "step_epochs": 2, "tracker": "none"}
RESULTS = ("classifier.safetensors", "metrics.json", "used.parquet")
TINTS = ((70, 90, 70), (180, 160, 180))


def settings(**changes) -> ClassifierSettings:
    return ClassifierSettings(**{**SMALL, **changes})


# --- architecture ---


def parameters_of(blocks, bottleneck, head):
    """Parameters of a ResNet (He et al. 2016, table 1) with a head of linear layers, counted by hand."""
    total, wide = 3 * 64 * 7 * 7 + 2 * 64, 64
    for stage, count in enumerate(blocks):
        width = 64 * 2**stage
        out = width * (4 if bottleneck else 1)
        for block in range(count):
            shapes = (
                [(wide, width, 1), (width, width, 3), (width, out, 1)]
                if bottleneck
                else [(wide, width, 3), (width, out, 3)]
            )
            if block == 0 and wide != out:
                shapes.append((wide, out, 1))
            total += sum(a * b * k * k + 2 * b for a, b, k in shapes)
            wide = out
    for a, b in zip([wide, *head], [*head, 2], strict=True):
        total += a * b + b
    return total


@pytest.mark.parametrize(
    ("arch", "blocks", "bottleneck"), [("resnet50", (3, 4, 6, 3), True), ("resnet18", (2, 2, 2, 2), False)]
)
def test_the_network_has_the_published_number_of_parameters(arch, blocks, bottleneck):
    model = classifier.build(ClassifierSettings(arch=arch))
    found = sum(p.numel() for p in model.parameters())
    assert found == parameters_of(blocks, bottleneck, (512, 256))
    if arch == "resnet50":
        assert found == pytest.approx(24.7e6, rel=1e-3)


def test_the_head_is_the_published_one():
    head = classifier.build(ClassifierSettings()).fc
    assert [type(m).__name__ for m in head] == ["Linear", "ReLU", "Dropout", "Linear", "ReLU", "Dropout", "Linear"]
    assert [tuple(head[i].weight.shape) for i in (0, 3, 6)] == [(512, 2048), (256, 512), (2, 256)]
    assert (head[2].p, head[5].p) == (0.5, 0.3)


def test_the_defaults_are_the_published_ones():
    published = {"epochs": 200, "batch_size": 256, "lr": 1e-3, "weight_decay": 1e-4, "step_epochs": 10, "gamma": 0.1}
    values = ClassifierSettings().model_dump()
    assert {k: values[k] for k in published} == published
    assert values["schedule"] == "step" and values["augment"] and values["image_size"] == 224


# --- weights from files ---


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    """Files as torchvision's: a ResNet-18 with a head of 1000 classes."""
    folder = tmp_path_factory.mktemp("imagenet")
    torch.manual_seed(5)
    state = torchvision.models.resnet18(weights=None).state_dict()
    torch.save(state, folder / "new.pth")
    torch.save({k: v for k, v in state.items() if "num_batches" not in k}, folder / "old.pth")
    save_file(state, folder / "new.safetensors")
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize("name", ["new.pth", "old.pth", "new.safetensors"])
def test_a_backbone_fills_all_but_the_head(imagenet, name):
    """Old files of torchvision do not count batches; they are the published weights, and load."""
    torch.manual_seed(1)
    model = classifier.build(settings())
    head = {k: v.clone() for k, v in model.state_dict().items() if k.startswith("fc.")}
    classifier.load_backbone(model, imagenet / name)
    given = load_file(imagenet / "new.safetensors")
    for key, value in model.state_dict().items():
        assert torch.equal(value, head[key] if key in head else given[key]), key


def test_weights_of_another_architecture_are_refused(imagenet):
    model = classifier.build(ClassifierSettings(arch="resnet50"))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(KilnError, match="new.pth: weights of another architecture.*missing") as caught:
        classifier.load_backbone(model, imagenet / "new.pth")
    assert "vase.classifier.arch" in caught.value.hint
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_a_tensor_of_another_shape_is_refused(imagenet, tmp_path):
    state = torch.load(imagenet / "new.pth", weights_only=True)
    torch.save({**state, "conv1.weight": state["conv1.weight"][:, :1]}, tmp_path / "grey.pth")
    with pytest.raises(KilnError, match=r"conv1.weight is \[64, 1, 7, 7\], expected \[64, 3, 7, 7\]"):
        classifier.load_backbone(classifier.build(settings()), tmp_path / "grey.pth")


@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
@pytest.mark.parametrize("kind", ["cut", "empty", "html", "tensor", "missing", "code"])
def test_a_file_that_is_no_state_is_refused(imagenet, tmp_path, kind, ending):
    path = tmp_path / f"weights{ending}"
    whole = (imagenet / f"new{ending}").read_bytes()
    data = {"cut": whole[: len(whole) // 2], "empty": b"", "html": b"<!doctype html><title>moved</title>"}
    if kind in data:
        path.write_bytes(data[kind])
    elif kind == "tensor":
        torch.save(torch.zeros(3), path)
    elif kind == "code":  # a pickle that would run a function when it is loaded unsafely
        torch.save({"conv1.weight": os.getcwd}, path)
    with pytest.raises(KilnError) as caught:
        classifier.load_backbone(classifier.build(settings()), path)
    assert str(path) in caught.value.message and caught.value.hint


def test_saving_and_loading_changes_nothing(tmp_path):
    torch.manual_seed(2)
    values = settings(hidden=(24, 12), dropout=(0.2, 0.1), decode="full")
    model = classifier.build(values).eval()
    for name in ("one", "two"):
        classifier.save(model, values, tmp_path / f"{name}.safetensors")
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()
    loaded, described = classifier.load(tmp_path / "one.safetensors")
    for key in ("arch", "image_size", "hidden", "dropout", "decode"):
        assert getattr(described, key) == getattr(values, key)
    classifier.save(loaded, described, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "one.safetensors").read_bytes()
    images = torch.rand(3, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded(images), model(images))
    assert not loaded.training
    with safe_open(tmp_path / "one.safetensors", framework="pt") as handle:
        assert list(handle.metadata()) == ["kiln"]  # the order of several keys is random


@pytest.mark.parametrize("content", [None, b"", b"no weights"])
def test_a_classifier_that_cannot_be_read_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "c.safetensors").write_bytes(content)
    with pytest.raises(KilnError, match=r"c\.safetensors"):
        classifier.load(tmp_path / "c.safetensors")


def test_weights_without_our_facts_are_no_classifier(imagenet):
    with pytest.raises(KilnError, match="no Kiln classifier"):
        classifier.load(imagenet / "new.safetensors")


# --- data ---


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """64 pictures, dark greenish ones of class 0 and light reddish ones of class 1: (paths, labels)."""
    folder = tmp_path_factory.mktemp("pictures")
    labels = np.arange(64) % 2
    return [picture(folder / f"{i:02d}.png", i, size=64, tint=TINTS[label]) for i, label in enumerate(labels)], labels


def test_training_images_differ_from_epoch_to_epoch(pictures):
    data = LabelledImages(*pictures, settings(), augment=True)
    for index in (0, 17):
        seen = [data[epoch, index][0] for epoch in range(6)]
        assert len({s.numpy().tobytes() for s in seen}) == 6
    assert not torch.equal(data[0, 0][0], data[0, 2][0])


def test_augmentation_is_a_function_of_seed_epoch_and_index(pictures):
    keys = [(e, i) for e in range(3) for i in range(0, 64, 9)]
    data = LabelledImages(*pictures, settings(), augment=True)
    before = torch.get_rng_state()
    found = {k: data[k][0] for k in keys}
    assert torch.equal(torch.get_rng_state(), before)  # or an image would change the next dropout
    again = LabelledImages(*pictures, settings(), augment=True)
    torch.manual_seed(99)
    assert all(torch.equal(again[k][0], found[k]) for k in reversed(keys))
    other = LabelledImages(*pictures, settings(seed=43), augment=True)
    assert not any(torch.equal(other[k][0], found[k]) for k in keys)


def test_workers_change_no_image(pictures):
    data = LabelledImages(*pictures, settings(), augment=True)
    batches = list(EpochBatches(64, 8, seed=1, epoch=4))
    one, two = (list(torch.utils.data.DataLoader(data, batch_sampler=batches, num_workers=w)) for w in (0, 2))
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(one, two, strict=True))


def test_augmentation_moves_the_picture_as_published():
    """Flips about half of the pictures, turns them by at most 10 degrees, and changes their colours."""
    size = 64
    ramp = np.tile(np.linspace(0, 255, size).astype(np.uint8)[None, :, None], (size, 1, 3))
    import PIL.Image

    transform = classifier.training_transform(size)
    torch.manual_seed(0)
    seen = [transform(PIL.Image.fromarray(ramp)).mean(0) for _ in range(90)]
    middle = slice(size // 4, 3 * size // 4)
    slopes = [(s[middle, size // 2 + 8] - s[middle, size // 2 - 8]).mean().item() for s in seen]
    assert 25 < sum(s < 0 for s in slopes) < 65
    tilts = [(s[size // 2 + 8, middle] - s[size // 2 - 8, middle]).mean().item() for s in seen]
    angles = np.degrees(np.arctan(np.abs(tilts) / np.abs(slopes)))
    assert 8 < angles.max() < 11.5 and angles.min() < 1
    strength = np.abs(slopes)
    assert strength.max() / strength.min() > 1.3


def test_evaluation_is_plain(pictures):
    """Resized, scaled and normalised by hand; the same in every epoch."""
    data = LabelledImages(*pictures, settings(), augment=False)
    assert torch.equal(data[0, 3][0], data[5, 3][0])
    import PIL.Image

    with PIL.Image.open(pictures[0][3]) as image:
        plain = np.asarray(image.convert("RGB"), dtype=np.float64) / 255
    plain = plain.reshape(32, 2, 32, 2, 3).mean((1, 3))  # 64 to 32 pixels
    expected = (plain - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    found = data[0, 3][0].numpy().transpose(1, 2, 0)
    inner = np.ix_([2, 5, 10, 13, 18, 21, 26, 29], [2, 5, 10, 13, 18, 21, 26, 29])  # inside the drawn blocks
    np.testing.assert_allclose(found[inner], expected[inner], atol=0.03)


def test_the_validation_side_is_not_augmented(pictures):
    fit = make_fit(pictures, pictures, settings())
    assert torch.equal(fit.validation[0, 1][0], fit.validation[3, 1][0])
    assert not torch.equal(fit.data[0, 1][0], fit.data[3, 1][0])
    assert torch.equal(make_fit(pictures, pictures, settings(augment=False)).data[3, 1][0], fit.validation[0, 1][0])


def test_slices_of_processes_are_disjoint_and_cover_each_batch():
    whole = list(EpochBatches(50, 12, seed=3, epoch=2))
    parts = [list(EpochBatches(50, 12, seed=3, epoch=2, rank=r, ranks=3)) for r in range(3)]
    assert [len(p) for p in parts] == [4, 4, 4] == [len(whole)] * 3
    for number, batch in enumerate(whole):
        slices = [p[number] for p in parts]
        assert [len(s) for s in slices] == [4, 4, 4]
        assert sorted(sum(slices, [])) == sorted(batch)
    assert list(EpochBatches(50, 12, seed=3, epoch=2, start=2)) == whole[2:]
    assert len({i for b in whole for _, i in b}) == 48


# --- optimisation ---


def make_fit(train, validation, values):
    torch.manual_seed(values.seed)
    accelerator = devices.make_accelerator("cpu", "fp32", 1)
    return Fit(classifier.build(values), train, validation, values, accelerator, 0)


def run_fit(fit, epochs_seen=None):
    fit.run(lambda _: None, lambda f: epochs_seen.append(f) if epochs_seen is not None else None)
    return fit.at.history


def test_balanced_class_weights_are_inverse_frequencies():
    labels = np.array([0] * 30 + [1] * 10)
    np.testing.assert_allclose(class_weights(labels, settings()), [40 / 60, 40 / 20])
    np.testing.assert_allclose(class_weights(labels, settings(class_weights="none")), [1, 1])
    assert class_weights(np.array([0, 1]), settings()).tolist() == [1, 1]


@pytest.mark.parametrize("schedule", ["step", "cosine"])
def test_the_learning_rate_follows_its_formula(pictures, schedule):
    few = ([pictures[0][0], pictures[0][1]], pictures[1][:2])
    fit = make_fit(few, few, settings(epochs=25, schedule=schedule, augment=False))
    fit._epoch = lambda _: fit._close_epoch()  # the schedule alone: no step is taken
    fit.evaluate = lambda: (0.0, 0.0)
    fit.at.seen = 1
    rates = []
    while fit.at.epoch < 25:
        rates.append(fit.optimiser.param_groups[0]["lr"])
        fit._epoch(None)
        fit.at.seen = 1
    if schedule == "step":
        expected = [1e-3 * 0.1 ** (epoch // 10) for epoch in range(25)]
    else:
        expected = [1e-3 * (1 + np.cos(np.pi * epoch / 25)) / 2 for epoch in range(25)]
    np.testing.assert_allclose(rates, expected, rtol=1e-9)
    np.testing.assert_allclose([row["lr"] for row in fit.at.history], expected, rtol=1e-9)


def test_the_optimiser_is_adam_with_decay_in_the_gradient(pictures):
    fit = make_fit(pictures, pictures, settings())
    group = fit.optimiser.param_groups[0]
    assert type(fit.optimiser.optimizer) is torch.optim.Adam
    assert (group["lr"], group["weight_decay"], group["betas"]) == (1e-3, 1e-4, (0.9, 0.999))
    assert sum(p.numel() for p in group["params"]) == sum(p.numel() for p in fit.model.parameters())


def test_it_learns_to_tell_pictures_apart(pictures):
    paths, labels = pictures
    train, held = (paths[:40], labels[:40]), (paths[40:], labels[40:])
    values = settings(epochs=4, hidden=(64, 32))
    history = run_fit(fit := make_fit(train, held, values))
    assert max(row["val_accuracy"] for row in history) >= 0.9  # 0.5 by the majority answer
    assert history[-1]["train_loss"] < 0.75 * history[0]["train_loss"]
    best = max(range(4), key=lambda e: (history[e]["val_accuracy"], -history[e]["val_loss"], -e))
    assert fit.at.best_epoch == best
    fit.model.load_state_dict(fit.at.best)
    logits, target = predict(fit.model, fit.validation, values, fit.accelerator, 0)
    assert (logits.argmax(1) == target).double().mean() == history[best]["val_accuracy"]
    assert torch.nn.functional.cross_entropy(logits, target).item() == pytest.approx(
        history[best]["val_loss"], abs=1e-5
    )


@pytest.mark.parametrize(
    ("scores", "best"),
    [
        ([(0.5, 0.6), (0.2, 0.9), (0.1, 0.8)], 1),  # accuracy first
        ([(0.5, 0.8), (0.3, 0.8), (0.4, 0.8)], 1),  # then loss
        ([(0.3, 0.8), (0.3, 0.8)], 0),  # then the first
    ],
)
def test_the_best_epoch_is_by_accuracy_then_loss(pictures, monkeypatch, scores, best):
    few = ([pictures[0][i] for i in range(8)], pictures[1][:8])
    fit = make_fit(few, few, settings(epochs=len(scores)))
    monkeypatch.setattr(fit, "evaluate", lambda: scores[fit.at.epoch])
    weights = []
    fit.run(lambda _: None, lambda f: weights.append(f.model.state_dict()["fc.0.weight"].clone()))
    assert fit.at.best_epoch == best
    assert torch.equal(fit.at.best["fc.0.weight"], weights[best])


def test_a_batch_larger_than_the_set_is_one_step_per_epoch(pictures):
    few = ([pictures[0][i] for i in range(6)], pictures[1][:6])
    fit = make_fit(few, few, settings(epochs=3, batch_size=50))
    run_fit(fit)
    assert fit.at.step == 3 and len(fit.at.history) == 3


def golden_curve(folder: Path) -> list[float]:
    """Loss of 20 training steps on 16 drawn pictures, 10 dark and 6 light ones, with all that training does."""
    labels = np.array([0] * 10 + [1] * 6)
    paths = [picture(folder / f"{i}.png", i, size=64, tint=TINTS[label]) for i, label in enumerate(labels)]
    values = settings(epochs=20, batch_size=16, lr=1e-4)
    return [row["train_loss"] for row in run_fit(make_fit((paths, labels), (paths[8:12], labels[8:12]), values))]


def test_the_loss_curve_is_the_golden_one(tmp_path):
    golden = json.loads(GOLDEN.read_text())["classifier_loss"]
    np.testing.assert_allclose(golden_curve(tmp_path), golden["values"], rtol=golden["rtol"])


# --- the step: whatever interrupts it ---


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with 48 labelled pictures and their table of sides."""
    folder = tmp_path_factory.mktemp("train")
    rows = []
    for i in range(48):
        label, side = i % 2, "train" if i < 24 else "validation" if i < 36 else "test"
        path = f"{label}/{i:02d}.png"
        picture(folder / "images" / path, i, tint=TINTS[label])
        rows.append({"path": path, "sha256": f"{i}", "vase": f"v{i}", "group": f"v{i}", "label": label, "side": side})
    write(folder / "labelled.parquet", rows)
    yield folder
    shutil.rmtree(folder)


def arguments(work, name, state=None, labelled=None):
    out = work / name
    return [
        *("--images", work / "images", "--labelled", labelled or work / "labelled.parquet", "--device", "cpu"),
        *("--state-folder", work / (state or f"{name}.state"), "--tracker-folder", work / f"{name}.tracker"),
        *("--output-folder", out, "--meta", out / "meta.json"),
    ]


def train(work, name, state=None, labelled=None, **changes):
    run(train_classifier.main, *arguments(work, name, state, labelled), settings={**TINY, **changes})
    return {n: (work / name / n).read_bytes() for n in RESULTS}


@pytest.fixture(scope="module")
def undisturbed(work):
    return train(work, "undisturbed")


def test_two_runs_are_equal(work, undisturbed):
    assert train(work, "again") == undisturbed


def test_what_it_writes(work, undisturbed):
    folder = work / "undisturbed"
    metrics = json.loads(undisturbed["metrics.json"])
    np.testing.assert_allclose([row["lr"] for row in metrics["history"]], [1e-3, 1e-3, 1e-4])
    used = pd.read_parquet(folder / "used.parquet")
    assert used["role"].value_counts().to_dict() == {"fit": 24, "choose": 12, "score": 12}
    assert (used["role"] == used["side"].map({"train": "fit", "validation": "choose", "test": "score"})).all()
    model, described = classifier.load(folder / "classifier.safetensors")
    table = pd.read_parquet(work / "labelled.parquet").query("side == 'test'")
    data = LabelledImages([work / "images" / p for p in table["path"]], table["label"].to_numpy(), described, False)
    with torch.no_grad():
        answers = torch.stack([model(data[0, i][0][None])[0].argmax() for i in range(12)]).numpy()
    accuracy = metrics["summary"]["classifier_accuracy"]
    assert accuracy["value"] == (answers == table["label"]).mean() and accuracy["n"] == 12
    assert accuracy["baseline"] == 0.5 and accuracy["baseline_kind"] == "majority"
    meta = json.loads((folder / "meta.json").read_text())
    assert set(RESULTS) <= set(meta["outputs"]) and "workers" not in meta["settings"]
    assert not (work / "undisturbed.state").exists()


def test_the_test_side_decides_no_weight(work, undisturbed):
    """With every label of the test side turned round, the same classifier comes out."""
    table = pd.read_parquet(work / "labelled.parquet")
    test = table["side"] == "test"
    table.loc[test, "label"] = 1 - table.loc[test, "label"]
    found = train(work, "turned", labelled=write(work / "turned.parquet", table))
    assert found["classifier.safetensors"] == undisturbed["classifier.safetensors"]
    assert found["metrics.json"] != undisturbed["metrics.json"]


def test_stopped_after_every_step_and_resumed_it_gives_the_same_bytes(work, undisturbed, caplog):
    caplog.set_level(logging.INFO)
    stops = 0
    while not (work / "stops/classifier.safetensors").exists():
        try:
            found = train(work, "stops", budget_minutes=0, workers=0 if stops < 6 else 1, save_minutes=stops)
        except OutOfTime as error:
            stops += 1
            assert f"saved at step {stops} " in error.message and "carries on" in error.hint
            assert not (work / "stops").exists()
    assert stops == 9  # 3 batches in each of 3 epochs
    assert found == undisturbed
    assert caplog.text.count("resumed from") == 9
    assert not (work / "stops.state").exists()


def test_a_changed_numeric_setting_starts_afresh(work):
    fresh = train(work, "fresh", epochs=1, lr=5e-4)
    with pytest.raises(OutOfTime):
        train(work, "stale", epochs=1, budget_minutes=0)
    assert train(work, "stale", epochs=1, lr=5e-4) == fresh


def test_a_changed_table_of_images_starts_afresh(work, caplog):
    caplog.set_level(logging.INFO)
    with pytest.raises(OutOfTime):
        train(work, "table", epochs=1, budget_minutes=0)
    table = pd.read_parquet(work / "labelled.parquet")
    table.loc[0, "sha256"] = "another picture under the same name"
    train(work, "table", labelled=write(work / "table.parquet", table), epochs=1)
    assert "resumed" not in caplog.text


def test_out_of_time_ends_the_command_with_a_hint(work):
    said = error_of(command_line("train_classifier", *arguments(work, "late"), settings={**TINY, "budget_minutes": 0}))
    assert "the time budget is used up; saved at step 1 in" in said and "run the same command again" in said
    assert not (work / "late").exists()
    assert len(list((work / "late.state").glob("*/step-000000001/shared.pt"))) == 1
    (told,) = (json.loads(p.read_text()) for p in (work / "late.state").glob("*/heartbeat.json"))
    assert (told["step"], told["steps"], told["last_save"]["step"], told["phase"]) == (1, 9, 1, "ending")
    assert told["owner"] == "scripts.vase.train_classifier" and 0 < told["loss"] < 10
    shutil.rmtree(work / "late.state")


def test_it_starts_from_an_earlier_classifier(work, undisturbed):
    start = work / "undisturbed/classifier.safetensors"
    train(work, "on", epochs=1, lr=1e-9, init_from=str(start))
    before, after = load_file(start), load_file(work / "on/classifier.safetensors")
    for key in before:
        if key.endswith((".weight", ".bias")):
            torch.testing.assert_close(after[key], before[key], atol=1e-6, rtol=0)
    assert str(start) in (work / "on/meta.json").read_text()
    with pytest.raises(KilnError, match=r"classifier\.safetensors: another architecture"):
        train(work, "wider", init_from=str(start), hidden=(32, 8))


def test_it_starts_from_a_backbone(work, imagenet):
    train(work, "plain", epochs=1, lr=1e-9)
    run(
        train_classifier.main, *arguments(work, "tuned"), "--weights", imagenet / "old.pth",
        settings={**TINY, "epochs": 1, "lr": 1e-9},
    )  # fmt: skip
    given = load_file(imagenet / "new.safetensors")["layer4.1.conv2.weight"]
    tuned, plain = (load_file(work / n / "classifier.safetensors")["layer4.1.conv2.weight"] for n in ("tuned", "plain"))
    torch.testing.assert_close(tuned, given, atol=1e-6, rtol=0)
    assert (plain - given).abs().max() > 1e-3


def test_a_loss_that_is_not_finite_stops_training(work):
    with pytest.raises(KilnError, match="loss is nan in epoch") as caught:
        train(work, "blown", epochs=3, lr=1e30)
    assert "vase.classifier.lr" in caught.value.hint
    assert not (work / "blown").exists()
    shutil.rmtree(work / "blown.state")


def test_an_image_that_is_gone_is_named(work):
    table = pd.read_parquet(work / "labelled.parquet")
    table.loc[3, "path"] = "0/gone.png"
    with pytest.raises(KilnError, match=r"0/gone\.png: readable when it was listed"):
        train(work, "gone", labelled=write(work / "gone.parquet", table))
    assert not (work / "gone").exists()


@pytest.mark.slow
def test_killed_at_any_moment_and_resumed_it_gives_the_same_bytes(work, undisturbed):
    """SIGKILL at seeded moments after the first save, also while a state is being written."""
    rng = random.Random(20)
    line = [
        *map(str, arguments(work, "killed")),
        "--settings",
        json.dumps({**TINY, "save_minutes": 0}),
        "--threads",
        "1",
    ]
    command = [sys.executable, "-m", "scripts.vase.train_classifier", *line]
    state, kills, last = work / "killed.state", 0, -1
    while not (work / "killed/meta.json").exists():
        with (work / "killed.log").open("w") as log:
            process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        while kills < 3 and process.poll() is None:
            steps = [int(p.name[5:14]) for p in state.glob("*/step-*") if p.suffix != ".partial"]
            if steps and max(steps) > last:
                time.sleep(rng.uniform(0, 0.5))
                process.send_signal(signal.SIGKILL)
                kills, last = kills + (process.wait() == -signal.SIGKILL), max(steps)
            time.sleep(0.01)
        assert process.wait() in (0, -signal.SIGKILL), (work / "killed.log").read_text()
    assert kills == 3
    assert {n: (work / "killed" / n).read_bytes() for n in RESULTS} == undisturbed
    assert not state.exists()
    assert [p.name for p in (work / "killed").iterdir() if p.name.endswith((".tmp", ".partial"))] == []


@pytest.mark.slow
def test_two_processes_train_one_classifier(work, undisturbed):
    """Two gloo processes on the CPU; batch norm sees half batches and dropout its own draws, so numbers are close."""
    line = [*map(str, arguments(work, "two")), "--settings", json.dumps(TINY), "--threads", "1"]
    command = [sys.executable, "-m", "scripts.common.launch", "--processes", "2", "--", "scripts.vase.train_classifier"]
    done = subprocess.run([*command, *line], cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    metrics = json.loads((work / "two/metrics.json").read_text())
    one = json.loads(undisturbed["metrics.json"])
    assert len(metrics["history"]) == 3
    first = [m["history"][0]["train_loss"] for m in (metrics, one)]
    assert first[0] == pytest.approx(first[1], rel=0.25)
    right = np.array([row["train_accuracy"] for row in metrics["history"]]) * 24  # counted over both processes
    np.testing.assert_allclose(right, right.round(), atol=1e-9)
    assert right.max() <= 24
    assert (work / "two/used.parquet").read_bytes() == undisturbed["used.parquet"]
    assert not (work / "two.state").exists()
    assert done.stderr.count("epoch 1/3") == 1  # one process speaks


def test_optimisation_reads_no_clock_and_no_command_line():
    """The module that keys a retraining holds numerics alone."""
    text = Path(classifier_training.__file__).read_text()
    assert "argparse" not in text and "import time" not in text and "log." not in text


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as place:
        curve = golden_curve(Path(place))
    known = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    known["classifier_loss"] = {"rtol": 0.03, "values": [round(v, 6) for v in curve]}
    GOLDEN.write_text(json.dumps(known, indent=1) + "\n")
