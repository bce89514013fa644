"""Scores of made-up predictions against scikit-learn and by hand, leaks, and predictions that do not fit."""

import json
import math
import subprocess
import sys
import warnings

import numpy as np
import pandas as pd
import pytest
from busi_fixtures import CLASSES, Evaluation, chat_rows
from check_summary import complaints
from PIL import Image
from sklearn import metrics as sk

from scripts.busi.evaluate import read_rows, twins_in_train
from scripts.common import classification, trivial
from scripts.common.errors import KilnError

P = [f"p_{name}" for name in CLASSES]


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    made = Evaluation(tmp_path_factory.mktemp("scored"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return made, made.run()


# --- scores ---


def test_scores_agree_with_scikit_learn(scored):
    made, metrics = scored
    for name in ("base", "lora", "qlora"):
        table, report = made.models[name], metrics["models"][name]
        labels, decided, p = table["label"], table["predicted"], table[P].to_numpy()
        for key, value in {
            "accuracy": sk.accuracy_score(labels, decided),
            "balanced_accuracy": sk.balanced_accuracy_score(labels, decided),
            "macro_f1": sk.f1_score(labels, decided, average="macro"),
            "roc_auc": sk.roc_auc_score(labels, p, multi_class="ovr"),
        }.items():
            assert report[key]["value"] == pytest.approx(value), (name, key)
            assert report[key]["ci95"][0] <= value <= report[key]["ci95"][1]
        for i, one in enumerate(CLASSES):
            entries = report["per_class"][one]
            assert entries["recall"]["value"] == pytest.approx(sk.recall_score(labels == i, decided == i))
            assert entries["specificity"]["value"] == pytest.approx(sk.recall_score(labels != i, decided != i))
        assert report["confusion_matrix"] == sk.confusion_matrix(labels, decided).tolist()
        assert (report["n"], report["n_groups"]) == (60, 45)
        calibration = report["calibration"]
        assert calibration["negative_log_likelihood"]["value"] == pytest.approx(sk.log_loss(labels, p))
        assert calibration["brier_score"]["value"] == pytest.approx(sk.brier_score_loss(labels, p, scale_by_half=False))
        assert sum(one["n"] for one in calibration["bins"]) == 60
        assert report["counts"] == {"in": 60, "right": (labels == decided).sum(), "wrong": (labels != decided).sum()}


def test_majority_answer_is_the_most_frequent_class_of_train(scored):
    made, metrics = scored
    train, test = ([label for _, label, _ in made.rows[side]] for side in ("train", "test"))
    most = max(range(3), key=train.count)
    assert most != max(range(3), key=test.count)  # so that the wrong side would show
    report = metrics["models"]["majority"]
    assert report["accuracy"]["value"] == pytest.approx(test.count(most) / 60)
    assert report["balanced_accuracy"]["value"] == pytest.approx(1 / 3)
    assert report["roc_auc"]["value"] == 0.5
    shares = np.tile([train.count(i) / 60 for i in range(3)], (60, 1))
    assert report["calibration"]["negative_log_likelihood"]["value"] == pytest.approx(sk.log_loss(test, shares))
    assert "text" not in report


def test_summary_holds_headline_and_baselines(scored):
    made, metrics = scored
    one = metrics["summary"]["balanced_accuracy"]
    models = metrics["models"]
    assert metrics["headline"] == "lora"
    assert {key: one[key] for key in ("value", "ci95", "n")} == {
        key: models["lora"]["balanced_accuracy"][key] for key in ("value", "ci95", "n")
    }
    assert (one["baseline"], one["baseline_kind"], one["higher_is_better"]) == (1 / 3, "chance", True)
    assert (one["groups"], one["grouped_by"]) == (metrics["data"]["test"]["groups"], "near-twin group")
    assert one["zero_shot"] == models["base"]["balanced_accuracy"]["value"]
    assert one["majority"] == models["majority"]["balanced_accuracy"]["value"]
    assert one["accuracy"] == models["lora"]["accuracy"]["value"]
    features = {
        side: trivial.image_features([made.images / image for image, _, _ in rows]) for side, rows in made.rows.items()
    }
    labels = {side: [label for _, label, _ in rows] for side, rows in made.rows.items()}
    assert one["trivial"] == classification.trivial_baseline(
        features["train"], labels["train"], features["test"], labels["test"], score="balanced_accuracy"
    )
    problems = complaints({"busi": metrics["summary"]})
    assert not [problem for problem in problems if problem.startswith("busi")]


def test_data_are_counted(scored):
    made, metrics = scored
    labels = [label for _, label, _ in made.rows["train"]]
    counts = dict(zip(CLASSES, np.bincount(labels).tolist(), strict=True))
    assert metrics["data"]["train"] == {"images": 60, "groups": 45, "per_class": counts}
    assert metrics["data"]["test"]["groups"] == 45
    assert metrics["data"]["groups_on_both_sides"] == 0


def test_texts_are_scored_apart_and_silence_is_wrong(scored):
    made, metrics = scored
    table, text = made.models["lora"], metrics["models"]["lora"]["text"]
    silent = int(table["parsed"].isna().sum())
    assert silent > 0
    assert text["unanswerable"] == silent
    assert text["counts"] == {"in": 60, "parsed": 60 - silent, "unanswerable": silent}
    said = table["parsed"].astype("Float64").fillna(-1).to_numpy()
    assert text["accuracy"]["value"] == pytest.approx((said == table["label"]).mean())
    assert text["agreement_with_likelihood"]["value"] == pytest.approx(1 - silent / 60)


def test_difference_from_the_base_is_paired(scored, tmp_path):
    made, metrics = scored
    right = {name: made.models[name]["predicted"] == made.models[name]["label"] for name in ("base", "lora", "qlora")}
    for name in ("lora", "qlora"):
        entry = metrics["against_base"][name]["accuracy_difference"]
        assert entry["value"] == pytest.approx(right[name].mean() - right["base"].mean())
        assert entry["ci95"][0] > 0 and entry["n"] == 60
    same = Evaluation(tmp_path)
    same.models["lora"] = same.models["base"]
    entry = same.run(models=("lora", "base"))["against_base"]["lora"]["accuracy_difference"]
    assert (entry["value"], entry["ci95"]) == (0, [0, 0])  # two intervals side by side would not be


def test_order_of_rows_and_of_models_does_not_matter(scored, tmp_path):
    _, metrics = scored
    other = Evaluation(tmp_path)
    other.models = {name: table.sample(frac=1, random_state=1) for name, table in other.models.items()}
    assert other.run(models=("lora", "qlora", "base"))["models"] == metrics["models"]
    assert other.run(models=("qlora", "base", "lora"))["headline"] == "qlora"


def test_bins_and_seed_are_settings(tmp_path):
    made = Evaluation(tmp_path)
    first, second = made.run(calibration_bins=4), made.run(seed=1)
    assert [len(one["models"]["lora"]["calibration"]["bins"]) for one in (first, second)] == [4, 10]
    entries = [one["models"]["base"]["accuracy"] for one in (first, second)]
    assert entries[0]["value"] == entries[1]["value"] and entries[0]["ci95"] != entries[1]["ci95"]


def test_outputs_and_record(scored):
    made, _ = scored
    for name in ("confusion", "calibration", "scores"):
        with Image.open(made.out / f"{name}.png") as image:
            assert image.width > 400
    record = json.loads((made.out / "meta.json").read_text())
    assert set(record["inputs"]) == {
        "train", "test", "leakage", "predictions of base", "predictions of lora", "predictions of qlora",
    }  # fmt: skip
    assert set(record["outputs"]) == {
        "metrics.json", "confusion.png", "calibration.png", "scores.png",
    }  # fmt: skip
    assert record["items"] == 60


def test_it_needs_no_torch(root):
    code = "import sys, scripts.busi.evaluate; sys.exit(any(m in sys.modules for m in ('torch', 'transformers')))"
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True)


# --- leaks ---


def test_a_clean_split_has_no_scores_apart(scored):
    assert scored[1]["leak"] == {"test_with_twin_in_train": 0}


def test_a_leak_is_scored_apart(tmp_path):
    made = Evaluation(tmp_path, leaks=20)
    metrics = made.run()
    leak = metrics["leak"]
    assert (leak["test_with_twin_in_train"], leak["test_without"], leak["threshold"]) == (20, 40, 0.98)
    assert metrics["data"]["groups_on_both_sides"] == 15
    assert set(leak["models"]) == {"base", "lora", "qlora"}
    twins = {test for test, _ in made.pairs}
    for name, parts in leak["models"].items():
        table = made.models[name]
        inside = table["path"].isin(twins)
        found = {}
        for side, chosen in (("with_twin", inside), ("without_twin", ~inside)):
            part = table[chosen]
            found[side] = sk.accuracy_score(part["label"], part["predicted"])
            assert parts[side]["n"] == len(part)
            assert parts[side]["n_groups"] == part["group"].nunique()
            assert parts[side]["accuracy"]["value"] == pytest.approx(found[side])
            expected = sk.balanced_accuracy_score(part["label"], part["predicted"])
            assert parts[side]["balanced_accuracy"]["value"] == pytest.approx(expected)
            assert len(parts[side]["accuracy"]["ci95"]) == 2
        difference = parts["difference"]["accuracy"]
        assert difference["value"] == pytest.approx(found["with_twin"] - found["without_twin"])
        assert difference["ci95"][0] <= difference["value"] <= difference["ci95"][1]


def test_memory_of_twins_shows(tmp_path):
    made = Evaluation(tmp_path, leaks=30)
    twins = {test for test, _ in made.pairs}
    table = made.models["lora"] = made.models["base"].copy()
    learnt = table["path"].isin(twins)
    table.loc[learnt, P] = np.eye(3)[table.loc[learnt, "label"]]
    table.loc[learnt, "predicted"] = table.loc[learnt, "label"]
    models = made.run()["leak"]["models"]
    assert models["lora"]["with_twin"]["accuracy"]["value"] == 1
    assert models["lora"]["difference"]["accuracy"]["ci95"][0] > 0.1
    assert models["base"]["difference"]["accuracy"]["ci95"][0] < 0.1  # the control


def test_twins_that_were_not_trained_on_do_not_count(tmp_path):
    made = Evaluation(tmp_path, leaks=6)
    held_out = {train for _, train in made.pairs[:2]}
    made.rows["train"] = [row for row in made.rows["train"] if row[0] not in held_out]
    made.pairs.append((made.pairs[5][0], made.pairs[0][1]))  # one twin held out, another trained on
    leak = made.run()["leak"]
    assert (leak["test_with_twin_in_train"], leak["twin_not_trained_on"], leak["test_without"]) == (4, 2, 56)


@pytest.mark.parametrize("leaks", [1, 2, 59, 60])
def test_small_parts_say_why_a_number_does_not_exist(leaks, tmp_path):
    def no_constants(name):
        raise AssertionError(name)

    made = Evaluation(tmp_path, leaks=leaks)
    if leaks == 2:  # of one class
        made.pairs = made.pairs[1:] + [(image, made.pairs[0][1]) for image, label, _ in made.rows["test"] if label == 1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made.run()
    metrics = json.loads((made.out / "metrics.json").read_text(), parse_constant=no_constants)
    parts = metrics["leak"]["models"]["lora"]
    small = parts["with_twin" if leaks < 30 else "without_twin"]
    if leaks == 60:
        assert small == {"n": 0, "n_groups": 0, "reason": "no such test image"}
        assert parts["difference"]["accuracy"] == {"value": None, "reason": "no item outside"}
        return
    assert small["roc_auc"]["value"] is None and small["roc_auc"]["reason"].startswith("no item of class")
    assert parts["difference"]["balanced_accuracy"]["value"] is None
    if leaks == 2:
        assert small["n_groups"] > 2 and small["accuracy"]["ci95"]
    else:
        assert (small["n"], small["n_groups"], small["reason"]) == (1, 1, "one duplicate group: no intervals")
        assert small["accuracy"]["value"] in (0, 1) and small["accuracy"]["ci95"] is None
        assert parts["difference"]["accuracy"]["ci95"] is None


def test_a_class_that_test_lacks_is_named(tmp_path):
    made = Evaluation(tmp_path)
    made.rows["test"] = [row for row in made.rows["test"] if row[1] != 0]
    made.models = {name: table[table["label"] != 0] for name, table in made.models.items()}
    report = made.run()["models"]["lora"]
    assert report["roc_auc"] == {"value": None, "reason": "no item of class Normal"}
    assert report["per_class"]["Normal"]["recall"]["value"] is None
    assert report["per_class"]["Normal"]["specificity"]["n"] == len(made.rows["test"])


# --- what does not fit ---


def spoil(column, row, value):
    def change(made):
        made.models["lora"] = made.models["lora"].astype({column: object})
        made.models["lora"].loc[row, column] = value

    return change


def drop(made):
    made.models["lora"] = made.models["lora"].drop(index=7)


def double(made):
    made.models["lora"] = pd.concat([made.models["lora"], made.models["lora"].iloc[[4]]])


def rename(made):
    made.models["lora"] = made.models["lora"].rename(columns={"p_Benign": "p_benign"})


def another_class(made):
    made.models["lora"]["loglik_Cyst"] = -1.0


def one_row_off(made):
    made.models["lora"]["predicted"] = (made.models["lora"]["predicted"] + 1) % 3


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (drop, r"lora\.csv: no row for 1 test images, such as \w+/test \(7\)\.png"),
        (double, r"lora\.csv, row 62 \(\w+/test \(4\)\.png\): a second row"),
        (rename, r"lora\.csv: no column p_Benign"),
        (another_class, r"lora\.csv: column loglik_Cyst is of no class; the classes are Normal, Benign, Malignant"),
        (one_row_off, r"lora\.csv, row 2 .*: predicted 1 is not the likeliest class"),
        (spoil("path", 3, "Benign/new.png"), r"lora\.csv, row 5 \(Benign/new\.png\): no image of the test rows"),
        (spoil("label", 2, 0), r"lora\.csv, row 4 \(Malignant/test \(2\)\.png\): label 0, but 2 in the test rows"),
        (spoil("label", 2, None), r"row 4 .*: label nan, but 2"),
        (spoil("p_Benign", 5, 1.7), r"lora\.csv, row 7 .*: probabilities .*1\.7"),
        (spoil("p_Benign", 5, None), r"row 7 .*: probabilities .*nan"),
        (spoil("p_Benign", 5, "high"), r"row 7 .*: probabilities .*high"),
        (spoil("p_Benign", 5, -0.2), r"row 7 .*: probabilities .*-0\.2"),
        (spoil("predicted", 5, 3), r"row 7 .*: predicted 3 is no class"),
        (spoil("predicted", 5, None), r"row 7 .*: predicted nan is no class"),
        (spoil("parsed", 5, "Benign"), r"row 7 .*: parsed Benign is no class"),
        (spoil("parsed", 5, 3), r"row 7 .*: parsed 3\.0 is no class"),
    ],
)
def test_predictions_that_do_not_fit_name_file_and_row(change, says, tmp_path):
    made = Evaluation(tmp_path)
    change(made)
    with pytest.raises(KilnError, match=says):
        made.run()
    assert not made.out.exists()


def test_probabilities_that_do_not_add_up(tmp_path):
    made = Evaluation(tmp_path)
    made.models["base"].loc[9, P] = [0.4, 0.3, 0.2]
    with pytest.raises(KilnError, match=r"base\.csv, row 11 .*: probabilities 0\.4, 0\.3, 0\.2, which are not"):
        made.run()


@pytest.mark.parametrize(
    ("models", "says"),
    [
        (("base",), "at least one fine-tuned model"),
        (("lora", "qlora"), "expected base"),
        (("base", "base"), "is taken"),
    ],
)
def test_models_that_are_no_comparison(models, says, tmp_path):
    with pytest.raises(KilnError, match=says):
        Evaluation(tmp_path).run(models=models)


def test_a_model_cannot_be_called_majority(tmp_path):
    made = Evaluation(tmp_path)
    made.models["majority"] = made.models["lora"]
    with pytest.raises(KilnError, match="the name majority is taken"):
        made.run(models=("base", "majority"))


def test_rows_that_are_none(tmp_path):
    made = Evaluation(tmp_path)
    made.rows["test"].append(made.rows["test"][3])
    with pytest.raises(KilnError, match=r"test\.jsonl, line 61: a second row for \w+/test \(3\)\.png"):
        made.run()
    with pytest.raises(KilnError, match=r"jsonl, line 3: label 2 is no class; expected 0 to 1"):
        Evaluation(tmp_path / "b").run(classes=("Normal", "Benign"))
    for content, says in (("", "no rows"), ('{"image": "a.png"}\n', "line 1: no chat row"), ("[1]\n", "no chat row")):
        path = tmp_path / "bad.jsonl"
        path.write_text(content)
        with pytest.raises(KilnError, match=says):
            read_rows(path, CLASSES)
    assert len(read_rows(chat_rows(tmp_path / "good.jsonl", [("a.png", 0, "a.png")]), CLASSES)) == 1


@pytest.mark.parametrize(
    ("report", "says"),
    [
        ({}, "no leakage report"),
        ([], "no leakage report"),
        ({"thresholds": {"0.9": {"items": []}}}, "nothing for threshold 0.98; it has 0.9"),
        ({"thresholds": {"0.98": {"test_with_twin_in_train": 3, "items": []}}}, "3 test images .* but 0 listed"),
        ({"thresholds": {"0.98": {"test_with_twin_in_train": 1, "items": [{"test": "a"}]}}}, "no leakage report"),
        (
            {"thresholds": {"0.980": {"test_with_twin_in_train": 1, "items": [{"test": "a.png", "train": "b.png"}]}}},
            r"a\.png is no image of the test rows",
        ),
    ],
)
def test_reports_that_do_not_fit(report, says, tmp_path):
    path = tmp_path / "leakage_report.json"
    path.write_text(json.dumps(report))
    rows = pd.DataFrame({"image": ["c.png"]})
    with pytest.raises(KilnError, match=says):
        twins_in_train(path, 0.98, rows, rows)


@pytest.mark.parametrize("content", [None, b"", b"no image"])
def test_an_image_that_is_gone_or_broken_is_named(content, tmp_path):
    made = Evaluation(tmp_path)
    image = made.images / made.rows["train"][5][0]
    image.unlink()
    if content is not None:
        image.write_bytes(content)
    with pytest.raises(KilnError, match=r"train \(5\)\.png: readable when it was listed, now"):
        made.run()
    assert not made.out.exists()


def test_one_group_is_too_few(tmp_path):
    made = Evaluation(tmp_path)
    made.rows["test"] = [(image, label, "one") for image, label, _ in made.rows["test"]]
    with pytest.raises(KilnError, match="at least two independent"):
        made.run()


def test_a_certain_model_has_finite_scores(tmp_path):
    made = Evaluation(tmp_path)
    table = made.models["lora"]
    table[P] = np.eye(3)[(table["label"] + 1) % 3]
    table["predicted"] = (table["label"] + 1) % 3
    loss = made.run()["models"]["lora"]["calibration"]["negative_log_likelihood"]
    assert (loss["clipped"], loss["value"]) == (60, pytest.approx(-math.log(np.finfo(float).eps)))
