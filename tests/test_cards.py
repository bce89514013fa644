import pytest
from huggingface_hub import ModelCard

from scripts.common import cards
from scripts.common.errors import KilnError
from scripts.common.statistics import metric

CARD = {
    "name": "vase-classifier",
    "summary": "Says whether a picture of a vase is usable: 花瓶.",
    "task": "image-classification",
    "license": "apache-2.0",
    "data": "12,000 renders of 600 vases",
    "evaluated_on": "600 held-out vases",
    "metrics": {
        "accuracy": metric(0.93, 600, (0.91, 0.95), 0.4, "majority"),
        "rfid": metric(12.5, 600, (11, 14), higher_is_better=False),
        "roc_auc": {"value": None, "reason": "no item of class a | b"},
    },
    "intended_use": "Choosing views.",
    "limits": "Not for appraisal.",
    "settings": {"lr": 1e-4, "prompt": "花瓶 ``` ---\n# no heading"},
    "code_key": "0123abcd",
    "git_commit": "deadbeef",
    "base_model": "microsoft/resnet-50",
    "library": "timm",
    "languages": ["zh", "en"],
}


def test_card_reads_back_by_the_hubs_library(tmp_path):
    cards.write_card(tmp_path / "README.md", **CARD)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.license == "apache-2.0"
    assert card.data.base_model == "microsoft/resnet-50"
    assert card.data.pipeline_tag == "image-classification"
    results = {result.metric_type: result for result in card.data.eval_results}
    assert results.keys() == {"accuracy", "rfid"}
    assert results["accuracy"].metric_value == 0.93
    assert results["accuracy"].metric_name == "accuracy (n = 600, 95 % interval 0.91 to 0.95)"
    assert results["accuracy"].dataset_name == "600 held-out vases"


def test_card_says_what_a_reader_wants_to_know(tmp_path):
    cards.write_card(tmp_path / "README.md", **CARD)
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "| accuracy | 0.93 | 0.91 to 0.95 | 600 | 0.4 (majority) |" in text
    assert "| rfid (lower is better) | 12.5 | 11 to 14 | 600 |  |" in text
    assert "| roc_auc | none |  |  | no item of class a \\| b |" in text
    for part in ("Choosing views.", "Not for appraisal.", "`0123abcd`", "`deadbeef`", "lr: 0.0001", "花瓶"):
        assert part in text
    assert text.count("````") == 2  # a fence that the settings cannot close


def test_equal_input_gives_equal_bytes(tmp_path):
    for name in ("a.md", "b.md"):
        cards.write_card(tmp_path / name, **CARD)
    assert (tmp_path / "a.md").read_bytes() == (tmp_path / "b.md").read_bytes()


def test_smallest_card(tmp_path):
    least = CARD | {"metrics": {}, "base_model": None, "git_commit": None, "languages": (), "library": None}
    cards.write_card(tmp_path / "README.md", **least)
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "Trained from scratch." in text and "None were measured." in text
    assert ModelCard.load(tmp_path / "README.md").data.eval_results is None


def test_several_bases_and_datasets(tmp_path):
    cards.write_card(tmp_path / "README.md", **CARD | {"base_model": ["a/b", "c/d"], "hub_datasets": ["e/f"]})
    data = ModelCard.load(tmp_path / "README.md").data
    assert (data.base_model, data.datasets) == (["a/b", "c/d"], ["e/f"])


@pytest.mark.parametrize(
    "change",
    [
        {"base_model": "/home/somebody/model"},
        {"base_model": "./model/x"},
        {"base_model": "resnet50"},
        {"hub_datasets": ["a/b/c"]},
        {"limits": " "},
        {"license": ""},
    ],
)
def test_card_is_refused_and_not_written(change, tmp_path):
    with pytest.raises(KilnError):
        cards.write_card(tmp_path / "README.md", **CARD | change)
    assert not list(tmp_path.iterdir())
