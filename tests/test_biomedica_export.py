"""The exported folder as open_clip loads it, and the model card."""

import hashlib
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from biomedica_scored_fixtures import CONFIG, hold_out, run_evaluate, train
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file, save_file

from scripts.biomedica import checkpoints, describe_model, export, transforms
from scripts.biomedica import model as models
from scripts.biomedica.settings import BiomedicaSettings, ModelSettings
from scripts.common import artefacts
from scripts.common.errors import KilnError

STEPS = 3
SOURCE = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "interpolation": "bilinear", "resize_mode": "longest"}


def do_export(checkpoint: Path, out: Path, **options) -> Path:
    given = {"checkpoint": checkpoint, "output-folder": out, "meta": out.parent / "meta.json", "threads": 1} | options
    export.main([text for key, value in given.items() for text in (f"--{key}", str(value))])
    return out


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    return train(tmp_path_factory.mktemp("trained") / "model.safetensors", STEPS)


@pytest.fixture(scope="module")
def exported(trained) -> Path:
    return do_export(trained, trained.parent / "export/model")


def same_as_checkpoint(folder: Path, checkpoint: Path) -> None:
    """What open_clip's own calls make of the folder, against the checkpoint's model."""
    own = checkpoints.load(checkpoint)
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(["a gel in the top left", "bars"])
    assert type(model) is type(own.model) and torch.equal(tokens, own.tokenizer(["a gel in the top left", "bars"]))
    pixels = np.random.default_rng(1).integers(0, 256, (50, 41, 3), dtype=np.uint8)
    image = transform(Image.fromarray(pixels))[None]
    again = transforms.normalise(own.transform(Image.fromarray(pixels))[None], own.facts.preprocess_cfg)
    with torch.inference_mode():
        for found, wanted in (
            (model.eval().encode_image(image), own.model.encode_image(again)),
            (model.encode_text(tokens), own.model.encode_text(tokens)),
        ):
            assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-5)
    weights = load_file(folder / export.WEIGHTS)
    assert all(torch.equal(weights[name], one) for name, one in load_file(checkpoint).items())


def test_open_clip_loads_what_was_trained(trained, exported):
    same_as_checkpoint(exported, trained)
    listing = artefacts.read_json(exported / "files.json")
    assert sorted(listing) == ["open_clip_config.json", "open_clip_model.safetensors"]
    for name, one in listing.items():
        data = (exported / name).read_bytes()
        assert one == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    again = do_export(trained, trained.parent / "again/model")
    assert [(again / name).read_bytes() for name in listing] == [(exported / name).read_bytes() for name in listing]


@pytest.mark.parametrize("custom_text", [False, True])
def test_a_model_that_started_from_a_folder_keeps_its_tower_and_preprocessing(tmp_path, custom_text):
    config = CONFIG | {"custom_text": True} if custom_text else CONFIG
    config = config | {"quick_gelu": True}
    folder = tmp_path / "given"
    folder.mkdir()
    artefacts.write_json(folder / models.CONFIG, {"model_cfg": config, "preprocess_cfg": SOURCE})
    save_file(models.assemble(config, "here", seed=4).state_dict(), folder / export.WEIGHTS)
    clip = models.build(ModelSettings(), 1, folder)
    with torch.no_grad():  # a step of training
        for parameter in clip.model.parameters():
            parameter.mul_(1.01)
    facts = checkpoints.Facts(clip.model_cfg, clip.preprocess_cfg, clip.name, 1, "hybrid", 1, 1, 2, 3)
    checkpoints.save(tmp_path / "model.safetensors", clip.model, facts)
    out = do_export(tmp_path / "model.safetensors", tmp_path / "export/model", weights=folder)
    same_as_checkpoint(out, tmp_path / "model.safetensors")
    wrote = artefacts.read_json(out / models.CONFIG)
    assert wrote["model_cfg"] == config and SOURCE.items() <= wrote["preprocess_cfg"].items()
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{out}")
    assert hasattr(model, "text") is custom_text


def _other_weights(folder: Path) -> None:
    tensors = load_file(folder / export.WEIGHTS)
    tensors["visual.proj"] = tensors["visual.proj"] * 1.001
    save_file(tensors, folder / export.WEIGHTS)


def _other_preprocessing(folder: Path) -> None:
    config = artefacts.read_json(folder / models.CONFIG)
    artefacts.write_json(folder / models.CONFIG, config | {"preprocess_cfg": {"mean": [0.5, 0.5, 0.5]}})


def _other_activation(folder: Path) -> None:
    config = artefacts.read_json(folder / models.CONFIG)
    config["model_cfg"]["quick_gelu"] = True
    artefacts.write_json(folder / models.CONFIG, config)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (_other_weights, "other weights, image embeddings than"),
        (_other_preprocessing, "other preprocessing than"),
        (_other_activation, "other image embeddings, text embeddings than"),
    ],
)
def test_a_folder_that_gives_another_model_is_not_put_in_place(trained, tmp_path, monkeypatch, spoil, said):
    write = export.write

    def spoiled(folder, *others):
        write(folder, *others)
        spoil(folder)

    out = do_export(trained, tmp_path / "model")
    before = (out / "files.json").read_bytes()
    monkeypatch.setattr(export, "write", spoiled)
    with pytest.raises(KilnError, match=said):
        do_export(trained, out)
    assert (out / "files.json").read_bytes() == before
    with pytest.raises(KilnError, match=said):
        do_export(trained, tmp_path / "other")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["meta.json", "model"]


def test_a_file_that_is_no_checkpoint_is_refused(exported, tmp_path):
    with pytest.raises(KilnError, match="no checkpoint of a CLIP model"):
        do_export(exported / export.WEIGHTS, tmp_path / "model")
    assert not (tmp_path / "model").exists()


# --- the card ----------------------------------------------------------------------------------

REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def scored(trained, exported) -> Path:
    """All that the card is made of, in one folder."""
    folder = trained.parent
    hold_out(folder / "held")
    runs = [f"{arm}-{3}={train(folder / f'{arm}.safetensors', STEPS, 3, arm)}" for arm in ("hybrid", "local")]
    run_evaluate(folder / "held", trained, folder / "evaluate", runs=runs)
    settings = BiomedicaSettings(model=ModelSettings(config=CONFIG)).model_dump(mode="json")
    kept = {key: settings[key] for key in ("index", "remote", "held_out", "plan", "model", "train")}
    facts = {
        "training_meta": {"settings": kept, "code": "c" * 16, "git_commit": "abc"},
        "index_summary": {"in": 1200, "samples": 1100, "rejected": 90, "quarantined": 10, "shards": 3, "reasons": {}},
        "remote_summary": {"repo": "BIOMEDICA/figures", "revision": REVISION, "shards": 40, "needed": True},
        "held_out_summary": {"sides": {"validation": {"pairs": 48}, "test": {"pairs": 48}}},
        "plan": {
            "arm": "hybrid", "samples": 50_000, "local_per_epoch": 10_653, "streamed_per_epoch": 39_347,
            "local_share": 21.306, "streamed_share": 78.694, "batch_size": 256, "epochs": 10,
        },
    }  # fmt: skip
    for name, value in facts.items():
        artefacts.write_json(folder / f"{name}.json", value)
    return folder


def describe(folder: Path, out: Path, flags: tuple[str, ...] = (), **changed: dict) -> str:
    """README.md; `changed` {input: keys to be put in place}."""
    inputs = {name: folder / f"{name}.json" for name in (
        "training_meta", "index_summary", "remote_summary", "held_out_summary", "plan"
    )} | {"metrics": folder / "evaluate/metrics.json"}  # fmt: skip
    for name, value in changed.items():
        artefacts.write_json(out / f"{name}.json", artefacts.read_json(inputs[name]) | value)
        inputs[name] = out / f"{name}.json"
    options = {name.replace("_", "-"): path for name, path in inputs.items()}
    options |= {"weights": folder / "export/model", "output-folder": out / "card", "meta": out / "card/meta.json"}
    describe_model.main([*(text for key, value in options.items() for text in (f"--{key}", str(value))), *flags])
    return (out / "card/README.md").read_text(encoding="utf-8")


def test_the_card_says_what_it_saw_how_good_it_is_and_whose_figures_they_are(scored, tmp_path):
    card = describe(scored, tmp_path)
    data = ModelCard(card).data
    assert (data.library_name, data.pipeline_tag) == ("open_clip", "zero-shot-image-classification")
    assert data.license == "unknown" and data.datasets == ["BIOMEDICA/figures"] and data.base_model is None
    for said in (
        "192 pairs were seen, 48 of them local and 144 streamed", "10,653 local (21.3 %) and 39,347 streamed (78.7 %)",
        f"data set `BIOMEDICA/figures` at commit `{REVISION}`", "90 were rejected and 10 quarantined",
        'captions "No caption found", and images with a side under 21 pixels', "2 % of articles for validation",
        "`commercial`", "Trained from scratch", "Not for diagnosis", "create_model_and_transforms",
    ):  # fmt: skip
        assert said in card
    metrics = artefacts.read_json(scored / "evaluate/metrics.json")
    for name, when in (("R@5, image to text |", "after"), ("R@5, image to text, before training |", "before")):
        (row,) = (line for line in card.splitlines() if line.startswith(f"| {name}"))
        assert f"| {metrics[when]['retrieval']['image_to_text']['recall']['5']['value']:.4g} |" in row
    one = metrics["summary"]["hybrid_over_local"]
    (row,) = (line for line in card.splitlines() if line.startswith("| R@5, both ways, hybrid less local, mean of 1"))
    assert f"| {one['value']:.4g} |" in row and "0 (local only)" in row
    assert str(scored) not in card and str(tmp_path) not in card


def test_the_folder_to_upload_holds_model_and_card(scored, tmp_path):
    describe(scored, tmp_path)
    folder = tmp_path / "card/model"
    names = {"README.md", "files.json", models.CONFIG, export.WEIGHTS}
    assert {path.name for path in folder.iterdir()} == names
    listing = artefacts.read_json(folder / "files.json")
    for name in names - {"files.json"}:
        assert listing[name]["sha256"] == hashlib.sha256((folder / name).read_bytes()).hexdigest()
    open_clip.create_model_and_transforms(f"local-dir:{folder}", require_pretrained=True)


def test_the_card_of_local_pairs_names_no_repo(scored, tmp_path):
    model = artefacts.read_json(scored / "evaluate/metrics.json")["model"] | {"samples_streamed": 0}
    remote = {"repo": "BIOMEDICA/figures", "revision": None, "needed": False}
    card = describe(scored, tmp_path, metrics={"model": model}, remote_summary=remote)
    assert "BIOMEDICA/figures`" not in card and ModelCard(card).data.datasets is None
    assert "licences of the local figures" in card and "`commercial`" not in card


def test_the_card_of_the_demo_says_so(scored, tmp_path):
    card = describe(scored, tmp_path, ("--demo",))
    assert "drawn by a rule" in card and "`commercial`" not in card and ModelCard(card).data.datasets is None


def test_given_weights_are_named_with_their_licence(scored, tmp_path):
    settings = artefacts.read_json(scored / "training_meta.json")["settings"]
    given = {"training_meta": {"settings": settings | {"model": settings["model"] | {"weights": "/home/me/clip"}}}}
    flags = ("--base-name", "CLIP of others", "--hub-name", "laion/clip", "--licence", "MIT")
    card = describe(scored, tmp_path, flags, **given)
    assert (ModelCard(card).data.license, ModelCard(card).data.base_model) == ("mit", "laion/clip")
    assert "training started from (CLIP of others): MIT" in card and "/home/me" not in card
    for flags, changed, said in (
        ((), given, "started from weights, --base-name None"),
        (("--base-name", "x"), {}, "started from random weights, --base-name x"),
        (("--base-name", "/home/me/clip"), given, "a path"),
    ):
        with pytest.raises(KilnError, match=said):
            describe(scored, tmp_path / "refused", flags, **changed)


def test_a_summary_of_another_rule_is_refused(scored, tmp_path):
    artefacts.write_json(tmp_path / "index_summary.json", {"in": 3})
    with pytest.raises(KilnError, match="no samples, rejected"):
        describe_model.main([
            *("--metrics", str(scored / "evaluate/metrics.json"), "--meta", str(tmp_path / "meta.json")),
            *("--training-meta", str(scored / "training_meta.json"), "--plan", str(scored / "plan.json")),
            *("--index-summary", str(tmp_path / "index_summary.json"), "--weights", str(scored / "export/model")),
            *("--remote-summary", str(scored / "remote_summary.json"), "--output-folder", str(tmp_path)),
            *("--held-out-summary", str(scored / "held_out_summary.json")),
        ])  # fmt: skip
