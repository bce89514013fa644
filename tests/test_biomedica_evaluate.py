"""Scores before and after training, of classes, arms and trivial features, against loops and open_clip itself."""

import io
import json
import math

import numpy as np
import open_clip
import pytest
import torch
from biomedica_scored_fixtures import CONFIG, TYPES, hold_out, run_evaluate, train
from PIL import Image

from scripts.biomedica import arms, checkpoints, evaluate, export, held_out, scores
from scripts.biomedica.settings import EvaluateSettings
from scripts.common import classification, statistics, trivial
from scripts.common.errors import KilnError

STEPS = 30  # of the runs that are compared


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("biomedica world")
    hold_out(folder / "held")
    train(folder / "model.safetensors")
    train(folder / "start.safetensors", steps=0)
    for seed in (1, 2):
        train(folder / f"hybrid-{seed}.safetensors", STEPS, seed)
        train(folder / f"local-{seed}.safetensors", STEPS, seed, "local", kinds=1)
    return folder


def run_names(world, *names: str) -> list[str]:
    return [f"{one}={world / one}.safetensors" for one in names]


@pytest.fixture(scope="module")
def metrics(world) -> dict:
    runs = run_names(world, "hybrid-1", "local-1", "local-2", "hybrid-2")
    return run_evaluate(world / "held", world / "model.safetensors", world / "scored", runs=runs)


def test_from_held_out_pairs_to_scores(world, metrics):
    assert not metrics["left_out"] and set(metrics["summary"]) == {"recall_at_5", "hybrid_over_local"}
    test = metrics["data"]["test"]
    assert (test["pairs"], test["articles"], test["local"], test["streamed"]) == (48, 24, 32, 16)
    assert sum(test["panel_types"].values()) == 48 and test["distinct_captions"] <= 12
    before, after = metrics["before"], metrics["after"]
    one = metrics["summary"]["recall_at_5"]
    assert (one["baseline_kind"], one["n"], one["trivial"]) == ("chance", 48, metrics["trivial"]["retrieval"])
    assert one["ci95"][0] > one["baseline"] and one["ci95"][0] > before["retrieval"]["mean"]["5"]["ci95"][1]
    assert one["value"] == pytest.approx((one["image_to_text"] + one["text_to_image"]) / 2)
    zero_shot = after["zero_shot"]
    assert zero_shot["classes"] == sorted(TYPES) and zero_shot["n"] == 48 and zero_shot["left_out"] == 0
    for name, floor in (("accuracy", "most_frequent"), ("balanced_accuracy", "chance")):
        assert zero_shot[name]["ci95"][0] > metrics["floors"][floor]
        assert zero_shot[name]["ci95"][0] > before["zero_shot"][name]["value"]
    assert metrics["prompts"]["bar_chart"][1] == "a figure with a bar chart"
    record = json.loads((world / "scored/meta.json").read_text())
    pictures = {"scores.png", "retrieval.png", "confusion.png", "runs.png"}
    assert set(record["outputs"]) == {"metrics.json"} | pictures
    assert all(Image.open(world / "scored" / one).width > 300 for one in pictures)
    assert {"validation", "test", "checkpoint", "hybrid-1", "local-2"} <= set(record["inputs"])


@pytest.fixture(scope="module")
def one_by_one(world):
    """Captions, types, and open_clip's own embeddings of test figures and captions, each figure alone."""
    export.main([
        "--checkpoint", str(world / "model.safetensors"), "--output-folder", str(world / "exported/model"),
        "--meta", str(world / "exported/meta.json"), "--threads", "1",
    ])  # fmt: skip
    name = f"local-dir:{world / 'exported/model'}"
    model, _, transform = open_clip.create_model_and_transforms(name)
    tokenizer = open_clip.get_tokenizer(name)
    model.eval()
    path = world / "held/test.parquet"
    table = held_out.read(path)
    with torch.inference_mode():
        files = [one for batch in held_out.batches(path, 5) for one in batch]
        images = torch.cat([model.encode_image(transform(Image.open(io.BytesIO(one)))[None], True) for one in files])
        texts = torch.cat([model.encode_text(tokenizer([one]), True) for one in table["caption"]])
    return model, tokenizer, table, images.numpy(), texts.numpy()


def test_recall_is_that_of_a_plain_loop_and_equal_captions_are_right(metrics, one_by_one):
    _, _, table, images, texts = one_by_one
    captions = table["caption"].to_list()
    similarity = images @ texts.T
    for way, matrix in (("image_to_text", similarity), ("text_to_image", similarity.T)):
        for k in (1, 5):
            hits = [
                any(captions[other] == captions[own] for other in sorted(range(48), key=lambda i: -matrix[own, i])[:k])
                for own in range(48)
            ]
            found = metrics["after"]["retrieval"][way]["recall"][str(k)]
            assert found["value"] == pytest.approx(np.mean(hits))
            right = [captions.count(one) for one in captions]
            chance = np.mean([1 - math.comb(48 - one, k) / math.comb(48, k) for one in right])
            assert found["baseline"] == pytest.approx(chance)


@torch.inference_mode()
def test_zero_shot_is_open_clips_own_classifier(metrics, one_by_one):
    model, tokenizer, table, images, _ = one_by_one
    classes = sorted(TYPES)
    names = [one.replace("_", " ") for one in classes]
    weights = open_clip.build_zero_shot_classifier(model, tokenizer, names, EvaluateSettings().prompts)
    guessed = (images @ weights.numpy()).argmax(axis=1)
    matrix = np.zeros((3, 3), int)
    for own, guess in zip(table["panel_type"], guessed, strict=True):
        matrix[classes.index(own), guess] += 1
    assert metrics["after"]["zero_shot"]["confusion_matrix"] == matrix.tolist()
    prompts = np.random.default_rng(0).normal(size=(2, 3, 8))
    prompts /= np.linalg.norm(prompts, axis=2, keepdims=True)
    vectors = scores.class_vectors(prompts)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1)
    shares = scores.zero_shot(vectors[:1], vectors, 100.0)
    assert shares[0] == pytest.approx(np.exp(100 * vectors @ vectors[0]) / np.exp(100 * vectors @ vectors[0]).sum())


def test_before_is_the_model_that_training_started_from(world, metrics, one_by_one, tmp_path):
    start = run_evaluate(world / "held", world / "start.safetensors", tmp_path / "random")
    assert start["before"] == start["after"] == metrics["before"]  # no step was taken
    given = {"weights": world / "exported/model", "settings": {"model": {"weights": "a model"}}}
    folder = run_evaluate(world / "held", world / "hybrid-1.safetensors", tmp_path / "folder", **given)
    assert folder["before"] == metrics["after"] and folder["after"] != folder["before"]
    inputs = json.loads((tmp_path / "folder/meta.json").read_text())["inputs"]
    assert "weights open_clip_model.safetensors" in inputs


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"settings": {"model": {"config": CONFIG, "weights": "a model"}}}, "--weights None"),
        ({"settings": {"model": {"config": CONFIG | {"embed_dim": 16}}}}, "makes another one"),
        ({"changes": {"names": {"gel": "plot", "scatter": "plot"}}}, "'gel' and 'scatter' are both named 'plot'"),
    ],
)
def test_settings_of_another_training_are_refused(world, tmp_path, options, message):
    with pytest.raises(KilnError, match=message):
        run_evaluate(world / "held", world / "model.safetensors", tmp_path, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["settings.json"]


def test_the_size_of_a_batch_does_not_matter(world, metrics, tmp_path):
    made = run_evaluate(world / "held", world / "model.safetensors", tmp_path, {"batch_size": 7})
    assert made["after"]["retrieval"] == metrics["after"]["retrieval"]
    assert set(made["left_out"]) == {"hybrid_over_local"} and not (tmp_path / "runs.png").exists()


def test_without_known_panel_types_there_are_no_classes(world, tmp_path):
    hold_out(tmp_path / "held", count=6, panel_type="unknown")
    made = run_evaluate(tmp_path / "held", world / "model.safetensors", tmp_path / "out", {"ks": [1, 5, 10]})
    assert made["left_out"]["zero_shot"] == "held-out figures are of 0 known panel types"
    assert "zero_shot" not in made["after"] and (tmp_path / "out/confusion.png").exists()
    assert made["after"]["retrieval"]["left_out"] == {"ks": [10], "reason": "more than 6 candidates"}
    assert made["trivial"]["retrieval"] == made["trivial"]["retrieval_by_text_length"]


def test_of_one_article_or_few_pairs_there_is_no_headline(world, tmp_path):
    hold_out(tmp_path / "one", count=6, article="PMC7")
    runs = run_names(world, "hybrid-1", "local-1")
    made = run_evaluate(tmp_path / "one", world / "model.safetensors", tmp_path / "a", runs=runs)
    assert not made["summary"] and set(made["left_out"].values()) == {"one article: no interval"}
    hold_out(tmp_path / "few", count=4)
    made = run_evaluate(tmp_path / "few", world / "model.safetensors", tmp_path / "b")
    assert "fewer test pairs" in made["left_out"]["recall_at_5"]
    with pytest.raises(KilnError, match="cannot be compared on 4 test pairs"):
        run_evaluate(tmp_path / "few", world / "model.safetensors", tmp_path / "c", runs=runs)


# --- arms --------------------------------------------------------------------------------------


def test_arms_are_compared_by_seed(world, metrics):
    runs, one = metrics["runs"], metrics["summary"]["hybrid_over_local"]
    assert (runs["k"], runs["steps"], runs["seeds"], runs["n"]) == (5, STEPS, 2, 48)
    gaps = [seed["hybrid"]["value"] - seed["local"]["value"] for seed in runs["per_seed"].values()]
    assert list(runs["per_seed"]) == ["1", "2"]
    assert [seed["difference"]["value"] for seed in runs["per_seed"].values()] == pytest.approx(gaps)
    assert runs["difference"] == pytest.approx(np.mean(gaps)) == one["value"] == one["difference"]
    assert (one["baseline_kind"], one["baseline"], one["difference_of"]) == ("local_only", 0, "recall at 5")
    assert (one["groups"], one["grouped_by"]) == (metrics["data"]["test"]["articles"], "article")
    assert {arm: one[arm] for arm in ("hybrid", "local")} == runs["mean"]
    assert one["trivial"] == pytest.approx(metrics["trivial"]["retrieval"] - one["local"])
    assert one["ci95"] == runs["ci95"] and one["ci95"][0] > 0  # the local runs saw one panel type of three
    alone = run_evaluate(world / "held", world / "hybrid-1.safetensors", world / "alone")
    assert runs["per_seed"]["1"]["hybrid"]["value"] == alone["summary"]["recall_at_5"]["value"]
    assert runs["per_seed"]["1"]["hybrid"]["ci95"] == alone["summary"]["recall_at_5"]["ci95"]


@pytest.mark.parametrize("seeds", [1, 3])
def test_the_interval_resamples_articles_and_seeds(seeds):
    rng = np.random.default_rng(seeds)
    articles = np.repeat(np.arange(40), rng.integers(1, 6, 40))
    of_article, of_seed = rng.normal(0, 0.3, 40)[articles], rng.normal(0, 0.2, seeds)
    theirs = rng.random((seeds, len(articles)))
    ours = theirs + 0.2 + of_article + of_seed[:, None]
    found = scores.compare_arms(ours, theirs, articles)
    members = [np.flatnonzero(articles == one) for one in range(40)]
    drawn = []
    for _ in range(2000):
        pairs = np.concatenate([members[one] for one in rng.integers(0, 40, 40)])
        chosen = rng.integers(0, seeds, seeds)
        drawn.append(np.mean((ours - theirs)[np.ix_(chosen, pairs)]))
    assert found["difference"] == pytest.approx((ours - theirs).mean())
    assert found["ci95"] == pytest.approx(np.percentile(drawn, [2.5, 97.5]), abs=0.02)
    if seeds == 1:
        assert found["ci95"] == pytest.approx(
            statistics.paired_difference_interval(ours[0], theirs[0], articles), abs=0.01
        )
    same = scores.compare_arms(ours, ours, articles)
    assert (same["difference"], same["ci95"]) == (0, [0, 0])


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["hybrid-1"], "no local-1"),
        (["hybrid-1", "local-1", "local-2"], "no hybrid-2"),
        (["hybrid-1", "local-1", "hybrid-1"], "hybrid-1 is given twice"),
    ],
)
def test_each_seed_needs_one_run_of_each_arm(world, tmp_path, names, message):
    with pytest.raises(KilnError, match=message):
        run_evaluate(world / "held", world / "model.safetensors", tmp_path, runs=run_names(world, *names))


def test_runs_that_are_no_match_are_refused(world, tmp_path):
    def compare(**paths) -> None:
        runs = [f"{arm}-1={path}" for arm, path in paths.items()]
        run_evaluate(world / "held", world / "model.safetensors", tmp_path / "out", runs=runs)

    hybrid, local = world / "hybrid-1.safetensors", world / "local-1.safetensors"
    with pytest.raises(KilnError, match="of local-1, given as hybrid-1"):
        compare(hybrid=local, local=local)
    with pytest.raises(KilnError, match="of local-2, given as local-1"):
        compare(hybrid=hybrid, local=world / "local-2.safetensors")
    longer = train(tmp_path / "longer.safetensors", STEPS + 1, 1, "local")
    with pytest.raises(KilnError, match="local-1 had 31 steps, hybrid-1 30: no fair comparison"):
        compare(hybrid=hybrid, local=longer)
    facts, tensors = checkpoints.read(local)
    other = facts._replace(preprocess_cfg=facts.preprocess_cfg | {"mean": [0.5, 0.5, 0.5]})
    checkpoints.save(tmp_path / "other.safetensors", _Holder(tensors), other)
    with pytest.raises(KilnError, match="local-1 and hybrid-1 are of different models"):
        compare(hybrid=hybrid, local=tmp_path / "other.safetensors")


class _Holder:
    """Tensors in place of a model."""

    def __init__(self, tensors):
        self.state_dict = lambda: tensors


@pytest.mark.parametrize("text", ["hybrid-1", "hybrid=x", "both-1=x", "local-a=x", "local-1=", "-1=x"])
def test_runs_are_named_by_arm_and_seed(text, capsys):
    with pytest.raises(SystemExit):
        evaluate.main([f"--runs={text}"])
    assert "expected ARM-SEED=CHECKPOINT" in capsys.readouterr().err
    assert arms.parse_run("local-12=a=b.safetensors").checkpoint.name == "a=b.safetensors"


# --- trivial features --------------------------------------------------------------------------


def test_trivial_classes_are_a_logistic_regression_on_validation(world, metrics):
    features, labels = [], []
    for side in held_out.SIDES:
        path = world / f"held/{side}.parquet"
        features.append(trivial.image_features([one for batch in held_out.batches(path, 9) for one in batch]))
        labels.append(held_out.read(path)["panel_type"].to_numpy())
    for score in ("accuracy", "balanced_accuracy"):
        wanted = classification.trivial_baseline(features[0], labels[0], features[1], labels[1], score)
        assert metrics["trivial"][score] == pytest.approx(wanted)
    assert metrics["trivial"]["taught_on"] == 48
    parts = [metrics["trivial"][f"retrieval_by_{one}"] for one in ("text_length", "panel_type")]
    assert metrics["trivial"]["retrieval"] == max(parts)


def test_pairs_are_told_by_length_only_where_length_goes_with_the_image():
    rng = np.random.default_rng(0)
    images, noise = rng.normal(size=(2, 60, 2)), rng.normal(size=(2, 60, 2))
    texts = [" ".join(["w"] * one) for one in range(60)]
    tied = [(one, 10 + 3 * one + 0.01 * other) for one, other in zip(images, noise, strict=True)]
    similarity = scores.pair_scores(tied[0], texts, tied[1])
    assert similarity.shape == (60, 60)
    reached = scores.recall_of_ties(similarity, texts, 5)
    assert reached > 0.3 and reached > 3 * 5 / 60
    loose = [(one, other) for one, other in zip(images, noise, strict=True)]
    assert scores.recall_of_ties(scores.pair_scores(loose[0], texts, loose[1]), texts, 5) < 0.2
    equal = scores.pair_scores(tied[0], ["same"] * 60, tied[1])
    assert (equal == 0).all() and scores.recall_of_ties(equal, texts, 5) == pytest.approx(5 / 60)
    assert scores.recall_of_ties(equal, texts, 61) is None
    assert scores.text_features(["a b  c", ""]).tolist() == [[6, 3], [0, 0]]
