"""The pictures of trainings, drawn from their metrics.json: which lines, and what stands beside them."""

import json
import math

import numpy as np
import pytest

from scripts.biomedica import draw_curves as biomedica
from scripts.busi import draw_curves as busi
from scripts.coca import draw_curves as coca
from scripts.common import plots
from scripts.common.artefacts import read_json
from scripts.common.errors import KilnError
from scripts.rae import draw_curves as rae
from scripts.vase import draw_classifier, draw_curves

STEPS = {
    "train": [{"step": 1, "loss": 2.5, "reward": 0.1}, {"step": 2, "loss": 1.5, "reward": 0.3}],
    "validation": [{"step": 2, "eval_loss": 1.75, "eval_reward": 0.25}],
}


@pytest.fixture
def figures(monkeypatch):
    """{name of a file: the figure in it}, of all that is drawn."""
    drawn, save = {}, plots.save

    def spy(figure, path):
        drawn[path.name] = figure
        save(figure, path)

    monkeypatch.setattr(plots, "save", spy)
    return drawn


@pytest.fixture
def draw(tmp_path, figures):
    """Runs a step on metrics; the figures that it made."""

    def run(module, metrics, *more, output=("--output-folder", "")):
        path = tmp_path / "metrics.json"
        path.write_text(json.dumps(metrics))
        place = [output[0], str(tmp_path / "out" / output[1])]
        module.main(["--metrics", str(path), *more, *place, "--meta", str(tmp_path / "out/meta.json")])
        record = read_json(tmp_path / "out/meta.json")
        assert set(record["outputs"]) == set(figures) and set(record["inputs"]) == {"metrics"}
        assert all((tmp_path / "out" / name).is_file() for name in figures)
        return figures

    return run


def lines(figure) -> dict[str, tuple[list[float], list[float]]]:
    """{label: (x, y)} of a figure's curves."""
    return {
        line.get_label(): (np.asarray(line.get_xdata()).tolist(), np.asarray(line.get_ydata()).tolist())
        for line in figure.axes[0].lines
        if line.get_xdata()[0] != 0
    }


def floors(figure) -> dict[str, float]:
    """{label: y} of the lines that go through the whole picture."""
    return {line.get_label(): line.get_ydata()[0] for line in figure.axes[0].lines if line.get_xdata()[0] == 0}


def test_busi(draw):
    figure = draw(busi, {**STEPS, "guess_loss": 2.25}, "--method", "qlora")["loss.png"]
    assert lines(figure) == {"train": ([1, 2], [2.5, 1.5]), "validation": ([2], [1.75])}
    assert floors(figure) == {"a guess: tokens by frequency": 2.25}
    assert "qlora" in figure.get_suptitle()


@pytest.mark.parametrize("stage, train, validation", [("sft", [2.5, 1.5], [1.75]), ("grpo", [0.1, 0.3], [0.25])])
def test_vase_tuning(draw, stage, train, validation):
    output = ("--output", f"{stage}.png")
    figure = draw(draw_curves, {**STEPS, "floors": {"a guess": 0.5}}, "--stage", stage, output=output)[f"{stage}.png"]
    assert lines(figure) == {"train": ([1, 2], train), "validation": ([2], validation)}
    assert floors(figure) == {"a guess": 0.5}


def test_a_training_without_validation_has_one_line(draw):
    metrics = {**STEPS, "validation": [], "guess_loss": 1.0}
    assert set(lines(draw(busi, metrics, "--method", "lora")["loss.png"])) == {"train"}


def test_a_training_without_a_step_is_refused(draw, tmp_path):
    with pytest.raises(KilnError, match=r"loss\.png: nothing to draw"):
        draw(busi, {"train": [], "validation": [], "guess_loss": 1.0}, "--method", "lora")
    assert not (tmp_path / "out/meta.json").exists()


def test_vase_classifier(draw):
    row = {"train_loss": 0.7, "val_loss": 0.6, "train_accuracy": 0.5, "val_accuracy": 0.625}
    test = {"n": 10, "classes": ["low", "high"], "confusion_matrix": [[3, 1], [2, 4]], "accuracy": {"baseline": 0.6}}
    made = draw(draw_classifier, {"history": [row, {**row, "val_loss": 0.5}], "test": test})
    assert lines(made["loss.png"]) == {"train": ([1, 2], [0.7, 0.7]), "validation": ([1, 2], [0.6, 0.5])}
    assert floors(made["loss.png"]) == {"ln 2 (chance)": math.log(2)}
    assert lines(made["accuracy.png"])["validation"] == ([1, 2], [0.625, 0.625])
    assert floors(made["accuracy.png"]) == {"majority answer": 0.6}
    cells = {text.get_text().split("\n")[0] for text in made["confusion.png"].axes[0].texts}
    assert cells == {"1", "2", "3", "4"} and "n = 10" in made["confusion.png"].get_suptitle()


@pytest.mark.parametrize("pairs, on_validation", [(62, {"a guess on validation, ln(62)": math.log(62)}), (64, {})])
def test_biomedica(draw, pairs, on_validation):
    recalls = {f"val_{way}_r{k}": k / 10 for way in ("image_to_text", "text_to_image") for k in (1, 5)}
    metrics = {
        "history": [{"loss": 4.0, "val_loss": 3.5, **recalls}], "batch_size": 64, "validation_pairs": pairs,
        "guess_loss": math.log(64), "chosen": {"epoch": 1}, "chance_recalls": {1: 0.016, 5: 0.08},
    }  # fmt: skip
    made = draw(biomedica, metrics)
    assert lines(made["loss.png"]) == {"train": ([1], [4.0]), "validation": ([1], [3.5])}
    assert floors(made["loss.png"]) == {"a guess, ln(64)": math.log(64), **on_validation}
    assert lines(made["retrieval.png"]) == {
        f"{way}, R@{k}": ([1], [k / 10]) for way in ("image to text", "text to image") for k in (1, 5)
    }
    assert floors(made["retrieval.png"]) == {"R@1, a guess": 0.016, "R@5, a guess": 0.08}
    assert f"n = {pairs}, epoch 1 chosen" in made["retrieval.png"].get_suptitle()


@pytest.mark.parametrize("contrastive", [True, False])
def test_coca(draw, contrastive):
    row = {"caption": 5.0, "val_caption": 4.0, "val_r1": 0.25}
    row |= {"contrastive": 3.0, "val_contrastive": 2.0} if contrastive else {}
    metrics = {
        "history": [row], "chosen": {"epoch": 1}, "sides": {"validation": {"pairs": 39}},
        "guess_losses": {"contrastive": 2.5} if contrastive else {}, "chance_recalls": {"1": 0.03},
    }  # fmt: skip
    made = draw(coca, metrics)
    names = ("caption", "contrastive") if contrastive else ("caption",)
    assert set(lines(made["loss.png"])) == {f"{name}, {side}" for name in names for side in ("train", "validation")}
    assert floors(made["loss.png"]) == ({"contrastive, a guess": 2.5} if contrastive else {})
    assert lines(made["retrieval.png"]) == {"R@1": ([1], [0.25])}
    assert floors(made["retrieval.png"]) == {"R@1, a guess": 0.03}


@pytest.mark.parametrize("random, label", [(True, "LPIPS (random features)"), (False, "LPIPS")])
def test_rae_draws_each_loss_from_where_it_begins(draw, random, label):
    history = [{"l1": 0.2, "lpips": 0.1}, {"l1": 0.1, "lpips": 0.05, "discriminator": 1.5}]
    metrics = {"history": history, "random_features": random, "floors": {"l1": 0.3, "discriminator": 2.0}}
    figure = draw(rae, metrics, "--name", "dinov2")["loss.png"]
    assert lines(figure) == {
        "L1": ([1, 2], [0.2, 0.1]), label: ([1, 2], [0.1, 0.05]), "discriminator (hinge)": ([2], [1.5]),
    }  # fmt: skip
    assert floors(figure) == {"L1, a picture's mean colour": 0.3, "discriminator, a guess": 2.0}
    assert figure.axes[0].get_yscale() == "log"
