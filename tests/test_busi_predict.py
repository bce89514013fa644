"""Scoring answers, merging adapters, and predictions for new folders."""

import json
import re
from pathlib import Path

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from vase_fixtures import files_below, picture
from vlm_fixtures import CLASSES, chat_rows, tiny_base

from scripts.busi import merge, predict, scoring
from scripts.busi.chat_examples import ChatExamples
from scripts.busi.chat_rows import read_rows
from scripts.busi.settings import PROMPT, LoraSettings
from scripts.common import merge_parity, vlm
from scripts.common.errors import KilnError

FAMILY = vlm.family("qwen")
QWEN = json.dumps({"base": {"family": "qwen"}})


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A tiny base, an adapter on it that changes its answers, and twelve pictures with chat rows."""
    root = tmp_path_factory.mktemp("busi predict")
    tiny_base(root / "base")
    chat_rows(root, "validation", 6)
    table = chat_rows(root, "test", 12)
    lines = [json.loads(line) for line in table.read_text().splitlines()]
    for number, line in enumerate(lines):  # prompts of different length, so that batches are padded
        line["messages"][0]["content"][1]["text"] = PROMPT if number % 2 else "What is it?"
    table.write_text("".join(json.dumps(line) + "\n" for line in lines))
    adapter(root / "base", root / "adapter")
    return root


def adapter(base: Path, folder: Path, size: float = 0.3) -> Path:
    """An adapter with random weights of that size."""
    from scripts.busi import lora

    model = FAMILY.load_model(base, dtype=torch.float32)
    torch.manual_seed(1)
    model = lora.add_adapters(model, FAMILY, LoraSettings(rank=4, alpha=8), False, False, None)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, size)
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


@pytest.fixture(scope="module")
def loaded(data):
    """Model, processor and the prompts of the test rows."""
    processor = FAMILY.load_processor(data / "base")
    model = FAMILY.load_model(data / "base", dtype=torch.float32).eval()
    rows = read_rows(data / "test.jsonl")
    return model, processor, rows, list(ChatExamples(data / "images", rows, FAMILY, processor, taught=False))


def by_full_passes(model, processor, image: Path, prompt: str, answer: str) -> float:
    """The plain way: one whole forward pass for image, prompt and answer."""
    batch = FAMILY.collate(model.config, [FAMILY.example(processor, image, prompt, answer)], 0)
    labels = batch.pop("labels")[0, 1:]
    with torch.no_grad():
        likely = model(**batch).logits.double().log_softmax(-1)[0, :-1]
    taught = labels != vlm.IGNORED
    return float(likely[taught].gather(1, labels[taught][:, None]).sum())


@pytest.mark.parametrize("answers", [CLASSES, ("No", "a benign lesion with a smooth rim", "Malignant")])
@pytest.mark.parametrize("start, stop", [(0, 1), (0, 5), (5, 12)])
def test_a_shared_prefix_gives_the_likelihoods_of_full_passes(loaded, data, answers, start, stop):
    model, processor, rows, examples = loaded
    batch = FAMILY.collate(model.config, examples[start:stop], processor.tokenizer.pad_token_id, "left")
    batch.pop("labels")
    found = scoring.log_likelihoods(model, FAMILY, batch, scoring.encode_answers(processor.tokenizer, answers))
    for row, number in enumerate(range(start, stop)):
        image, prompt = data / "images" / rows["image"][number], rows["prompt"][number]
        expected = [by_full_passes(model, processor, image, prompt, answer) for answer in answers]
        assert found[row].tolist() == pytest.approx(expected, abs=1e-4)


def test_the_greedy_text_is_the_likeliest_token_at_each_step(loaded):
    model, processor, _, examples = loaded
    batch = FAMILY.collate(model.config, examples[:3], processor.tokenizer.pad_token_id, "left")
    batch.pop("labels")
    texts = scoring.greedy_texts(model, batch, processor.tokenizer, 4)
    forbidden = torch.tensor(model.generation_config.suppress_tokens)
    for row in range(3):
        ids = FAMILY.collate(model.config, [examples[row]], 0)
        ids.pop("labels")
        made = []
        for _ in range(4):
            with torch.no_grad():
                logits = model(**ids).logits[0, -1]
            logits[forbidden] = -torch.inf
            token = logits.argmax()
            if int(token) in model.generation_config.eos_token_id:
                break
            made.append(int(token))
            for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
                extra = {"input_ids": token, "attention_mask": torch.tensor(1)}.get(name, torch.tensor(0))
                ids[name] = torch.cat([ids[name], extra.view(1, 1)], 1)
        assert texts[row] == processor.tokenizer.decode(made, skip_special_tokens=True).strip()


@pytest.mark.parametrize(
    ("text", "expected"),
    [("Benign", 1), ("benign.", 1), ("  MALIGNANT \n", 2), ("Normal", 0), ("", None), ("Benign or Malignant", None),
     ("It is benign", None), ("Benignn", None), ("not Normal", None), ("Normal Normal", None)],
)  # fmt: skip
def test_only_an_answer_and_nothing_else_is_an_answer(text, expected):
    assert scoring.parse_answer(text, CLASSES) == expected


@given(st.text(max_size=30))
@settings(max_examples=200, deadline=None)
def test_no_text_breaks_the_parser(text):
    found = scoring.parse_answer(text, CLASSES)
    assert found is None or CLASSES[found].casefold() in text.casefold()


def test_mean_and_sum_differ_by_the_number_of_tokens():
    answers = [torch.tensor([5, 6]), torch.tensor([5, 6, 7, 8])]
    sums = torch.tensor([[-2.0, -3.0]], dtype=torch.float64)
    assert scoring.normalise(sums, answers, "sum").tolist() == [[-2.0, -3.0]]
    assert scoring.normalise(sums, answers, "mean").tolist() == [[-1.0, -0.75]]


def run_merge(data: Path, out: Path, base: Path, used: Path) -> None:
    merge.main(
        ["--base", str(base), "--adapter", str(used), "--images", str(data / "images"), "--prompts",
         str(data / "validation.jsonl"), "--output-folder", str(out), "--meta", str(out / "meta.json"),
         "--settings", QWEN, "--threads", "1", "--device", "cpu"]
    )  # fmt: skip


@pytest.fixture(scope="module")
def merged(data, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("merged")
    run_merge(data, out, data / "base", data / "adapter")
    return out


def test_merged_weights_are_base_plus_scaled_product(data, merged):
    base, made = load_file(data / "base/model.safetensors"), load_file(merged / "model/model.safetensors")
    parts = load_file(data / "adapter/adapter_model.safetensors")
    assert made.keys() == base.keys()
    changed = 0
    for name, weight in made.items():
        layer = name.removesuffix(".weight").removeprefix("model.").removeprefix("language_model.")
        own = {key: p for key, p in parts.items() if layer + ".lora_" in key and "layers" in layer}
        if own:
            a = next(p for key, p in own.items() if "lora_A" in key)
            b = next(p for key, p in own.items() if "lora_B" in key)
            torch.testing.assert_close(weight, base[name] + 8 / 4 * b @ a, atol=1e-5, rtol=1e-5)
            changed += 1
        else:
            assert torch.equal(weight, base[name])
    assert changed == 2 * 7


def test_the_parity_report_says_how_close_and_how_large_the_effect(merged):
    report = json.loads((merged / "parity.json").read_text())
    assert report["relative_error"] < 1e-5 < report["tolerance"]
    assert report["adapter_effect"] > 0.05
    assert report["top1_agreement"] == 1.0
    assert report["prompts"] == 6
    listing = json.loads((merged / "model/files.json").read_text())
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= listing.keys()


def test_a_base_in_bfloat16_stays_in_bfloat16(data, tmp_path):
    model = FAMILY.load_model(data / "base", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    FAMILY.load_processor(data / "base").save_pretrained(tmp_path / "base")
    run_merge(data, tmp_path / "out", tmp_path / "base", data / "adapter")
    made = load_file(tmp_path / "out/model/model.safetensors")
    assert {weight.dtype for weight in made.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out/parity.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("fault", ["nothing merged", "one layer missed", "scaled twice"])
def test_the_gate_stops_a_wrong_merge_and_leaves_nothing(data, tmp_path, monkeypatch, fault):
    from peft.tuners.lora import LoraModel

    real = LoraModel.merge_and_unload
    base = dict(FAMILY.load_model(data / "base", dtype=torch.float32).named_parameters())

    def wrong(self, *args, **kwargs):
        made = real(self, *args, **kwargs)
        with torch.no_grad():
            for name, weight in made.named_parameters():
                change = weight - base[name]
                if fault == "nothing merged" or (fault == "one layer missed" and "layers.0.mlp" in name):
                    weight.copy_(base[name])
                elif fault == "scaled twice":
                    weight.add_(change)
        return made

    monkeypatch.setattr(LoraModel, "merge_and_unload", wrong)
    with pytest.raises(KilnError, match=r"relative error of logits .* tolerance 0.0001 for float32"):
        run_merge(data, tmp_path / "out", data / "base", data / "adapter")
    assert [name for name in files_below(tmp_path) if not name.endswith(".lock")] == []


def test_an_effect_that_rounding_takes_is_said_aloud():
    said = []
    report = {"relative_error": 0.01, "tolerance": 0.05, "adapter_effect": 0.015, "prompts": 1, "dtype": "bfloat16"}
    merge_parity.require_parity(report, lambda *words: said.append(words))
    assert "loses much of the adapter" in said[0][0]
    merge_parity.require_parity({**report, "adapter_effect": 0.5}, lambda *words: said.append(words))
    assert len(said) == 1


def test_logits_that_are_no_numbers_never_pass():
    broken = torch.full((2, 5), torch.nan)
    fine = torch.arange(10.0).view(2, 5)
    report = merge_parity.compare(fine, broken, fine, torch.float32)
    with pytest.raises(KilnError, match="not base"):
        merge_parity.require_parity(report, print)


def run_predict(*arguments, **settings_) -> None:
    text = json.dumps({"base": {"family": "qwen"}, "predict": {"workers": 0, **settings_}})
    predict.main([*map(str, arguments), "--settings", text, "--threads", "1", "--device", "cpu"])


def test_base_with_adapter_and_merged_model_predict_the_same(data, merged, tmp_path):
    common = ("--images", data / "images", "--rows", data / "test.jsonl")
    run_predict("--model", data / "base", "--adapter", data / "adapter", *common, "--output", tmp_path / "a.csv")
    run_predict("--model", merged / "model", *common, "--output", tmp_path / "m.csv")
    run_predict("--model", data / "base", *common, "--output", tmp_path / "b.csv")
    tables = [pd.read_csv(tmp_path / f"{name}.csv") for name in "amb"]
    likely = [table[[f"loglik_{name}" for name in CLASSES]].to_numpy() for table in tables]
    assert likely[0] == pytest.approx(likely[1], abs=1e-3)
    assert abs(likely[0] - likely[2]).max() > 0.1
    one = tables[0]
    assert one["path"].is_monotonic_increasing
    assert len(one) == 12
    p = one[[f"p_{name}" for name in CLASSES]].to_numpy()
    assert p.sum(1) == pytest.approx(1)
    scores = likely[0] / one[[f"tokens_{name}" for name in CLASSES]].to_numpy()
    assert (one["predicted"].to_numpy() == scores.argmax(1)).all()
    assert (tmp_path / "a.meta.json").is_file()


def test_the_batch_size_changes_no_decision(data, tmp_path):
    for size in (1, 5):
        run_predict(
            "--model", data / "base", "--images", data / "images", "--rows", data / "test.jsonl",
            "--output", tmp_path / f"{size}.csv", batch_size=size,
        )  # fmt: skip
    one, five = (pd.read_csv(tmp_path / f"{size}.csv") for size in (1, 5))
    assert one["loglik_Benign"].to_numpy() == pytest.approx(five["loglik_Benign"].to_numpy(), abs=1e-4)
    assert one["text"].equals(five["text"])


def test_a_new_folder_needs_no_table_and_masks_are_left_out(data, tmp_path):
    folder = tmp_path / "new"
    picture(folder / "patient 1" / "scan (1).png", 1, 96)
    picture(folder / "scan (2).png", 2, 64)
    picture(folder / "scan (2)_mask.png", 3, 64)
    (folder / "broken.png").write_text("no picture")
    run_predict("--model", data / "base", "--images", folder, "--output", tmp_path / "predictions.csv")
    made = pd.read_csv(tmp_path / "predictions.csv")
    assert list(made["path"]) == ["patient 1/scan (1).png", "scan (2).png"]
    assert made["label"].isna().all()
    bad = pd.read_csv(tmp_path / "predictions.quarantine.tsv", sep="\t")
    assert list(bad["path"]) == ["broken.png"]


def test_a_folder_without_a_readable_image_is_an_error(data, tmp_path):
    (tmp_path / "new").mkdir()
    (tmp_path / "new/broken.png").write_text("no picture")
    with pytest.raises(KilnError, match="none of 1 files"):
        run_predict("--model", data / "base", "--images", tmp_path / "new", "--output", tmp_path / "p.csv")
    assert not (tmp_path / "p.csv").exists()


def test_likelihoods_that_are_no_numbers_stop_with_the_image(data, tmp_path):
    weights = load_file(data / "base/model.safetensors")
    (tmp_path / "base").mkdir()
    for path in (data / "base").iterdir():
        (tmp_path / "base" / path.name).write_bytes(path.read_bytes())
    name = next(name for name in weights if name.endswith("norm.weight") and "visual" not in name)
    weights[name] = torch.full_like(weights[name], torch.nan)
    save_file(weights, tmp_path / "base/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(KilnError, match=re.escape("(0).png: the log-likelihoods are not finite")):
        run_predict(
            "--model", tmp_path / "base", "--images", data / "images", "--rows", data / "test.jsonl",
            "--output", tmp_path / "p.csv",
        )  # fmt: skip
