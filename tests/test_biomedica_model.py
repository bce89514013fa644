"""Model, transforms and checkpoints of pipeline biomedica, against open_clip itself."""

import json
import random

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from vase_fixtures import clip_folder

from scripts.biomedica import checkpoints, model, transforms
from scripts.biomedica.settings import ModelSettings
from scripts.common.errors import KilnError

CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return clip_folder(tmp_path_factory.mktemp("clip") / "tiny", seed=3)


@pytest.fixture(scope="module")
def built() -> model.Clip:
    return model.build(ModelSettings(config=CONFIG), 5)


def pictures() -> list[Image.Image]:
    """Of odd shapes and modes; very long ones have no room for a crop of their area."""
    rng, made = np.random.default_rng(0), []
    for width, height in ((32, 32), (97, 41), (41, 97), (33, 200), (500, 21), (300, 299)):
        made.append(Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)))
    return [*made, made[1].convert("L"), made[1].convert("RGBA")]


def test_random_weights_follow_the_seed_and_leave_the_generators_alone(built):
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    again, other = (model.build(ModelSettings(config=CONFIG), seed).model.state_dict() for seed in (5, 6))
    assert random.getstate() == states[0] and np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])
    assert all(torch.equal(value, again[name]) for name, value in built.model.state_dict().items())
    assert not torch.equal(again["text_projection"], other["text_projection"])
    torch.manual_seed(5)
    theirs = open_clip.CLIP(**json.loads(json.dumps(CONFIG))).state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in again.items())


def test_by_name_it_is_open_clips_model(monkeypatch):
    small = CONFIG | {"quick_gelu": True}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny-test", small)
    found = model.build(ModelSettings(name="tiny-test"), 5)
    torch.manual_seed(5)
    theirs = open_clip.create_model("tiny-test")
    assert found.model_cfg == small and found.name == "tiny-test" and found.preprocess_cfg["size"] == [32, 32]
    assert str(found.model) == str(theirs) and "QuickGELU" in str(theirs)
    assert all(torch.equal(value, found.model.state_dict()[name]) for name, value in theirs.state_dict().items())
    assert torch.equal(found.tokenizer(["A chart."]), open_clip.get_tokenizer("tiny-test")(["A chart."]))


def test_from_a_folder_it_has_all_that_lies_there(folder):
    torch.manual_seed(0)
    state = torch.get_rng_state()
    found = model.build(ModelSettings(), 5, folder)
    assert torch.equal(torch.get_rng_state(), state)
    weights = load_file(folder / "open_clip_model.safetensors")
    assert all(torch.equal(value, weights[name]) for name, value in found.model.state_dict().items())
    assert found.preprocess_cfg["mean"] == [0.5, 0.5, 0.5] and found.preprocess_cfg["size"] == [32, 32]
    assert found.name == "tiny" and found.tokenizer(["a", "b"]).shape == (2, 77)
    assert [one.name for one in model.weight_files(folder)] == [model.CONFIG, "open_clip_model.safetensors"]


def test_folders_that_are_not_whole_are_refused(folder, tmp_path):
    """open_clip would go on with random weights where there are none."""
    config, tensors = (folder / model.CONFIG).read_text(), load_file(folder / "open_clip_model.safetensors")

    def refuse(message: str) -> None:
        with pytest.raises(KilnError, match=message):
            model.build(ModelSettings(), 5, tmp_path)

    refuse("open_clip_config.json: no such file")
    (tmp_path / model.CONFIG).write_text(config)
    refuse("no weights beside open_clip_config.json")
    weights = tmp_path / "open_clip_model.safetensors"
    weights.write_bytes(b"damaged")
    refuse("its weights do not fit")
    save_file({name: value for name, value in tensors.items() if name != "logit_scale"}, weights)
    refuse(r"(?s)its weights do not fit .*logit_scale")
    save_file(tensors, weights)
    facts = json.loads(config)
    facts["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = "some/tokenizer"
    (tmp_path / model.CONFIG).write_text(json.dumps(facts))
    refuse("no tokenizer")
    (tmp_path / model.CONFIG).write_text("{}")
    refuse("no model_cfg")


@pytest.mark.parametrize(
    ("changes", "message", "hint"),
    [
        ({"name": "VIT-B32"}, "'VIT-B32': open_clip has no such model", "did you mean 'ViT-B-32'"),
        ({"name": "hf-hub:some/model"}, "open_clip has no such model", "lists all"),
        ({"name": "coca_ViT-B-32"}, "a CoCa model", "CLIP model"),
        ({"name": "roberta-ViT-B-32"}, "its text tower must be fetched", "own text tower"),
        ({"name": "ViT-B-16-SigLIP"}, "its tokenizer must be fetched", "biomedica.model.weights"),
        ({"config": {"embed_dim": 8}}, "biomedica.model.config: no vision_cfg, text_cfg", "model_cfg"),
        ({"config": CONFIG | {"vision_cfg": {"layer": 3}}}, "no model of open_clip: .*layer", "by name"),
        ({"config": CONFIG | {"text_cfg": CONFIG["text_cfg"] | {"vocab_size": 300}}}, "vocab_size 300, fewer", "raise"),
    ],
)
def test_models_that_cannot_be_had_are_refused(changes, message, hint):
    with pytest.raises(KilnError, match=message) as error:
        model.build(ModelSettings(**changes), 5)
    assert hint in error.value.hint


@pytest.mark.parametrize("changes", [{}, {"resize_mode": "longest"}, {"resize_mode": "squash"},
                                     {"interpolation": "bilinear", "mean": [0.5] * 3, "size": [24, 24]}])  # fmt: skip
def test_evaluation_sees_what_open_clip_sees(built, changes):
    preprocess = built.preprocess_cfg | changes
    ours = transforms.evaluation_transform(preprocess)
    theirs = open_clip.image_transform(preprocess["size"], False, **options(preprocess))
    for image in pictures():
        found = ours(image)
        assert found.dtype == torch.uint8 and list(found.shape[1:]) == preprocess["size"]
        torch.testing.assert_close(transforms.normalise(found[None], preprocess)[0], theirs(image))


@pytest.mark.parametrize("scale", [(0.9, 1.0), (0.1, 0.5)])
def test_training_crops_are_those_of_open_clip(built, scale):
    """Its transform draws from torch's global generator, ours from one of its own that starts with the same seed."""
    preprocess = built.preprocess_cfg
    ours = transforms.TrainTransform(preprocess, scale)
    theirs = open_clip.image_transform(
        preprocess["size"], True, **options(preprocess), aug_cfg={"scale": scale}
    )  # fmt: skip
    state = torch.get_rng_state()
    for image in pictures():
        for seed in (0, 1, 2**63 - 1):
            found = transforms.normalise(ours(image, seed)[None], preprocess)[0]
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                torch.testing.assert_close(found, theirs(image))
    assert torch.equal(torch.get_rng_state(), state)
    wide = pictures()[5]
    assert not torch.equal(ours(wide, 1), ours(wide, 2)) and torch.equal(ours(wide, 1), ours(wide, 1))


def options(preprocess: dict) -> dict:
    return {name: preprocess[name] for name in ("mean", "std", "resize_mode", "interpolation", "fill_color")}


def facts_of(built: model.Clip, **changes) -> checkpoints.Facts:
    values = {"model_cfg": built.model_cfg, "preprocess_cfg": built.preprocess_cfg, "name": built.name, "seed": 5,
              "arm": "hybrid", "step": 12, "epoch": 3, "samples_local": 36, "samples_streamed": 108}  # fmt: skip
    return checkpoints.Facts(**values | changes)


def test_a_checkpoint_gives_back_the_model_and_all_that_its_use_needs(built, tmp_path):
    path, again = tmp_path / "model.safetensors", tmp_path / "again.safetensors"
    for one in (path, again):
        checkpoints.save(one, built.model, facts_of(built))
    assert path.read_bytes() == again.read_bytes()
    found = checkpoints.load(path)
    assert found.facts == facts_of(built) and not found.model.training
    images = transforms.normalise(found.transform(pictures()[1])[None], found.facts.preprocess_cfg)
    tokens = found.tokenizer(["two panels"])
    with torch.no_grad():
        assert torch.equal(found.model.encode_image(images), built.model.eval().encode_image(images))
        assert torch.equal(found.model.encode_text(tokens), built.model.encode_text(tokens))


def test_checkpoints_that_are_none_are_refused(built, tmp_path):
    path = tmp_path / "model.safetensors"
    with pytest.raises(KilnError, match="no checkpoint of a CLIP model"):
        checkpoints.load(path)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(KilnError, match="no checkpoint of a CLIP model"):
        checkpoints.load(path)
    wide = built.model_cfg | {"embed_dim": 24}
    checkpoints.save(path, built.model, facts_of(built, model_cfg=wide))
    with pytest.raises(KilnError, match="not the model that it describes"):
        checkpoints.load(path)
    text = built.model_cfg["text_cfg"] | {"hf_tokenizer_name": "some/tokenizer"}
    checkpoints.save(path, built.model, facts_of(built, model_cfg=built.model_cfg | {"text_cfg": text}))
    with pytest.raises(KilnError, match="its tokenizer 'some/tokenizer' must be fetched"):
        checkpoints.load(path)
