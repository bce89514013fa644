"""CLIP embeddings, acceptance scores and class probabilities of images, against independent arithmetic."""

import json
import shutil

import numpy as np
import open_clip
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from vase_fixtures import clip_folder, command_line, error_of, picture, run, write

from scripts.common.artefacts import sha256_file
from scripts.common.errors import KilnError
from scripts.vase import classifier, classify_images, clip, embed_images, link_classes, score_images
from scripts.vase.settings import ClassifierSettings, PromptSettings

N = 11
PROMPTS = {
    "positive": ["a whole vase", "an intact old vase seen from its front"],
    "negative": ["shards", "a broken pot"],
}


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    return clip_folder(tmp_path_factory.mktemp("clip") / "tiny", seed=3)


@pytest.fixture(scope="session")
def loaded(model_folder):
    return clip.load(model_folder)


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """Pictures of different sizes and formats; names whose order is not the order of making."""
    folder = tmp_path_factory.mktemp("images")
    for i in range(N):
        picture(folder / f"{'ab'[i % 2]}/{(7 * i) % N:02d}{('.jpg', '.png')[i % 2]}", seed=i, size=32 + 16 * (i % 3))
    return folder


@pytest.fixture(scope="session")
def names(images):
    return sorted(str(p.relative_to(images)) for p in images.rglob("*.*"))


def shard(path, names, images, bad=()):
    files = {n: images / n for n in names}
    hashes = {n: sha256_file(file) if file.exists() else "0" * 64 for n, file in files.items()}
    rows = [{"path": n, "status": "quarantined" if n in bad else "ok", "sha256": hashes[n]} for n in names]
    return write(path, rows)


def embed(folder, names, images, model, bad=(), **settings):
    """Embeddings of one shard by the step: {path: row}."""
    folder.mkdir(parents=True, exist_ok=True)
    run(
        embed_images.main,
        *("--images", images, "--shard", shard(folder / "shard.parquet", names, images, bad), "--model", model),
        *("--output", folder / "e.arrow", "--meta", folder / "e.meta.json", "--device", "cpu"),
        settings={"workers": 0, "batch_size": 4, **settings},
    )
    found, embeddings = embed_images.read_embeddings(folder / "e.arrow")
    assert len(found) == len(embeddings)
    return dict(zip(found, embeddings, strict=True))


def score(folder, embeddings, model, **settings):
    out = folder / "scores.parquet"
    arguments = ("--embeddings", *embeddings, "--model", model, "--output", out, "--meta", folder / "scores.meta.json")
    run(score_images.main, *arguments, settings={**PROMPTS, **settings})
    return pd.read_parquet(out).set_index("path")


# --- the model ---


def test_text_direction_averages_before_it_normalises(loaded):
    prompts = ["an intact vase", "a clear frontal view of a whole vase", "shards"]
    with torch.no_grad():
        rows = [loaded.model.encode_text(loaded.tokenizer([p]))[0].numpy().astype(np.float64) for p in prompts]
    mean = sum(rows) / len(rows)
    found = clip.text_direction(loaded, prompts).numpy()
    np.testing.assert_allclose(found, mean / np.linalg.norm(mean), atol=2e-6)
    assert np.linalg.norm(found) == pytest.approx(1, abs=1e-6)
    unit = sum(r / np.linalg.norm(r) for r in rows)  # the other, common recipe is not the published one
    assert np.abs(found - unit / np.linalg.norm(unit)).max() > 1e-5


def test_embeddings_are_the_models_own(loaded, images, names, model_folder, tmp_path):
    """Against a plain forward pass of each image on its own, by open_clip alone."""
    found = embed(tmp_path, names, images, model_folder, decode="full")
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{model_folder}")
    model.eval()
    assert list(found) == names
    for name in names:
        with torch.no_grad(), Image.open(images / name) as image:
            row = model.encode_image(transform(image.convert("RGB"))[None])[0].numpy()
        np.testing.assert_allclose(found[name], row / np.linalg.norm(row), atol=1e-5)
        assert np.linalg.norm(found[name]) == pytest.approx(1, abs=1e-6)
    assert len({row.tobytes() for row in found.values()}) == N


def test_loading_draws_no_random_number_into_the_weights(model_folder):
    weights = load_file(model_folder / clip.WEIGHTS)
    for seed in (0, 1):
        torch.manual_seed(seed)
        state = clip.load(model_folder).model.state_dict()
        assert all(torch.equal(state[k], v) for k, v in weights.items())


def broken(model_folder, folder, change):
    shutil.copytree(model_folder, folder)
    change(folder)
    return folder


def drop_weights(folder):
    (folder / clip.WEIGHTS).unlink()


def drop_config(folder):
    (folder / clip.CONFIG).unlink()


def cut_weights(folder):
    data = (folder / clip.WEIGHTS).read_bytes()
    (folder / clip.WEIGHTS).write_bytes(data[: len(data) // 2])


def empty_weights(folder):
    (folder / clip.WEIGHTS).write_bytes(b"")


def no_safetensors(folder):
    (folder / clip.WEIGHTS).write_text("<!doctype html><title>sign in</title>")


def other_shape(folder):
    clip_folder(folder.with_name("other"), embed_dim=16)
    shutil.copy(folder.with_name("other") / clip.WEIGHTS, folder / clip.WEIGHTS)


def other_depth(folder):
    clip_folder(folder.with_name("deeper"), layers=3)
    shutil.copy(folder.with_name("deeper") / clip.WEIGHTS, folder / clip.WEIGHTS)


def one_tensor_less(folder):
    state = load_file(folder / clip.WEIGHTS)
    del state["visual.proj"]
    save_file(state, folder / clip.WEIGHTS)


def config_is_no_json(folder):
    (folder / clip.CONFIG).write_text("{")


def config_without_model(folder):
    (folder / clip.CONFIG).write_text("{}")


def config_with_unknown_key(folder):
    config = json.loads((folder / clip.CONFIG).read_text())
    config["model_cfg"]["no_such_key"] = 1
    (folder / clip.CONFIG).write_text(json.dumps(config))


BREAKS = [drop_weights, drop_config, cut_weights, empty_weights, no_safetensors, other_shape, other_depth]
BREAKS += [one_tensor_less, config_is_no_json, config_without_model, config_with_unknown_key]


@pytest.mark.parametrize("change", BREAKS, ids=lambda f: f.__name__)
def test_a_model_folder_that_is_not_whole_is_refused(model_folder, tmp_path, change):
    """Never a model with random weights, which would score noise without a word."""
    folder = broken(model_folder, tmp_path / "clip", change)
    with pytest.raises(KilnError) as caught:
        clip.load(folder)
    assert str(folder) in caught.value.message and caught.value.hint


def test_a_missing_model_ends_the_command_with_a_hint(images, names, tmp_path):
    table = shard(tmp_path / "shard.parquet", names, images)
    arguments = ["--images", images, "--shard", table, "--model", tmp_path / "none"]
    arguments += ["--output", tmp_path / "e.arrow", "--meta", tmp_path / "m.json", "--device", "cpu"]
    said = error_of(command_line("embed_images", *arguments))
    assert f"{tmp_path / 'none' / clip.CONFIG}: no such file" in said
    assert not (tmp_path / "e.arrow").exists()


# --- embeddings ---


def test_an_embedding_does_not_depend_on_its_shard(images, names, model_folder, tmp_path):
    """Neither on its neighbours, nor on how many they are, nor on its place among them."""
    whole = embed(tmp_path / "whole", names, images, model_folder)
    for size in (1, 3, 7):
        for start in range(0, N, size):
            part = names[start : start + size]
            found = embed(tmp_path / f"{size}-{start}", part, images, model_folder)
            assert list(found) == part
            assert all(found[n].tobytes() == whole[n].tobytes() for n in part), (size, start)


def test_quarantined_images_are_not_embedded_and_change_nothing(images, names, model_folder, tmp_path):
    whole = embed(tmp_path / "whole", names, images, model_folder)
    bad = names[::3]
    found = embed(tmp_path / "part", names, images, model_folder, bad=bad)
    assert list(found) == [n for n in names if n not in bad]
    assert all(found[n].tobytes() == whole[n].tobytes() for n in found)


def test_workers_change_no_byte(images, names, model_folder, tmp_path):
    for workers in (0, 2):
        embed(tmp_path / str(workers), names, images, model_folder, workers=workers)
    assert (tmp_path / "0/e.arrow").read_bytes() == (tmp_path / "2/e.arrow").read_bytes()


def test_a_shard_without_readable_images_has_no_rows_and_the_right_width(images, names, model_folder, tmp_path):
    assert embed(tmp_path, names[:2], images, model_folder, bad=names[:2]) == {}
    assert embed_images.read_embeddings(tmp_path / "e.arrow")[1].shape == (0, 32)


def test_an_image_that_is_gone_is_named(images, names, model_folder, tmp_path):
    with pytest.raises(KilnError, match=r"gone\.jpg: readable when it was listed"):
        embed(tmp_path, [*names, "gone.jpg"], images, model_folder)
    assert not (tmp_path / "e.arrow").exists()


def test_reduced_decoding_hardly_moves_an_embedding(model_folder, tmp_path):
    picture(tmp_path / "images/big.jpg", seed=1, size=512)
    full, reduced = (
        embed(tmp_path / d, ["big.jpg"], tmp_path / "images", model_folder, decode=d)["big.jpg"]
        for d in ("full", "reduced")
    )
    assert full @ reduced > 0.995


def test_stored_embeddings_come_back_as_they_were(tmp_path):
    values = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    embed_images.write_embeddings(tmp_path / "e.arrow", list("edcba"), values)
    names, found = embed_images.read_embeddings(tmp_path / "e.arrow")
    assert names == list("edcba") and found.dtype == np.float32
    np.testing.assert_array_equal(found, values)


@pytest.mark.parametrize("content", [None, b"", b"no arrow file"])
def test_damaged_embeddings_are_named(tmp_path, content):
    if content is not None:
        (tmp_path / "e.arrow").write_bytes(content)
    with pytest.raises(KilnError, match=r"e\.arrow"):
        embed_images.read_embeddings(tmp_path / "e.arrow")


# --- scores ---


def unit(rng, *shape):
    rows = rng.normal(size=shape)
    return (rows / np.linalg.norm(rows, axis=-1, keepdims=True)).astype(np.float32)


def test_the_score_is_the_difference_of_two_cosines():
    rng = np.random.default_rng(1)
    e, p, n = unit(rng, 50, 24), unit(rng, 24), unit(rng, 24)
    found = score_images.score(e, p, n)
    for i in range(50):
        high = sum(float(a) * float(b) for a, b in zip(e[i], p, strict=True))
        low = sum(float(a) * float(b) for a, b in zip(e[i], n, strict=True))
        np.testing.assert_allclose(found[i], [high, low, high - low], atol=1e-12)
    assert (np.abs(found[:, :2]) <= 1 + 1e-6).all() and (np.abs(found[:, 2]) <= 2 + 1e-6).all()
    best = score_images.score(np.stack([p, -p, n]), p, -p)
    np.testing.assert_allclose(best[:2], [[1, -1, 2], [-1, 1, -2]], atol=1e-6)


def test_rows_are_scored_independently():
    rng = np.random.default_rng(2)
    e, p, n = unit(rng, 301, 512), unit(rng, 512), unit(rng, 512)
    whole = score_images.score(e, p, n)
    for part in (slice(0, 1), slice(17, 20), slice(3, 300), slice(None, None, -7)):
        assert score_images.score(e[part], p, n).tobytes() == whole[part].tobytes()


def test_scores_of_all_shards_follow_from_prompts_and_embeddings(images, names, model_folder, loaded, tmp_path):
    rows = embed(tmp_path / "a", names[:4], images, model_folder)
    rows |= embed(tmp_path / "b", names[4:], images, model_folder)
    embed(tmp_path / "c", names[:1], images, model_folder, bad=names[:1])
    found = score(tmp_path, [tmp_path / x / "e.arrow" for x in "bca"], model_folder)
    assert list(found.index) == names
    p, n = (clip.text_direction(loaded, PROMPTS[k]).double().numpy() for k in ("positive", "negative"))
    for name in names:
        high, low = rows[name].astype(float) @ p, rows[name].astype(float) @ n
        row = found.loc[name]
        assert row["high_quality_similarity"] == pytest.approx(high, abs=1e-9)
        assert row["low_quality_similarity"] == pytest.approx(low, abs=1e-9)
        assert row["score"] == pytest.approx(high - low, abs=1e-9)
    order = score(tmp_path, [tmp_path / x / "e.arrow" for x in "acb"], model_folder)
    pd.testing.assert_frame_equal(found, order)
    swapped = score(
        tmp_path, [tmp_path / "a/e.arrow"], model_folder, positive=PROMPTS["negative"], negative=PROMPTS["positive"]
    )
    np.testing.assert_allclose(swapped["score"], -found["score"][swapped.index], atol=1e-12)


def test_embeddings_of_another_model_are_refused(images, names, model_folder, tmp_path):
    other = clip_folder(tmp_path / "other", embed_dim=16)
    embed(tmp_path / "a", names[:2], images, model_folder)
    with pytest.raises(KilnError, match=r"a/e\.arrow: 32 dimensions, but .*other gives 16"):
        score(tmp_path, [tmp_path / "a/e.arrow"], other)
    assert not (tmp_path / "scores.parquet").exists()


def test_an_image_that_is_scored_twice_is_refused(images, names, model_folder, tmp_path):
    for x in "ab":
        embed(tmp_path / x, names[:2], images, model_folder)
    with pytest.raises(KilnError, match="two rows for"):
        score(tmp_path, [tmp_path / x / "e.arrow" for x in "ab"], model_folder)


def test_the_published_prompts_are_eight_and_eight():
    prompts = PromptSettings()
    assert len(set(prompts.positive)) == len(set(prompts.negative)) == 8
    assert not set(prompts.positive) & set(prompts.negative)


# --- classes ---


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A classifier with weights that spread its probabilities."""
    settings = ClassifierSettings(arch="resnet18", image_size=32, hidden=(16, 8))
    torch.manual_seed(0)
    model = classifier.build(settings)
    with torch.no_grad():
        model.fc[-1].weight *= 40
    path = tmp_path_factory.mktemp("classifier") / "classifier.safetensors"
    classifier.save(model, settings, path)
    return path


def classify(folder, names, images, trained, bad=(), **settings):
    folder.mkdir(parents=True, exist_ok=True)
    run(
        classify_images.main,
        *("--images", images, "--shard", shard(folder / "shard.parquet", names, images, bad), "--classifier", trained),
        *("--output", folder / "p.parquet", "--meta", folder / "p.meta.json", "--device", "cpu"),
        settings={"workers": 0, "batch_size": 4, **settings},
    )
    return pd.read_parquet(folder / "p.parquet").set_index("path")


def test_probabilities_equal_prediction_one_by_one(images, names, trained, tmp_path):
    found = classify(tmp_path, names, images, trained)
    model, described = classifier.load(trained)
    transform = classifier.evaluation_transform(described.image_size)
    assert list(found.index) == names
    for name in names:
        with torch.no_grad(), Image.open(images / name) as image:
            logits = model(transform(image.convert("RGB"))[None])[0].double().numpy()
        expected = 1 / (1 + np.exp(logits[0] - logits[1]))
        assert found.loc[name, "probability"] == pytest.approx(expected, abs=1e-6)
    assert found["probability"].between(0, 1).all() and found["probability"].std() > 1e-3
    assert (found["label"] == (found["probability"] >= 0.5)).all()


def test_a_prediction_does_not_depend_on_its_shard(images, names, trained, tmp_path):
    whole = classify(tmp_path / "whole", names, images, trained)
    for size in (1, 3, 7):
        for start in range(0, N, size):
            part = classify(tmp_path / f"{size}-{start}", names[start : start + size], images, trained)
            assert part["probability"].equals(whole.loc[part.index, "probability"]), (size, start)


def test_quarantined_images_are_not_classified(images, names, trained, tmp_path):
    found = classify(tmp_path, names, images, trained, bad=names[:5])
    assert list(found.index) == names[5:]
    assert classify(tmp_path / "none", names, images, trained, bad=names).empty


def test_a_file_that_is_no_classifier_is_refused(images, names, tmp_path, model_folder):
    table = shard(tmp_path / "shard.parquet", names, images)
    arguments = ["--images", images, "--shard", table, "--classifier", model_folder / clip.WEIGHTS]
    arguments += ["--output", tmp_path / "p.parquet", "--meta", tmp_path / "m.json", "--device", "cpu"]
    assert "no Kiln classifier" in error_of(command_line("classify_images", *arguments))


def test_predictions_of_all_shards_are_sorted_by_path(tmp_path):
    rows = [{"path": f"{i}.jpg", "probability": i / 10, "label": 0} for i in range(6)]
    parts = [write(tmp_path / f"{k}.parquet", rows[k::2]) for k in (1, 0)]
    assert link_classes.read_predictions(parts)["path"].tolist() == [r["path"] for r in rows]
