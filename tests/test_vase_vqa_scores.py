"""Scores of made-up answers by hand, retrieval by plain loops, and predictions that do not fit."""

import itertools
import json
from pathlib import Path

import numpy as np
import open_clip
import pandas as pd
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from vase_fixtures import clip_folder, picture

from scripts.common import statistics, trivial
from scripts.common.errors import KilnError
from scripts.vase import evaluate, trivial_answers, vqa_scores
from scripts.vase.predict import KEY, SCHEMA
from scripts.vase.settings import CAPTION
from scripts.vase.vqa_rows import VqaRow, read_rows

TECHNIQUES, SHAPES = ("black-figure", "red-figure"), ("amphora", "kylix", "lekythos")
DATES = ("525 to 475 BC", "480 to 450 BC")
SINGLE = ("technique", "shape", "dating")


def truth_of(number: int) -> dict[str, str]:
    technique, shape = TECHNIQUES[number % 2], SHAPES[number % 3]
    return {
        "technique": technique,
        "shape": shape,
        "dating": DATES[number % 2],
        CAPTION: f"Athenian {technique} {shape} number {number}",
    }


class Case:
    """Six vases to train on and six to test, with answers that a test may change before it scores them."""

    def __init__(self, root: Path, grpo: bool = True):
        self.root = root
        self.test, self.train = self.rows("test", 6), self.rows("train", 9)
        self.models = {}
        for name in ("base", "sft", "grpo") if grpo else ("base", "sft"):
            self.models[name] = pd.DataFrame(self.answers(name))

    def rows(self, side: str, count: int) -> list[dict]:
        rows = []
        for number in range(count):
            vase = f"{side}{number}"
            tint = (60, 60, 60) if number % 2 == 0 else (190, 120, 90)
            picture(self.root / "images" / f"{vase}.png", number + 100 * len(side), 48, tint)
            truth = truth_of(number)
            facts = {name: truth[name] for name in SINGLE}
            for dimension, answer in truth.items():
                messages = [{"role": "user", "content": f"<image>{dimension}?"}]
                messages.append({"role": "assistant", "content": answer})
                rows.append(
                    {
                        "id": f"{vase}-{dimension}", "vase": vase, "dimension": dimension, "messages": messages,
                        "images": [f"{vase}.png"], "reference": answer, "facts": json.dumps(facts),
                    }
                )  # fmt: skip
        (self.root / f"{side}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return rows

    def answers(self, model: str) -> list[dict]:
        """base knows nothing; sft is right but for two shapes and one technique; grpo is right but for one shape."""
        wrong = {"sft": {"test0-shape", "test1-shape", "test3-technique"}, "grpo": {"test0-shape"}}
        made = []
        for row in self.test:
            right = model != "base" and row["id"] not in wrong[model]
            text = row["reference"] if right else "a stone"
            keys = {"model": model, "id": row["id"], "vase": row["vase"], "dimension": row["dimension"], "tokens": 4}
            made.append({**keys, "mode": "greedy", "draw": 0, "text": text})
            if row["dimension"] != CAPTION:
                made.append({**keys, "mode": "shuffled", "draw": 0, "text": "red-figure"})
            for draw in range(2 if model != "base" else 0):
                made.append({**keys, "mode": "sampled", "draw": draw, "text": text if draw == 0 else "a stone"})
        return made

    def change(self, model: str, mode: str, name: str, text: str) -> None:
        table = self.models[model]
        table.loc[(table["mode"] == mode) & (table["id"] == name), "text"] = text

    def write(self) -> Path:
        path = self.root / "predictions.parquet"
        pd.concat(self.models.values()).sort_values(list(KEY))[SCHEMA.names].to_parquet(path)
        return path

    def run(self, *extra, **settings) -> dict:
        out = self.root / "out"
        values = json.dumps({"reward": {"format": "plain"}, **settings})
        evaluate.main(
            ["--predictions", str(self.write()), "--rows", str(self.root / "test.jsonl"), "--train",
             str(self.root / "train.jsonl"), "--images", str(self.root / "images"), "--output-folder", str(out),
             "--meta", str(out / "meta.json"), "--threads", "1", "--device", "cpu", "--settings", values,
             *map(str, extra)]
        )  # fmt: skip
        return json.loads((out / "metrics.json").read_text())


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    case = Case(tmp_path_factory.mktemp("vase scores"))
    return case, case.run()


def interval(values, vases) -> list[float]:
    """Of a mean, by the plain way: draw whole vases, 20,000 times."""
    frame = pd.DataFrame({"value": np.asarray(values, float), "vase": list(vases)})
    sums = frame.groupby("vase")["value"].agg(["sum", "size"]).to_numpy()
    chosen = np.random.default_rng(9).integers(0, len(sums), (20_000, len(sums)))
    means = sums[chosen, 0].sum(1) / sums[chosen, 1].sum(1)
    return list(np.percentile(means, [2.5, 97.5]))


# models


def test_accuracies_are_those_counted_by_hand(scored):
    found = scored[1]["models"]
    assert found["sft"]["greedy"]["single"]["accuracy"]["value"] == pytest.approx(15 / 18)
    assert found["sft"]["greedy"]["technique"]["accuracy"]["value"] == pytest.approx(5 / 6)
    assert found["sft"]["greedy"]["shape"]["accuracy"]["value"] == pytest.approx(4 / 6)
    assert found["sft"]["greedy"]["dating"]["accuracy"]["value"] == 1
    assert found["grpo"]["greedy"]["single"]["accuracy"]["value"] == pytest.approx(17 / 18)
    assert found["base"]["greedy"]["single"]["accuracy"]["value"] == 0
    assert found["sft"]["greedy"]["single"]["n"] == 18
    assert found["sft"]["greedy"]["single"]["vases"] == 6
    assert found["sft"]["greedy"]["technique"]["n"] == 6
    assert found["sft"]["shuffled"]["technique"]["accuracy"]["value"] == pytest.approx(3 / 6)
    assert "caption" not in found["sft"]["shuffled"]
    assert "accuracy" not in found["sft"]["greedy"]["caption"]
    assert found["sft"]["mean_tokens"] == 4


def test_intervals_resample_vases(scored):
    right = np.ones((6, 3))
    right[0, 1] = right[1, 1] = right[3, 0] = 0
    vases = np.repeat(np.arange(6), 3)
    one = scored[1]["models"]["sft"]["greedy"]["single"]["accuracy"]
    assert one["ci95"] == pytest.approx(interval(right.ravel(), vases), abs=0.02)
    assert tuple(one["ci95"]) == statistics.bootstrap_interval(right.ravel(), groups=vases)


def edits(a: str, b: str) -> int:
    """Levenshtein's distance by the textbook's recursion."""
    table = {(i, 0): i for i in range(len(a) + 1)} | {(0, j): j for j in range(len(b) + 1)}
    for i, j in itertools.product(range(1, len(a) + 1), range(1, len(b) + 1)):
        change = table[i - 1, j - 1] + (a[i - 1] != b[j - 1])
        table[i, j] = min(table[i - 1, j] + 1, table[i, j - 1] + 1, change)
    return table[len(a), len(b)]


def test_text_measures_of_one_dimension(tmp_path):
    case = Case(tmp_path)
    case.change("sft", "greedy", "test1-shape", "kylyx")
    case.change("sft", "greedy", "test0-caption", "Athenian black-figure amphora number 7")
    found = case.run()["models"]["sft"]["greedy"]
    kylyx = 1 - edits("kylyx", "kylix") / 5
    assert kylyx == pytest.approx(0.8)
    assert found["shape"]["anls"]["value"] == pytest.approx((0 + kylyx + 4) / 6)
    assert found["shape"]["bleu1"]["value"] == pytest.approx(4 / 6)
    assert found["shape"]["lexical_overlap"]["value"] == pytest.approx(4 / 6)
    # of six words five are alike, so seven in all
    assert found["caption"]["lexical_overlap"]["value"] == pytest.approx((5 + 5 / 7) / 6)
    assert found["caption"]["bleu1"]["value"] == pytest.approx((5 + 5 / 6) / 6)


def test_datings_are_scored_by_overlap_too(tmp_path):
    case = Case(tmp_path)
    case.change("sft", "greedy", "test0-dating", "500 to 475 BC")
    found = case.run()["models"]["sft"]["greedy"]
    assert found["dating"]["accuracy"]["value"] == pytest.approx(5 / 6)
    assert found["dating"]["date_overlap"]["value"] == pytest.approx((5 + 26 / 51) / 6)
    assert "date_overlap" not in found["shape"]


def test_answers_are_taken_out_of_their_format_first(tmp_path):
    case = Case(tmp_path)
    plain = case.run()["models"]["sft"]["greedy"]
    for table in case.models.values():
        table["text"] = "<think>It is red, not black.</think><answer>" + table["text"] + "</answer>"
    wrapped = case.run(reward={"format": "think_answer"})["models"]["sft"]["greedy"]
    assert wrapped == plain


# floors


def test_the_majority_is_trains_and_scored_on_test(scored):
    found = scored[1]["majority"]
    assert found["answers"]["technique"] == "black-figure"  # five of nine
    assert found["greedy"]["technique"]["accuracy"]["value"] == pytest.approx(3 / 6)
    assert scored[1]["summary"]["sft_accuracy"]["baseline"] == found["greedy"]["single"]["accuracy"]["value"]


def test_of_equally_frequent_answers_the_first_by_name_is_the_majority():
    rows = [VqaRow(str(n), "v", "shape", (), ("a",), text, "") for n, text in enumerate(["kylix", "amphora"] * 2)]
    assert trivial_answers.majority_answers(rows) == {"shape": "amphora"}


def test_spellings_of_one_answer_count_together():
    texts = ["Kylix", "kylix", "Kylix", "amphora", "amphora"]
    rows = [VqaRow(str(n), "v", "shape", (), ("a",), text, "") for n, text in enumerate(texts)]
    assert trivial_answers.majority_answers(rows) == {"shape": "Kylix"}
    rows = [
        VqaRow(str(n), "v", "fabric", (), ("a",), t, "")
        for n, t in enumerate(["Attic", "Corinthian"] * 2 + ["athenian"])
    ]
    assert trivial_answers.majority_answers(rows) == {"fabric": "Attic"}
    assert trivial_answers.majority_answers(rows, {"athenian": "corinthian", "attic": "x"}) == {"fabric": "Corinthian"}


def test_trivial_answers_are_a_regressions_per_dimension(scored):
    case, metrics = scored
    train, test = read_rows(case.root / "train.jsonl"), read_rows(case.root / "test.jsonl")
    found = trivial_answers.trivial_answers(case.root / "images", train, test)
    for dimension in SINGLE[:2]:
        sides = [[row for row in side if row.dimension == dimension] for side in (train, test)]
        x = [trivial.image_features([case.root / "images" / row.images[0] for row in side]) for side in sides]
        model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
        expected = model.fit(x[0], [row.reference for row in sides[0]]).predict(x[1])
        assert [found[row.id] for row in sides[1]] == list(expected)
    assert metrics["trivial"]["greedy"]["technique"]["accuracy"]["value"] == 1  # the colour gives it away
    assert metrics["summary"]["image_grounding"]["trivial"] == 1


def test_a_dimension_that_train_lacks_has_no_floor(tmp_path):
    case = Case(tmp_path)
    kept = [row for row in case.train if row["dimension"] != "shape"]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    metrics = case.run()
    assert "shape" not in metrics["majority"]["answers"]
    right = sum(metrics["majority"]["greedy"][name]["accuracy"]["value"] for name in ("technique", "dating"))
    assert metrics["summary"]["sft_accuracy"]["baseline"] == pytest.approx(right / 3)  # shape: none right


def test_nothing_to_learn_from_is_no_error(tmp_path):
    """Train asks for what test does not: no floor, and no baseline above 0."""
    case = Case(tmp_path)
    kept = [{**row, "dimension": "fabric"} for row in case.train if row["dimension"] == "shape"]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    metrics = case.run()
    assert metrics["majority"]["greedy"] == metrics["trivial"]["greedy"] == {}
    assert metrics["summary"]["sft_accuracy"]["baseline"] == 0


# headlines


def test_headlines_have_the_houses_form(scored):
    made = scored[1]["summary"]
    assert list(made) == ["sft_accuracy", "image_grounding", "grpo_reward", "grpo_accuracy"]
    kinds = [one["baseline_kind"] for one in made.values()]
    assert kinds == ["majority", "shuffled_images", "before_grpo", "before_grpo"]
    for one in made.values():
        assert {"value", "baseline", "n", "ci95", "higher_is_better", "trivial"} <= one.keys()
        assert one["higher_is_better"] is True
        assert 0 <= one["trivial"] <= 1.2
    assert made["sft_accuracy"]["value"] == pytest.approx(15 / 18)
    assert made["image_grounding"]["value"] == pytest.approx(5 / 6)
    assert made["image_grounding"]["baseline"] == pytest.approx(3 / 6)
    assert made["image_grounding"]["n"] == 6
    assert scored[1]["left_out"] == {"retrieval": "no --clip-model"}
    assert "about 96 items" in scored[1]["size"]
    assert "18 questions and 6 captions of 6 vases" in scored[1]["size"]


def test_the_gain_of_grpo_is_paired_by_row_and_clustered_by_vase(scored):
    case, metrics = scored
    rows = read_rows(case.root / "test.jsonl")
    contents = {}
    for name in ("sft", "grpo"):
        table = case.models[name]
        drawn = table[table["mode"] == "sampled"]
        reward = evaluate.Reward(evaluate.RewardSettings(format="plain"))
        by_id = {row.id: row for row in rows}
        values = [
            reward.content(one.text, by_id[one.id].reference, one.dimension, by_id[one.id].facts).value
            for one in drawn.itertuples()
        ]
        contents[name] = drawn.assign(value=values).groupby("id")["value"].mean()
    gain = contents["grpo"] - contents["sft"]
    assert gain[gain != 0].index.to_list() == ["test1-shape", "test3-technique"]
    one = metrics["summary"]["grpo_reward"]
    assert one["value"] == pytest.approx(contents["grpo"].mean())
    assert one["baseline"] == pytest.approx(contents["sft"].mean())
    assert (one["n"], one["completions"]) == (24, 48)
    assert one["greedy_accuracy"] == pytest.approx({"sft": 15 / 18, "grpo": 17 / 18})
    assert one["about"].startswith("content part")  # the picture of the training has the format part, too
    vases = [by_id[name].vase for name in gain.index]
    low, high = np.array(one["ci95"]) - one["baseline"]
    assert [low, high] == pytest.approx(interval(gain, vases), abs=0.02)
    found = metrics["differences"]["grpo - sft"]
    assert found["content"]["value"] == pytest.approx(gain.mean())
    assert found["accuracy"]["value"] == pytest.approx(2 / 18)
    assert metrics["differences"]["sft - base"]["accuracy"]["value"] == pytest.approx(15 / 18)
    assert "content" not in metrics["differences"]["sft - base"]


def test_beside_the_reward_of_grpo_stands_its_greedy_accuracy_before_and_after(scored):
    metrics = scored[1]
    one, gain = metrics["summary"]["grpo_accuracy"], metrics["differences"]["grpo - sft"]["accuracy"]
    assert (one["value"], one["baseline"], one["n"]) == (pytest.approx(17 / 18), pytest.approx(15 / 18), 18)
    assert one["ci95"] == pytest.approx([one["baseline"] + bound for bound in gain["ci95"]])
    assert one["trivial"] == metrics["summary"]["sft_accuracy"]["trivial"]


def test_the_accuracy_of_each_dimension_stands_beside_its_own_majority(scored):
    metrics = scored[1]
    parts = metrics["summary"]["sft_accuracy"]["parts"]
    assert list(parts) == ["technique", "shape", "dating"]
    for name, part in parts.items():
        own = metrics["models"]["sft"]["greedy"][name]["accuracy"]
        assert (part["value"], part["n"], part["ci95"]) == (own["value"], own["n"], own["ci95"])
        assert part["baseline"] == metrics["majority"]["greedy"][name]["accuracy"]["value"]
        assert part["trivial"] == metrics["trivial"]["greedy"][name]["accuracy"]["value"]
        assert (part["baseline_kind"], part["higher_is_better"]) == ("majority", True)
    vases = metrics["data"]["test"]["vases"]
    for one in (*metrics["summary"].values(), *parts.values()):
        assert (one["groups"], one["grouped_by"]) == (vases, "vase")


def test_samples_are_scored_part_by_part(scored):
    found = scored[1]["models"]["grpo"]["sampled"]
    assert (found["prompts"], found["completions"]) == (24, 48)
    parts = {name: found[name]["value"] for name in vqa_scores.REWARDS}
    assert parts["content"] == pytest.approx(parts["base"] - parts["penalty"] + parts["bonus"])
    assert parts["format"] == 1
    kinds = found["content_by_dimension"]
    assert list(kinds) == ["technique", "shape", "dating", "caption"]
    assert np.mean(list(kinds.values())) == pytest.approx(parts["content"])
    assert "sampled" not in scored[1]["models"]["base"]


def test_a_users_plugin_is_what_is_scored(tmp_path):
    (tmp_path / "plugin.py").write_text(
        "def external_vase_acc(responses, references):\n"
        "    return [float(len(a) == len(b)) / 4 for a, b in zip(responses, references)]\n"
    )
    case = Case(tmp_path)
    metrics = case.run(reward={"format": "plain", "plugin": str(tmp_path / "plugin.py")})
    one = metrics["summary"]["grpo_reward"]
    references = {row["id"]: row["reference"] for row in case.test}
    drawn = case.models["grpo"][case.models["grpo"]["mode"] == "sampled"]
    alike = [len(text) == len(references[name]) for name, text in zip(drawn["id"], drawn["text"], strict=True)]
    assert one["value"] == pytest.approx(np.mean(alike) / 4)


def test_without_grpo_its_headline_is_left_out(tmp_path):
    metrics = Case(tmp_path, grpo=False).run()
    assert list(metrics["summary"]) == ["sft_accuracy", "image_grounding"]
    assert all("grpo" in metrics["left_out"][name] for name in ("grpo_reward", "grpo_accuracy"))
    assert list(metrics["models"]) == ["base", "sft"]
    assert (tmp_path / "out/scores.png").is_file()


def test_of_a_single_vase_there_are_no_intervals_and_no_headlines(tmp_path):
    case = Case(tmp_path)
    case.test = case.test[:4]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in case.test))
    for name in case.models:
        case.models[name] = case.models[name][case.models[name]["vase"] == "test0"]
    metrics = case.run()
    assert metrics["summary"] == {}
    one = metrics["models"]["sft"]["greedy"]["technique"]["accuracy"]
    assert (one["value"], one["ci95"], one["reason"]) == (1, None, "one vase: no interval")


def test_captions_alone_are_scored_too(tmp_path):
    case = Case(tmp_path)
    kept = [row for row in case.test if row["dimension"] == CAPTION]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    for name in case.models:
        case.models[name] = case.models[name][case.models[name]["dimension"] == CAPTION]
    metrics = case.run()
    assert list(metrics["summary"]) == ["grpo_reward"]
    assert list(metrics["models"]["sft"]["greedy"]) == [CAPTION]


# retrieval


@pytest.fixture(scope="module")
def clip_model(tmp_path_factory):
    return clip_folder(tmp_path_factory.mktemp("clip") / "clip model")


def plain_embeddings(folder: Path, texts: list[str], paths: list[Path]):
    """By open_clip alone, one by one."""
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokenizer, model = open_clip.get_tokenizer(f"local-dir:{folder}"), model.eval()
    with torch.no_grad():
        t = torch.cat([model.encode_text(tokenizer([text])) for text in texts])
        v = torch.cat([model.encode_image(transform(Image.open(path).convert("RGB"))[None]) for path in paths])
    return [torch.nn.functional.normalize(one, dim=1).numpy() for one in (t, v)]


def recall(similarity: np.ndarray, right: np.ndarray, k: int) -> float:
    """Share of rows with a right column among the first k, ties lost."""
    hits = 0
    for row, wanted in zip(similarity, right, strict=True):
        best = max(row[wanted])
        hits += 1 + sum(score >= best for score in row[~wanted]) <= k
    return hits / len(similarity)


def test_retrieval_against_plain_loops(tmp_path, clip_model):
    case = Case(tmp_path)
    case.change("sft", "greedy", "test2-caption", "a red kylix with a rider")
    case.change("sft", "greedy", "test4-caption", "a stone")
    for row in case.test:
        if row["id"] == "test5-caption":  # two vases with the same caption
            row["reference"] = case.test[3]["reference"]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in case.test))
    found = case.run("--clip-model", clip_model, evaluate={"retrieval_ks": [1, 3, 10]})
    one = found["models"]["sft"]["retrieval"]
    captions = [row for row in case.test if row["dimension"] == CAPTION]
    table = case.models["sft"][case.models["sft"]["mode"] == "greedy"].set_index("id")["text"]
    written, true = [table[row["id"]] for row in captions], [row["reference"] for row in captions]
    paths = [tmp_path / "images" / row["images"][0] for row in captions]
    t, v = plain_embeddings(clip_model, written + true, paths)
    t, true_t = t[:6], t[6:]
    own = np.eye(6, dtype=bool)
    same = np.array([[a == b for b in true] for a in true])
    assert same.sum() == 8
    for k in (1, 3):
        for name, (similarity, right) in {"image": (t @ v.T, own), "caption": (t @ true_t.T, same)}.items():
            got = one[name]
            assert got["from_generated"]["recall"][str(k)]["value"] == recall(similarity, right, k)
            assert got["to_generated"]["recall"][str(k)]["value"] == recall(similarity.T, right.T, k)
        assert one["image"]["from_generated"]["chance"][str(k)] == pytest.approx(k / 6)
    assert one["caption"]["from_generated"]["n"] == 6
    assert one["image"]["left_out"] == {"ks": [10], "reason": "more than 6 candidates"}
    assert one["caption_similarity"]["value"] == pytest.approx((t * true_t).sum(1).mean(), abs=1e-5)
    assert "retrieval" not in found["left_out"]


def test_any_picture_of_the_vase_is_right(tmp_path, clip_model):
    from scripts.common import devices
    from scripts.vase.caption_retrieval import CaptionRetrieval
    from scripts.vase.settings import ClipSettings

    for number in range(4):
        picture(tmp_path / f"{number}.png", number, 32)
    rows = [
        VqaRow(str(n), vase, CAPTION, (), (f"{n}.png",), f"caption {n}", "") for n, vase in enumerate("aabc")
    ]  # fmt: skip
    accelerator = devices.make_accelerator("cpu", "fp32", 1)
    made = CaptionRetrieval(rows, tmp_path, clip_model, ClipSettings(workers=0, batch_size=3), (1, 5), 0, accelerator)
    found = made.scores([row.reference for row in rows])
    assert found["image"]["from_generated"]["chance"][1] == pytest.approx((2 * 2 / 4 + 2 * 1 / 4) / 4)
    assert found["caption"]["from_generated"]["recall"][1]["value"] == 1
    assert found["caption_similarity"]["value"] == pytest.approx(1, abs=1e-6)
    assert found["image"]["left_out"]["ks"] == [5]


# predictions that do not fit


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.iloc[1:], "has no answer to 1 test rows, such as test0-technique"),
        (lambda t: pd.concat([t, t.iloc[:1]]), "two answers of sft"),
        (lambda t: t.assign(vase="x"), "the test row is of test0"),
        (lambda t: t.assign(id="x"), "no such test row"),
        (lambda t: t.assign(mode="beam"), "unknown model sft or mode beam"),
        (lambda t: t.assign(model="teacher"), "unknown model teacher"),
        (lambda t: t.assign(model="base2", text=None).assign(model="sft"), "text is None"),
        (lambda t: t[t["mode"] != "greedy"], "sft has no greedy answers"),
        (lambda t: t.iloc[:0], "no answers of sft"),
        (lambda t: t.drop(columns="tokens"), "no column tokens"),
    ],
)
def test_predictions_that_do_not_fit(scored, tmp_path, change, said):
    case = scored[0]
    table = case.models["sft"].sort_values(["mode", "draw"], kind="stable").reset_index(drop=True)
    change(table).to_parquet(tmp_path / "predictions.parquet")
    with pytest.raises(KilnError, match=said):
        evaluate.read_predictions(tmp_path / "predictions.parquet", read_rows(case.root / "test.jsonl"))


def test_a_missing_picture_is_named(tmp_path):
    case = Case(tmp_path)
    (tmp_path / "images/train3.png").unlink()
    with pytest.raises(KilnError, match="train3.png"):
        case.run()


def test_equal_answers_give_equal_bytes(scored, tmp_path):
    case, _ = scored
    first = [(case.root / "out" / name).read_bytes() for name in ("metrics.json", "scores.png")]
    for name, table in case.models.items():
        case.models[name] = table.sample(frac=1, random_state=1)
    case.run()
    assert [(case.root / "out" / name).read_bytes() for name in ("metrics.json", "scores.png")] == first
