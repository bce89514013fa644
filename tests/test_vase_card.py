"""The card of the final vase model, and the folder to upload: what they say, and nothing of this disk."""

import json

import pytest
from huggingface_hub import ModelCard
from vase_fixtures import run

from scripts.common import artefacts
from scripts.common.errors import KilnError
from scripts.vase import describe_model


def entry(value, n=100):
    return {"value": value, "n": n, "ci95": [value - 0.05, value + 0.05], "baseline": None, "baseline_kind": None,
            "higher_is_better": True}  # fmt: skip


@pytest.fixture
def made(tmp_path):
    """Inputs of the step, as the steps before it write them."""
    single = {name: entry(0.5) for name in ("accuracy", "anls", "bleu1", "lexical_overlap")}
    greedy = {
        "single": {"n": 100, "vases": 20, **single},
        "dating": {"n": 30, "vases": 20, **single, "date_overlap": entry(0.25, 30)},
        "caption": {"n": 20, "vases": 20, "bleu1": entry(0.75, 20)},
    }
    metrics = {"models": {"grpo": {"greedy": greedy}}, "data": {"test": {"rows": 120, "vases": 20}}}
    artefacts.write_json(tmp_path / "metrics.json", metrics)
    trained = {"settings": {"vlm": {"model": "/home/me/secret/base"}}, "code": "abc", "git_commit": "def"}
    artefacts.write_json(tmp_path / "training.json", trained)
    sides = {"train": {"rows": 1234, "vases": 56}, "test": {"rows": 120, "vases": 20}}
    artefacts.write_json(tmp_path / "dataset.json", {"sides": sides})
    artefacts.write_json(
        tmp_path / "parity.json",
        {"dtype": "bfloat16", "prompts": 8, "relative_error": 0.004, "tolerance": 0.05},
    )
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights/model.safetensors").write_bytes(b"weights")
    artefacts.write_json(tmp_path / "weights/files.json", {"model.safetensors": {"bytes": 7, "sha256": "x"}})
    return tmp_path


def describe(made, *more, model="grpo"):
    run(
        describe_model.main, "--metrics", made / "metrics.json", "--training-meta", made / "training.json",
        "--dataset", made / "dataset.json", "--weights", made / "weights", "--model", model,
        "--base-name", "qwen2.5-vl-7b-instruct", "--hub-name", "Qwen/Qwen2.5-VL-7B-Instruct", "--licence",
        "Apache-2.0", "--output-folder", made / "out", "--meta", made / "out/meta.json", *more,
    )  # fmt: skip


def test_what_the_card_says(made):
    describe(made, "--parity", made / "parity.json")
    card = ModelCard.load(made / "out/README.md")
    assert card.data.base_model == "Qwen/Qwen2.5-VL-7B-Instruct" and card.data.license == "apache-2.0"
    text = card.content
    assert "1,234 rows of 56 vases" in text and "20 vases that no training saw" in text
    for row in ("accuracy, all questions", "overlap of date ranges, dating", "BLEU-1, caption", "accuracy, dating"):
        assert f"| {row} |" in text, row
    assert "relative error of 0.004" in text and "96 items" in text
    assert "/home/me" not in text and "base" in text


def test_the_folder_to_upload_has_weights_and_card(made):
    describe(made, "--demo")
    folder = made / "out/model"
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    assert (folder / "README.md").read_text() == (made / "out/README.md").read_text()
    assert not (folder / "model.safetensors").readlink().is_absolute()
    assert "drawn by a rule" in (folder / "README.md").read_text()
    assert set(json.loads((folder / "files.json").read_text())) == {"README.md", "model.safetensors"}


def test_a_model_without_scores_is_refused(made):
    with pytest.raises(KilnError, match="no scores of sft; it has grpo"):
        describe(made, model="sft")
