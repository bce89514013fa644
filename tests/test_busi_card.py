"""The model card: what it states, from what, and what it must not say."""

import json

import pytest
from busi_fixtures import Evaluation
from huggingface_hub import ModelCard
from vase_fixtures import run

from scripts.busi import describe_model
from scripts.common.errors import KilnError

PARITY = {
    "dtype": "bfloat16", "relative_error": 0.0041, "tolerance": 0.05, "largest_difference": 0.031,
    "top1_agreement": 0.875, "adapter_effect": 0.42, "prompts": 8,
}  # fmt: skip
TRAINED = {
    "settings": {
        "base": {"family": "hulumed", "code_sha256": None},
        "lora": {"rank": 64, "exclude_modules": "a/b.*"},
        "train": {"lr": 2e-4, "init_from": "home/somebody/earlier", "other": ["/home/somebody/x", "../y/z", "~/w"]},
    },
    "code": "0123abcd",
    "git_commit": "deadbeef",
    "method": "lora",
    "inputs": {"base": {"path": "/home/somebody/model"}},
}


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    made = Evaluation(tmp_path_factory.mktemp("clean"))
    return made, made.run()


@pytest.fixture(scope="module")
def leaky(tmp_path_factory):
    made = Evaluation(tmp_path_factory.mktemp("leaky"), leaks=14)
    return made, made.run()


def describe(evaluation, folder, *extra, trained=TRAINED, parity=PARITY, **changed):
    """The card's text."""
    for name, content in (("adapter.json", trained), ("parity.json", parity)):
        (folder / name).write_text(json.dumps(content))
    options = {
        "adapter-meta": folder / "adapter.json", "metrics": evaluation.out / "metrics.json",
        "leakage": evaluation.folder / "leakage_report.json", "parity": folder / "parity.json",
        "method": "lora", "base-name": "hulu-med-4b", "licence": "Apache-2.0",
        "output": folder / "card/README.md", "meta": folder / "meta.json",
    }  # fmt: skip
    options |= {name.replace("_", "-"): value for name, value in changed.items()}
    run(describe_model.main, *(text for name, value in options.items() for text in (f"--{name}", value)), *extra)
    return (folder / "card/README.md").read_text(encoding="utf-8")


def test_card_states_what_a_reader_needs(clean, tmp_path):
    made, metrics = clean
    text = describe(made, tmp_path, hub_name="ZJU-AI4H/Hulu-Med-4B")
    card = ModelCard.load(tmp_path / "card/README.md").data
    assert (card.base_model, card.license, card.pipeline_tag) == (
        "ZJU-AI4H/Hulu-Med-4B", "apache-2.0", "image-text-to-text",
    )  # fmt: skip
    per_class = metrics["data"]["train"]["per_class"]
    assert f"60 images in 45 duplicate groups ({per_class['Normal']} Normal, {per_class['Benign']} Benign" in text
    assert "**Not for diagnosis**" in text and "research" in text.lower()
    assert "The split does not leak: 0 duplicate groups lie on both sides." in text
    assert "0 at 0.97, 0 at 0.98, 0 at 0.99 (of 60)" in text
    assert "relative error of 0.0041 (tolerance 0.05; largest difference 0.031)" in text
    assert "changes them by 0.42; the likeliest token is the same on 88 %" in text
    assert "one hospital and one make of scanner, in 2018" in text and "No patient identifiers exist" in text
    silent = metrics["models"]["lora"]["text"]["unanswerable"]
    assert f"{silent} of 60 greedy texts name no class" in text
    assert "`0123abcd`" in text and "`deadbeef`" in text and "rank: 64" in text
    assert json.loads((tmp_path / "meta.json").read_text())["outputs"].keys() == {"README.md"}


def test_scores_have_intervals_and_comparisons(clean, tmp_path):
    made, metrics = clean
    text = describe(made, tmp_path)
    report = metrics["models"]["lora"]
    one = report["balanced_accuracy"]
    row = "| balanced accuracy | {:.4g} | {:.4g} to {:.4g} | 60 | 0.3333 (chance) |"
    assert row.format(one["value"], *one["ci95"]) in text
    majority = metrics["models"]["majority"]["accuracy"]["value"]
    accuracy = report["accuracy"]
    row = "| accuracy | {:.4g} | {:.4g} to {:.4g} | 60 | {:.4g} (majority) |"
    assert row.format(accuracy["value"], *accuracy["ci95"], majority) in text
    for name, key in (("sensitivity", "recall"), ("specificity", "specificity")):
        entry = report["per_class"]["Malignant"][key]
        assert f"| {name}, Malignant | {entry['value']:.4g} |" in text
    error = report["calibration"]["expected_calibration_error"]["value"]
    assert f"| expected calibration error (lower is better) | {error:.4g} | none | 60 |" in text
    base = metrics["models"]["base"]["balanced_accuracy"]
    assert (
        "Before fine-tuning, the balanced accuracy on the same images is {:.3f} ({:.3f} to {:.3f}).".format(
            base["value"], *base["ci95"]
        )
        in text
    )


def test_each_method_gets_its_own_scores(clean, tmp_path):
    made, metrics = clean
    text = describe(made, tmp_path, method="qlora", trained=TRAINED | {"method": "qlora"})
    assert f"| balanced accuracy | {metrics['models']['qlora']['balanced_accuracy']['value']:.4g} |" in text
    assert "4-bit base (QLoRA" in text and "# busi-qlora" in text


def test_a_leak_is_said_with_its_scores(leaky, tmp_path):
    made, metrics = leaky
    text = describe(made, tmp_path)
    parts = metrics["leak"]["models"]["lora"]
    shared = metrics["data"]["groups_on_both_sides"]
    assert shared > 5
    assert f"**The split leaks**: {shared} duplicate groups lie on both sides" in text
    assert "14 at 0.98" in text and "does not leak" not in text
    entry = parts["with_twin"]["accuracy"]
    assert (
        "14 with a near-twin in train: accuracy {:.3f} ({:.3f} to {:.3f})".format(entry["value"], *entry["ci95"])
        in text
    )
    entry = parts["difference"]["accuracy"]
    assert "difference {:.3f} ({:.3f} to {:.3f})".format(entry["value"], *entry["ci95"]) in text


@pytest.mark.parametrize("leaks", [1, 60])
def test_a_leak_without_intervals_is_said_too(leaks, tmp_path):
    made = Evaluation(tmp_path, leaks=leaks)
    made.run()
    text = describe(made, tmp_path)
    assert {1: "(no interval: fewer than two groups on a side)", 60: "difference none (no item outside)"}[leaks] in text


def test_no_path_of_the_disk_is_in_it(clean, tmp_path):
    made, _ = clean
    text = describe(made, tmp_path)
    for part in ("/home", "somebody", "~", "../", str(tmp_path), str(made.folder)):
        assert part not in text, part
    for kept in ("init_from: earlier", "- x\n", "- z\n", "- w\n", "exclude_modules: a/b.*"):
        assert kept in text


def test_a_base_that_is_not_on_the_hub(clean, tmp_path):
    text = describe(clean[0], tmp_path, base_name="a model given as a folder", licence="Qwen Research License")
    assert "Starting point: a model given as a folder." in text and "from scratch" not in text
    assert "Licence of the base: Qwen Research License." in text
    card = ModelCard.load(tmp_path / "card/README.md").data
    assert (card.base_model, card.license) == (None, "other")


def test_demo_says_so(clean, tmp_path):
    text = describe(clean[0], tmp_path, "--demo")
    assert "Demo data" in text and "nothing about ultrasound" in text
    assert "one hospital" not in text and "patient identifiers" not in text


@pytest.mark.parametrize("name", ["/home/x/model", "~/model", "./model", "../model"])
def test_a_base_name_that_is_a_path_is_refused(name, clean, tmp_path):
    with pytest.raises(KilnError, match="a path"):
        describe(clean[0], tmp_path, base_name=name)
    assert not (tmp_path / "card").exists()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"parity": {"dtype": "x"}}, r"parity\.json: no relative_error, tolerance, .*, prompts"),
        ({"parity": []}, r"parity\.json: no dtype"),
        ({"trained": {"code": "x", "git_commit": None}}, r"adapter\.json: no settings"),
        ({"trained": TRAINED | {"method": "qlora"}}, r"adapter\.json: an adapter by qlora"),
        ({"hub_name": "/home/x"}, "no name on the Hub"),
        ({"licence": " "}, "license is empty"),
    ],
)
def test_bad_input_is_named_and_nothing_written(changes, says, clean, tmp_path):
    with pytest.raises(KilnError, match=says):
        describe(clean[0], tmp_path, **changes)
    assert not (tmp_path / "card/README.md").exists()


def test_metrics_without_the_method(tmp_path):
    made = Evaluation(tmp_path)
    made.run(models=("base", "qlora"))
    with pytest.raises(KilnError, match=r"metrics\.json: no scores of lora; it has base, qlora, majority"):
        describe(made, tmp_path)
