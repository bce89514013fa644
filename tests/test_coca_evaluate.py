"""From slides to captions, scores, predictions and the card, on a small world; and input that does not fit it."""

import json
import shutil
from pathlib import Path

import coca_fixtures as world_of
import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from accelerate.state import AcceleratorState
from coca_fixtures import CLASSES, TILE_DIM, common, run_caption, run_evaluate, write_slide
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file, save_file

from scripts.coca import checkpoints, describe_model, evaluate, predict
from scripts.coca.latents import Latents
from scripts.coca.settings import CocaSettings, EvaluateSettings
from scripts.coca.texts import Texts, class_of
from scripts.common import artefacts
from scripts.common.errors import KilnError


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return world_of.build_world(tmp_path_factory.mktemp("coca world"))


@pytest.fixture(scope="module")
def captions(world) -> Path:
    return run_caption(world, world / "captions")


@pytest.fixture(scope="module")
def metrics(world, captions) -> dict:
    return run_evaluate(world, captions, world / "evaluate")


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("Invasive carcinoma of the breast", "carcinoma"),
        ("CARCINOMAS in both", "carcinoma"),
        ("浸润性导管癌，中等分化", "carcinoma"),
        ("符合淋巴瘤", "lymphoma"),
        ("Lymphoma，另见癌", None),  # of two classes
        ("carcinoma，即癌", "carcinoma"),  # two terms of one
        ("an adenocarcinoma", None),  # begins in the middle of a word
        ("normal mucosa", None),
        ("", None),
    ],
)
def test_the_class_that_a_text_names(text, wanted):
    assert class_of(text, CLASSES) == wanted
    number = -1 if wanted is None else [*CLASSES].index(wanted)
    assert evaluate.labels_of([text], CLASSES).tolist() == [number]


def test_terms_of_two_classes_are_refused_before_anything_is_read(world, captions, tmp_path):
    for classes in ({"a": ["tumour", "Mass"], "b": ["mass"]}, {"a": ["淋巴瘤"], "b": ["淋巴瘤"]}):
        with pytest.raises(KilnError, match="is a term of 'a' and of 'b'"):
            run_evaluate(world, captions, tmp_path, {"classes": classes})
    assert not list(tmp_path.iterdir())


def test_a_term_within_another_classs_term_is_of_the_longer_one():
    classes = {"a": ["carcinoma"], "b": ["ductal carcinoma", "导管癌"], "c": ["癌"]}
    found = evaluate.labels_of(["Ductal carcinoma", "carcinoma", "导管癌", "肺癌", "导管癌，肺癌"], classes)
    assert found.tolist() == [1, 0, 1, 2, -1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ks": [0, 5]}, "expected distinct numbers from 1"),
        ({"ks": [5, 5]}, "expected distinct numbers from 1"),
        ({"classes": {"a": ["x"]}}, "one class, 'a'"),
        ({"classes": {"a": ["x"], "b": []}}, "class 'b' has no terms"),
        ({"classes": {"a": ["x"], "b": [" "]}}, "class 'b' has an empty term"),
        ({"classes": {"a": ["x"], "b": ["y"]}, "prompts": {"c": ["z"]}}, "prompts of 'c'"),
        ({"classes": {"a": ["x"], "b": ["y"]}, "prompts": {"b": [""]}}, "class 'b' has no prompts"),
    ],
)
def test_settings_that_cannot_hold_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        EvaluateSettings(**changes)


def test_captions_are_of_validation_and_test_and_no_batch_matters(world, captions, tmp_path):
    made = pd.read_parquet(captions)
    sides = pd.read_csv(world / "split/splits.csv", dtype=str)
    wanted = sides[sides["side"] != "train"].sort_values("slide")
    assert made["slide"].to_list() == wanted["slide"].to_list() and made["side"].to_list() == wanted["side"].to_list()
    texts = pd.read_parquet(world_of.manifest(world)).set_index("slide")["text"]
    assert made["text"].to_list() == texts[made["slide"]].to_list()
    other = run_caption(world, tmp_path, {"batch_size": 3})
    assert other.read_bytes() == captions.read_bytes()
    short = pd.read_parquet(run_caption(world, tmp_path / "short", {"max_length": 2}))
    tokens = Texts.load(world / "tokenizer")
    assert all(len(tokens.encode(one, 99)[0]) <= 2 + 2 for one in short["caption"] if "\ufffd" not in one)


def test_from_slides_to_scores(world, metrics):
    data, summary = metrics["data"]["test"], metrics["summary"]
    assert not metrics["left_out"] and data["slides"] == 2 * data["patients"] and data["distinct_texts"] <= 6
    one = summary["caption_diagnosis_accuracy"]
    assert (one["baseline_kind"], one["n"]) == ("most_frequent", data["slides"])
    assert one["ci95"][0] > one["baseline"] + 0.15 and one["value"] > one["trivial"]
    rows = np.array(metrics["diagnosis"]["confusion_matrix"]).sum(1) + metrics["diagnosis"]["unanswered"]
    assert one["baseline"] == rows.max() / rows.sum() >= one["most_frequent_in_training"]
    assert {(one["groups"], one["grouped_by"]) for one in summary.values()} == {(data["patients"], "patient")}
    one = summary["retrieval_r5"]
    assert one["baseline_kind"] == "chance" and one["value"] > one["baseline"] and 0 <= one["trivial"] <= 1
    assert one["value"] == pytest.approx((one["image_to_text"] + one["text_to_image"]) / 2)
    assert metrics["zero_shot"]["accuracy"]["value"] > metrics["zero_shot"]["most_frequent"]
    assert metrics["captions"]["tokenizer"] == "zh"
    assert metrics["captions"]["rouge_l"]["ci95"][0] > metrics["captions"]["rouge_l"]["baseline"]
    for name in ("scores", "similarity", "confusion"):
        assert Image.open(world / f"evaluate/{name}.png").width > 300
    record = json.loads((world / "evaluate/meta.json").read_text())
    assert set(record["outputs"]) == {"metrics.json", "scores.png", "similarity.png", "confusion.png"}
    assert {"captions", "manifest", "splits", "checkpoint", "latents"} < set(record["inputs"])


@torch.no_grad()
def test_similarities_are_those_of_the_model_one_by_one(world, metrics):
    model, _ = checkpoints.load(world / "model.safetensors", world / "tokenizer")
    tokens, latents = Texts.load(world / "tokenizer"), Latents(world / "latents")
    table = pd.read_parquet(world / "captions/captions.parquet")
    table = table[table["side"] == "test"]
    images, texts = [], []
    for slide, text in zip(table["slide"], table["text"], strict=True):
        image_tokens = torch.from_numpy(latents.get(slide)[1:].astype(np.float32))[None]
        out = model.coca(torch.tensor([tokens.encode(text, 64)[0]]), image_tokens)
        images.append(out.image_latents[0])
        texts.append(out.text_latents[0])
    similarity = (torch.stack(images) @ torch.stack(texts).T).numpy()
    hits = [
        any(table["text"].iloc[j] == text for j in np.argsort(-row)[:1])
        for row, text in zip(similarity, table["text"], strict=True)
    ]  # fmt: skip
    assert metrics["retrieval"]["image_to_text"]["recall"]["1"]["value"] == pytest.approx(np.mean(hits))


def test_without_classes_there_is_no_diagnosis(world, captions, tmp_path):
    made = run_evaluate(world, captions, tmp_path, {"classes": {}, "ks": [1, 5, 1000]})
    assert set(made["summary"]) == {"retrieval_r5"} and "no classes" in made["left_out"]["caption_diagnosis_accuracy"]
    assert made["retrieval"]["left_out"]["ks"] == [1000] and "diagnosis" not in made
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "meta.json", "metrics.json", "scores.png", "similarity.png",
    ]  # fmt: skip


def test_one_patient_gives_scores_without_intervals(world, captions, tmp_path):
    sides = pd.read_csv(world / "split/splits.csv", dtype=str)
    sides.loc[sides["side"] == "test", "patient"] = "one"
    sides.to_csv(tmp_path / "splits.csv", index=False)
    made = run_evaluate(world, captions, tmp_path / "out", splits=tmp_path / "splits.csv")
    assert not made["summary"] and set(made["left_out"].values()) == {"one patient: no interval"}
    for one in (made["captions"]["bleu"], made["retrieval"]["mean"]["5"], made["diagnosis"]["accuracy"]):
        assert one["ci95"] is None and one["value"] > 0


def test_texts_that_are_cut_are_counted(world, captions, metrics, tmp_path):
    assert metrics["retrieval"]["cut_texts"] == 0
    made = run_evaluate(world, captions, tmp_path, max_seq_len=3)
    assert made["retrieval"]["cut_texts"] == made["retrieval"]["candidates"]


def test_half_precision_says_the_same(world, captions, tmp_path):
    AcceleratorState._reset_state(reset_partial_state=True)  # a process has one precision
    try:
        made = run_caption(world, tmp_path, {"precision": "bf16"})
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    pairs = zip(pd.read_parquet(captions)["caption"], pd.read_parquet(made)["caption"], strict=True)
    assert np.mean([class_of(one, CLASSES) == class_of(other, CLASSES) for one, other in pairs]) > 0.8


def test_prompts_of_zero_shot_may_be_given(world, captions, tmp_path):
    prompts = {"lymphoma": ["A lymphoma.", "符合淋巴瘤。"]}
    made = run_evaluate(world, captions, tmp_path, {"prompts": prompts})
    assert made["zero_shot"]["prompts"] == {**CLASSES, **prompts}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: table.iloc[1:], "no caption of slide "),
        (lambda table: table.replace({"slide": {table["slide"].iloc[0]: "zzz"}}), "slide zzz is not on the test side"),
        (lambda table: pd.concat([table, table.iloc[:1]]), "two captions of slide "),
        (lambda table: table.assign(text="other"), "has another text than in the manifest"),
    ],
)
def test_captions_of_other_slides_are_refused(world, captions, tmp_path, change, message):
    table = pd.read_parquet(captions)
    change(table[table["side"] == "test"].reset_index(drop=True)).to_parquet(tmp_path / "captions.parquet")
    with pytest.raises(KilnError, match=message):
        run_evaluate(world, tmp_path / "captions.parquet", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_splits_of_other_slides_are_refused(world, tmp_path):
    lines = (world / "split/splits.csv").read_text().splitlines()
    (tmp_path / "splits.csv").write_text("\n".join(lines[:-1]) + "\n")
    name = lines[-1].split(",")[0]
    with pytest.raises(KilnError, match=f"splits.csv: no slide {name} "):
        run_caption(world, tmp_path / "out", splits=tmp_path / "splits.csv")


def test_a_slide_without_latents_is_named_before_any_caption(world, tmp_path):
    shutil.copytree(world / "latents", tmp_path / "latents")
    index = pd.read_parquet(tmp_path / "latents/index.parquet")
    sides = pd.read_csv(world / "split/splits.csv", dtype=str).set_index("slide")["side"]
    lost = next(slide for slide in index["slide"] if sides[slide] == "test")
    index[index["slide"] != lost].to_parquet(tmp_path / "latents/index.parquet")
    with pytest.raises(KilnError, match=f"no latents of slide {lost} "):
        run_caption(world, tmp_path / "out", latents=tmp_path / "latents")
    assert not (tmp_path / "out/captions.parquet").exists()


def test_latents_of_another_slide_encoder_are_refused(world, captions, tmp_path):
    shutil.copytree(world / "latents", tmp_path / "latents")
    facts = json.loads((tmp_path / "latents/summary.json").read_text())
    (tmp_path / "latents/summary.json").write_text(json.dumps(facts | {"encoder_sha256": "0" * 64}))
    for call in (
        lambda: run_caption(world, tmp_path / "out", latents=tmp_path / "latents"),
        lambda: run_evaluate(world, captions, tmp_path / "out", latents=tmp_path / "latents"),
    ):
        with pytest.raises(KilnError, match="latents of slide encoder 000000000000, but the model has [0-9a-f]{12}"):
            call()


def test_a_checkpoint_of_another_tokenizer_is_refused(world, captions, tmp_path):
    shutil.copytree(world / "tokenizer", tmp_path / "tokenizer")
    made = json.loads((tmp_path / "tokenizer/tokenizer.json").read_text())
    made["model"]["merges"] = made["model"]["merges"][:-1]
    (tmp_path / "tokenizer/tokenizer.json").write_text(json.dumps(made))
    other = {"tokenizer": tmp_path / "tokenizer"}
    for call in (
        lambda: run_caption(world, tmp_path / "out", **other),
        lambda: run_evaluate(world, captions, tmp_path / "out", **other),
        lambda: run_predict(world, "--slides", world / "slides", "--output", tmp_path / "p.jsonl", **other),
    ):
        with pytest.raises(KilnError, match="trained with tokenizer [0-9a-f]{12}, but .* holds another"):
            call()
    assert not (tmp_path / "p.jsonl").exists()


def run_predict(world: Path, *options, **changed) -> None:
    paths = {"tokenizer": world / "tokenizer", "checkpoint": world / "model.safetensors"} | changed
    named = [text for name, value in paths.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    predict.main([*named, *map(str, options), "--device", "cpu", "--threads", "1"])


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_predictions_of_a_folder(world, captions, tmp_path):
    asked = ["A lymphoma.", "乳腺浸润性导管癌。", "A lymphoma."]
    output, folder = tmp_path / "predictions.jsonl", tmp_path / "slides"
    for number in range(5):
        write_slide(folder / "deep" / f"{number}.h5", number, 9)
    write_slide(folder / "wide.h5", 0, 4, TILE_DIM + 1)
    (folder / "text.h5").write_text("no slide")
    with h5py.File(folder / "holes.h5", "w") as file:
        file["features"] = np.full((3, TILE_DIM), np.nan, np.float32)
    settings = json.dumps({"caption": {"batch_size": 2, "max_length": 30}})
    run_predict(world, "--slides", folder, "--text", *asked[:2], "--text", asked[2], "--output", output,
                "--settings", settings)  # fmt: skip
    made = rows(output)
    assert [one["path"] for one in made] == [f"deep/{number}.h5" for number in range(5)]
    assert [one["slide"] for one in made] == list("01234") and all(one["tiles"] == 9 for one in made)
    for one in made:
        assert list(one["scores"]) == asked[:2]
        assert sum(score["softmax"] for score in one["scores"].values()) == pytest.approx(1)
        assert all(-1 <= score["cosine"] <= 1 for score in one["scores"].values())
    assert [class_of(one["caption"], CLASSES) for one in made] == [[*CLASSES][number % 3] for number in range(5)]
    ranked = [max(one["scores"], key=lambda text: one["scores"][text]["softmax"]) for one in made]
    assert ranked[0] == ranked[3] == asked[1] and ranked[1] == ranked[4] == asked[0]
    bad = pd.read_csv(tmp_path / "predictions.quarantine.tsv", sep="\t").set_index("path")["reason"]
    assert set(bad.index) == {"wide.h5", "text.h5", "holes.h5"}
    assert "9 features per tile, expected 8" in bad["wide.h5"] and "3 of 3 tiles" in bad["holes.h5"]
    record = json.loads((tmp_path / "predictions.meta.json").read_text())
    assert record["items"] == 5 and record["texts"] == asked[:2]


def test_predictions_are_the_pipelines_captions(world, captions, tmp_path):
    known = pd.read_parquet(captions).set_index("slide")["caption"]
    run_predict(world, "--slides", world / "slides", "--output", tmp_path / "p.jsonl", "--max-length", 30)
    made = {one["slide"]: one["caption"] for one in rows(tmp_path / "p.jsonl")}
    # the pipeline stores latents in half precision, which may tip a word now and then
    assert np.mean([made[slide] == caption for slide, caption in known.items()]) > 0.9


def test_one_file_by_hand_is_printed(world, tmp_path, capsys):
    write_slide(tmp_path / "x.h5", 1, 7)
    run_predict(world, "--embeddings-file", tmp_path / "x.h5", "--text", "癌", "--max-length", 3)
    (made,) = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert (made["slide"], made["tiles"], list(made["scores"])) == ("x", 7, ["癌"])
    assert made["scores"]["癌"]["softmax"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["x.h5"]


def test_predictions_of_bad_input(world, tmp_path):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/x.h5").write_text("no slide")
    (tmp_path / "empty").mkdir()
    to = ("--output", tmp_path / "p.jsonl")
    for options, message in (
        (("--slides", tmp_path / "bad"), "none of 1 files can be used; x.h5: "),
        (("--slides", tmp_path / "empty"), "empty"),
        (("--slides", tmp_path / "none"), "none"),
        (("--embeddings-file", tmp_path / "bad/x.h5"), "none of 1 files can be used; x.h5: "),
        (("--embeddings-file", tmp_path / "gone.h5"), "gone.h5: no such file"),
        (("--slides", world / "slides", "--text", " "), "--text is blank"),
        (("--slides", world / "slides", "--encoder-weights", world / "model.safetensors"), "holds the slide encoder"),
    ):
        with pytest.raises(KilnError, match=message):
            run_predict(world, *options, *to)
    assert not (tmp_path / "p.jsonl").exists()
    with pytest.raises(SystemExit):
        run_predict(world, "--slides", world / "slides")


def test_a_frozen_slide_encoder_is_asked_for_and_checked(world, tmp_path):
    model, facts = checkpoints.load(world / "model.safetensors", None)
    weights, checkpoint = tmp_path / "encoder.safetensors", tmp_path / "frozen.safetensors"
    save_file({f"image_resampler.{name}": one for name, one in model.encoder.state_dict().items()}, weights)
    sha256 = artefacts.sha256_file(weights)
    model.encoder = None
    checkpoints.save(checkpoint, model, facts._replace(encoder_sha256=sha256))
    assert not any(name.startswith("encoder.") for name in load_file(checkpoint))
    options = ("--slides", world / "slides", "--output", tmp_path / "p.jsonl", "--max-length", 30)
    with pytest.raises(KilnError, match="its slide encoder was frozen and is not in it") as error:
        run_predict(world, *options, checkpoint=checkpoint)
    assert sha256 in error.value.hint
    with pytest.raises(KilnError, match="was trained on latents of"):
        run_predict(world, *options, checkpoint=checkpoint, encoder_weights=world / "model.safetensors")
    run_predict(world, *options, checkpoint=checkpoint, encoder_weights=weights)
    run_predict(world, *options[:3], tmp_path / "own.jsonl", *options[4:])
    assert rows(tmp_path / "p.jsonl") == rows(tmp_path / "own.jsonl")


TRAINED = {
    "settings": {
        name: getattr(CocaSettings(), name).model_dump(mode="json") for name in ("encoder", "model", "train")
    },
    "code": "0123abcd", "git_commit": "deadbeef",
}  # fmt: skip


def describe(world: Path, out: Path, *extra: str, **encoder) -> str:
    """The card's text."""
    trained = TRAINED | {"settings": TRAINED["settings"] | {"encoder": TRAINED["settings"]["encoder"] | encoder}}
    out.mkdir(parents=True, exist_ok=True)
    (out / "trained.json").write_text(json.dumps(trained))
    describe_model.main(
        ["--metrics", str(world / "evaluate/metrics.json"), "--training-meta", str(out / "trained.json"),
         "--manifest-summary", str(world / "list/summary.json"), "--checkpoint", str(world / "model.safetensors"),
         "--tokenizer", str(world / "tokenizer"), "--output-folder", str(out), *common(out), *extra]
    )  # fmt: skip
    return (out / "README.md").read_text(encoding="utf-8")


def test_the_card_says_what_a_reader_needs(world, metrics, tmp_path):
    text = describe(world, tmp_path, "--demo")
    card = ModelCard.load(tmp_path / "README.md").data
    assert (card.pipeline_tag, card.license) == ("image-to-text", "unknown")
    assert "Trained from scratch." in text and "trained with it" in text and "**Not for diagnosis**" in text
    data = metrics["data"]
    for side in ("train", "test"):
        assert f"{data[side]['slides']} slides of {data[side]['patients']} patients" in text
    for row in ("R@5, slide to text", "median rank, text to slide (lower is better)", "BLEU (0 to 100)", "ROUGE-L",
                "accuracy of the class of the caption", "accuracy of the class by prompts, zero-shot"):  # fmt: skip
        assert f"| {row} |" in text
    assert "nothing about pathology" in text and "a patient of its own" not in text and "Prism's weights" not in text
    assert "--encoder-weights" not in text and "`0123abcd`" in text and "max_seq_len: 512" in text
    listing = json.loads((tmp_path / "model/files.json").read_text())
    names = {"README.md", "model.safetensors", "tokenizer/tokenizer.json"}
    assert names <= set(listing) and all((tmp_path / "model" / name).is_file() for name in listing)
    run_predict(
        tmp_path / "model", "--slides", world / "slides", "--output", tmp_path / "p.jsonl", "--max-length", 2
    )  # fmt: skip


@pytest.mark.parametrize("frozen", [None, False])
def test_the_card_of_prisms_weights_forbids_what_their_licence_forbids(world, metrics, tmp_path, frozen):
    text = describe(world, tmp_path, weights="/home/somebody/prism.safetensors", frozen=frozen)
    assert ModelCard.load(tmp_path / "README.md").data.license == "cc-by-nc-nd-4.0"
    assert "no redistribution" in text and "gives no right to publish" in text and "somebody" not in text
    assert ("which is not among these files" in text) == (frozen is None)
    assert ("--encoder-weights ENCODER.safetensors" in text) == (frozen is None)


def test_the_card_of_another_slide_encoder(world, metrics, tmp_path):
    text = describe(world, tmp_path, "--encoder-name", "Own", "--encoder-licence", "MIT", weights="own.safetensors")
    assert ModelCard.load(tmp_path / "README.md").data.license == "mit"
    assert "Licence of the slide encoder's weights (Own): MIT." in text and "CC BY-NC-ND" not in text
    with pytest.raises(KilnError, match="--encoder-name /x/y: a path"):
        describe(world, tmp_path, "--encoder-name", "/x/y", weights="own.safetensors")


def test_the_card_names_what_an_input_lacks(world, metrics, tmp_path):
    (tmp_path / "metrics.json").write_text("{}")
    with pytest.raises(KilnError, match=r"metrics.json: no data, retrieval, captions"):
        describe(world, tmp_path, "--metrics", str(tmp_path / "metrics.json"))
