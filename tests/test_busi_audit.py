"""Leaks of a split: every near-twin across sides is found, every file accounted for; and what may be published."""

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from busi_fixtures import CLASSES, Scans, published
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from vase_fixtures import ROOT, error_of, files_below, picture, run

from scripts.busi import audit_split
from scripts.busi.published import match, read_split
from scripts.common.errors import KilnError


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    """Drawn scans that no test changes."""
    return Scans(tmp_path_factory.mktemp("scans"))


def audit(out, images, *given, **values):
    """Run the step; the report."""
    report = out / "report/leakage_report.json"
    run(audit_split.main, "--images", images, *given, "--output", report, settings=values)
    return json.loads(report.read_text())


def sides(folder, train, test, ending=".json"):
    """--train and --test of a published split of (path, label) rows."""
    made = published(folder / f"train{ending}", train), published(folder / f"test{ending}", test)
    return "--train", made[0], "--test", made[1]


def random_sides(scans, seed, share=0.5):
    rows = scans.rows()
    test = np.random.default_rng(seed).random(len(rows)) < share
    return [r for r, t in zip(rows, test, strict=True) if not t], [r for r, t in zip(rows, test, strict=True) if t]


# What is reported


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_all_pairs_are_those_of_plain_correlations(scans, tmp_path, seed):
    train, test = random_sides(scans, seed)
    report = audit(tmp_path, scans.images, *sides(tmp_path, train, test))
    similar = np.corrcoef(scans.thumbnails([p for p, _ in test]), scans.thumbnails([p for p, _ in train]))
    similar = similar[: len(test), len(test) :]
    assert list(report["thresholds"]) == ["0.97", "0.98", "0.99"]
    for text, found in report["thresholds"].items():
        near = np.argwhere(similar >= float(text) - 1e-12)
        expected = sorted((test[i][0], train[j][0], *(CLASSES[k[1]] for k in (test[i], train[j]))) for i, j in near)
        items = [(x["test"], x["train"], x["test_label"], x["train_label"]) for x in found["items"]]
        assert items == expected
        assert found["pairs"] == len(expected) and found["test_with_twin_in_train"] == len(set(near[:, 0]))
        assert found["cross_class_pairs"] == sum(a != b for *_, a, b in expected)
        for item in found["items"]:
            i, j = (dict_of[item[k]] for k, dict_of in (("test", index_of(test)), ("train", index_of(train))))
            assert item["similarity"] == pytest.approx(similar[i, j], abs=1e-6)
    counts = [found["pairs"] for found in report["thresholds"].values()]
    assert counts == sorted(counts, reverse=True) and counts[0] > 0


def index_of(rows):
    return {path: i for i, (path, _) in enumerate(rows)}


def test_planted_twins_are_found_where_they_are_and_nowhere_else(scans, tmp_path):
    """One twin of each kind is put on the test side, all else into train."""
    chosen = {"Normal/normal (21).png", "benign/benign (21).png", "benign/benign (30).png", "Normal/normal (5).png"}
    test = [row for row in scans.rows() if row[0] in chosen]
    report = audit(tmp_path, scans.images, *sides(tmp_path, [r for r in scans.rows() if r[0] not in chosen], test))
    by = {text: {(x["test"], x["train"]) for x in found["items"]} for text, found in report["thresholds"].items()}
    same = {
        ("benign/benign (30).png", "benign/benign (1).png"),
        ("Normal/normal (5).png", "MALIGNANT/malignant (40).png"),
    }
    near = {("Normal/normal (21).png", "Normal/normal (20).png")}
    near |= {("benign/benign (21).png", f"benign/benign ({i}).png") for i in (20, 22)}
    assert by["0.97"] == by["0.98"] == same | near
    assert same <= by["0.99"] and ("Normal/normal (21).png", "Normal/normal (20).png") not in by["0.99"]
    assert report["thresholds"]["0.98"]["test_with_twin_in_train"] == 4
    assert report["thresholds"]["0.98"]["cross_class_pairs"] == 1
    exact = {(x["test"], x["train"]): x["similarity"] for x in report["thresholds"]["0.99"]["items"]}
    assert all(exact[pair] == 1 for pair in same)


def test_equal_pixels_count_even_where_correlation_has_no_meaning(tmp_path):
    for name in ("Normal/a.png", "Benign/a.png", "Malignant/b.png"):
        picture(tmp_path / "images" / name, seed=1, size=64, tint=(90, 90, 90))
    for name in ("Normal/grey.png", "Benign/grey.bmp"):
        Image.new("L", (50, 40), 77).save(tmp_path / "images" / name)
    Image.new("L", (50, 41), 77).save(tmp_path / "images/Malignant/other.png")
    rows = [("Normal/grey.png", 0)], [("Benign/grey.bmp", 1), ("Malignant/other.png", 2)]
    report = audit(tmp_path, tmp_path / "images", *sides(tmp_path, *rows), thresholds=[0.5, 1])
    for found in report["thresholds"].values():
        assert [(x["test"], x["train"]) for x in found["items"]] == [("Benign/grey.bmp", "Normal/grey.png")]
        assert found["cross_class_pairs"] == 1


def test_our_own_split_is_clean_from_the_grouping_threshold_on(scans, tmp_path):
    given = ("--manifest", scans.manifest, "--splits", scans.splits)
    report = audit(tmp_path, scans.images, *given, "--require-clean", 0.98)
    for text in ("0.98", "0.99"):
        found = report["thresholds"][text]
        assert found["test_with_twin_in_train"] == found["pairs"] == found["validation_with_twin_in_train"] == 0
    frame = pd.read_csv(scans.splits)
    for side in ("train", "validation", "test"):
        n = int((frame["side"] == side).sum())
        assert report["counts"][side] == {"in": n, "compared": n, "missing": 0}
    # the conflict was left out: two images that the split lists nowhere; masks are none
    assert report["unlisted"] == ["MALIGNANT/malignant (40).png", "Normal/normal (5).png"]
    assert report["missing"] == report["on_both_sides"] == report["label_not_folder"] == []


@pytest.mark.parametrize("sides_of_twins", [("test", "train"), ("test", "validation"), ("validation", "train")])
def test_a_twin_put_across_our_sides_is_reported_and_can_be_required_away(scans, tmp_path, sides_of_twins):
    frame = pd.read_csv(scans.splits)
    twins = ["benign/benign (1).png", "benign/benign (30).png"]
    for path, side in zip(twins, sides_of_twins, strict=True):
        frame.loc[frame["path"] == path, "side"] = side
    frame.to_csv(tmp_path / "splits.csv", index=False)
    given = ("--manifest", scans.manifest, "--splits", tmp_path / "splits.csv")
    found = audit(tmp_path, scans.images, *given)["thresholds"]["0.99"]
    assert found["test_with_twin_in_train"] == found["pairs"] == int("test" in sides_of_twins)
    assert found["validation_with_twin_in_train"] == int("test" not in sides_of_twins)
    shutil.rmtree(tmp_path / "report")
    with pytest.raises(
        KilnError, match=r"1 pairs of near-twins at 0.98 .*between .* benign/benign \(1\).png and .*\(1.0000\)"
    ):
        audit(tmp_path, scans.images, *given, "--require-clean", 0.98)
    assert not (tmp_path / "report").exists()


def test_a_threshold_to_be_clean_at_need_not_be_reported(scans, tmp_path):
    train = [row for row in scans.rows() if row[0] != "Normal/normal (21).png"]
    given = sides(tmp_path, train, [("Normal/normal (21).png", 0)])
    audit(tmp_path, scans.images, *given, "--require-clean", 0.99, thresholds=[0.999])
    with pytest.raises(KilnError, match="1 pairs of near-twins at 0.95"):
        audit(tmp_path, scans.images, *given, "--require-clean", 0.95, thresholds=[0.999])


def test_every_listed_row_and_every_file_is_accounted_for(scans, tmp_path):
    images = tmp_path / "images"
    shutil.copytree(scans.images, images)
    (images / "benign/benign (2).png").write_text("no picture")
    rows = scans.rows()
    unlisted = [("Normal/normal (3).png", 0), ("MALIGNANT/malignant (7).png", 2)]
    gone = [("Normal/normal (99).png", 0), ("Benign/benign (1)_mask.png", 1)]
    rows = [row for row in rows if row not in unlisted]
    both, relabelled = rows[0], ("normal/normal (9).png", 2)
    train = [row for row in rows if row[0] != "Normal/normal (9).png"] + gone
    report = audit(tmp_path, images, *sides(tmp_path, train, [both, relabelled]))
    assert report["missing"] == ["Benign/benign (1)_mask.png", "Normal/normal (99).png", "benign/benign (2).png"]
    assert report["missing_reasons"] == {
        "Benign/benign (1)_mask.png": "a mask, no image",
        "Normal/normal (99).png": "no such image",
        "benign/benign (2).png": "unreadable: not an image",
    }
    assert report["unlisted"] == sorted(path for path, _ in unlisted)
    assert report["on_both_sides"] == [both[0]]
    assert report["label_not_folder"] == ["Normal/normal (9).png"]
    assert report["counts"]["train"] == {"in": len(train), "compared": len(train) - 3, "missing": 3}
    assert report["counts"]["test"] == {"in": 2, "compared": 2, "missing": 0}
    own = [x for x in report["thresholds"]["0.99"]["items"] if x["test"] == x["train"] == both[0]]
    assert len(own) == 1 and own[0]["similarity"] == 1


@pytest.mark.parametrize("ending", [".json", ".jsonl", ".csv"])
def test_a_manifest_and_any_kind_of_file_give_the_same_report(scans, tmp_path, ending):
    train, test = random_sides(scans, 5)
    plain = audit(tmp_path, scans.images, *sides(tmp_path, train, test))
    other = sides(tmp_path / "other", train[::-1], test[::-1], ending)
    assert audit(tmp_path, scans.images, *other, "--manifest", scans.manifest) == plain


def test_by_hand_as_the_documentation_says(scans, tmp_path):
    """Published letter case, default classes, and the record beside the report."""
    train, test = random_sides(scans, 6)
    titled = [
        [(path.partition("/")[0].title() + "/" + path.partition("/")[2], k) for path, k in s] for s in (train, test)
    ]
    published(tmp_path / "train.json", titled[0]), published(tmp_path / "test.json", titled[1])
    command = [sys.executable, "-m", "scripts.busi.audit_split", "--images", scans.images]
    command += ["--train", tmp_path / "train.json", "--test", tmp_path / "test.json"]
    command += ["--output", tmp_path / "leakage_report.json"]
    done = subprocess.run([str(c) for c in command], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "leakage_report.json").read_text())
    assert report == audit(tmp_path, scans.images, *sides(tmp_path / "plain", train, test))
    n = report["thresholds"]["0.98"]["test_with_twin_in_train"]
    assert f"at 0.98: {n} of {len(test)} test images have a near-twin in train" in done.stderr
    meta = json.loads((tmp_path / "leakage_report.meta.json").read_text())
    assert set(meta["outputs"]) == {"leakage_report.json"} and set(meta["inputs"]) == {"train", "test"}
    published(tmp_path / "test.json", [("Nowhere/x.png", 0)])
    done = subprocess.run([str(c) for c in command], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert "none of its 1 images is there, such as Nowhere/x.png" in error_of(done)


def test_a_folder_that_holds_none_of_the_images_is_refused(scans, tmp_path):
    picture(tmp_path / "elsewhere/Normal/other.png", seed=1)
    given = sides(tmp_path, *random_sides(scans, 0))
    with pytest.raises(KilnError, match="train.json: none of its .* images is there, such as MALIGNANT/") as caught:
        audit(tmp_path, tmp_path / "elsewhere", *given)
    assert "--images" in caught.value.hint
    with pytest.raises(KilnError, match="no such folder"):
        audit(tmp_path, tmp_path / "nowhere", *given)
    assert not (tmp_path / "report").exists()


def test_a_split_without_a_test_side_is_refused(scans, tmp_path):
    frame = pd.read_csv(scans.splits)
    frame[frame["side"] != "test"].to_csv(tmp_path / "splits.csv", index=False)
    with pytest.raises(KilnError, match="splits.csv: no image is on side test"):
        audit(tmp_path, scans.images, "--splits", tmp_path / "splits.csv")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ((), "one of the arguments --splits --train is required"),
        (("--train", "a.json"), "--train and --test belong together"),
        (("--splits", "a.csv", "--test", "b.json"), "--train and --test belong together"),
        (("--splits", "a.csv", "--train", "b.json", "--test", "c.json"), "not allowed with argument"),
        (("--splits", "a.csv", "--require-clean", "98"), r"--require-clean is a similarity in \(0, 1\], not 98"),
    ],
)
def test_options_that_do_not_fit_together_are_refused(tmp_path, capsys, given, said):
    with pytest.raises(SystemExit):
        audit_split.main(["--images", str(tmp_path), *given, "--output", str(tmp_path / "r.json")])
    assert re.search(said, capsys.readouterr().err)
    assert files_below(tmp_path) == []


# Published files


ROW = {"image": "Normal/normal (1).png", "text": "Which?", "answer": "Normal", "label": 0}


def write_rows(path, rows):
    if path.suffix == ".csv":
        pd.DataFrame(rows, dtype=object).to_csv(path, index=False)
    else:
        lines = "\n".join(json.dumps(row) for row in rows)
        path.write_text(json.dumps(rows, indent=1) if path.suffix == ".json" else lines, encoding="utf-8")
    return path


def changed(**values):
    row = {**ROW, "image": "Benign/benign (2).png", "answer": "Benign", "label": 1, **values}
    return {name: value for name, value in row.items() if value is not ...}


@pytest.mark.parametrize("ending", [".json", ".jsonl", ".csv", ".JSON"])
def test_rows_are_read_as_they_are(tmp_path, ending):
    text = "Carefully, \"examine\" it.\nPlease answer 'Normal', 好 or 7."
    rows = [{**ROW, "text": text, "extra": "x"}, changed(image="./Benign//NA.png")]
    file = write_rows(tmp_path / f"train{ending}", rows) if ending != ".JSON" else tmp_path / "train.JSON"
    if ending == ".JSON":
        file.write_text(json.dumps(rows), encoding="utf-8-sig")  # as Windows saves it
    frame = read_split(file, CLASSES)
    assert frame.to_dict("list") == {
        "row": [1, 2],
        "image": ["Normal/normal (1).png", "Benign/NA.png"],
        "text": [text, "Which?"],
        "answer": ["Normal", "Benign"],
        "label": [0, 1],
    }
    assert frame["label"].dtype == np.int64


@pytest.mark.parametrize("ending", [".json", ".jsonl", ".csv"])
@pytest.mark.parametrize(
    ("row", "said"),
    [
        (changed(label=3), "row 2: label .?3.? is no class; expected a number: 0 Normal, 1 Benign, 2 Malignant"),
        (changed(label=-1), "row 2: label .*-1.* is no class"),
        (changed(label="Benign"), "row 2: label 'Benign' is no class"),
        (changed(label=1.5), "row 2: label .?1.5.? is no class"),
        (changed(answer="Cyst"), "row 2: answer 'Cyst' is no class; expected one of Normal, Benign, Malignant"),
        (changed(answer="benign"), "row 2: answer 'benign' is no class"),
        (changed(answer="Malignant"), "row 2: answer 'Malignant', but label 1, which is Benign"),
        (changed(text=" "), "row 2: text is ' ', expected a text"),
        (changed(image=""), "row 2: image is '', expected a text"),
        (changed(image=ROW["image"]), r"rows 1 and 2: two rows for .*, with the labels 0 \(Normal\) and 1 \(Benign\)"),
        (ROW, r"rows 1 and 2: two rows for Normal/normal \(1\).png, with the same label 0 \(Normal\)"),
        ({**ROW, "image": "./Normal/normal (1).png"}, "rows 1 and 2: two rows for"),
    ],
)  # fmt: skip
def test_a_row_that_cannot_be_is_named(tmp_path, ending, row, said):
    file = write_rows(tmp_path / f"train{ending}", [ROW, row])
    with pytest.raises(KilnError, match=said) as caught:
        read_split(file, CLASSES)
    assert caught.value.message.startswith(str(file)) and caught.value.hint


@pytest.mark.parametrize("column", ["image", "text", "answer", "label"])
def test_a_missing_column_is_named(tmp_path, column):
    short = {name: value for name, value in ROW.items() if name != column}
    for ending in (".json", ".jsonl"):
        with pytest.raises(KilnError, match=f"row 2: no {column}; it has "):
            read_split(write_rows(tmp_path / f"a{ending}", [ROW, changed(**{column: ...})]), CLASSES)
    with pytest.raises(KilnError, match=f"no column {column}; it has "):
        read_split(write_rows(tmp_path / "a.csv", [short]), CLASSES)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.json", "", "not JSON"),
        ("a.json", '{"image": "a"', "not JSON"),
        ("a.json", '{"rows": []}', "a JSON dict, expected a list of rows"),
        ("a.json", '[["a", 1]]', "row 1: .*, expected an object"),
        ("a.json", "[]", "no rows"),
        ("a.json", '[{"image": null, "text": "t", "answer": "Normal", "label": 0}]', "row 1: no image"),
        ("a.json", '[{"image": 7, "text": "t", "answer": "Normal", "label": 0}]', "row 1: image is 7, expected a text"),
        ("a.json", '[{"image": "a", "text": "t", "answer": "Normal", "label": true}]', "row 1: label True is no class"),
        ("a.jsonl", "\n\n", "no rows"),
        ("a.jsonl", '{"image": 1}', "row 1: no text, answer, label"),
        ("a.jsonl", f"{json.dumps(ROW)}\n\n{{", "row 3: not JSON"),
        ("a.jsonl", f"{json.dumps(ROW)}\n7", "row 2: 7, expected an object"),
        ("a.csv", "", "no column image, text, answer, label; it has none"),
        ("a.csv", "image,text,answer,label\n", "no rows"),
        ("a.csv", "image,text,answer,label\na,one, two,Normal,0\n", "row 1: 5 fields, but 4 columns"),
        ("a.csv", "image,text,answer,label\na,one,Normal\n", "row 1: no label"),
        ("a.csv", 'image,text,answer,label\na,"one"x,Normal,0\n', "row 1: no CSV"),
        ("a.txt", "x", "a split ends in .json, .jsonl, .csv"),
    ],
)
def test_a_file_that_is_no_split_is_refused(tmp_path, name, text, said):
    (tmp_path / name).write_text(text)
    with pytest.raises(KilnError, match=said) as caught:
        read_split(tmp_path / name, CLASSES)
    assert caught.value.message.startswith(str(tmp_path / name)) and caught.value.hint


def test_a_file_that_is_no_text_or_not_there_is_refused(tmp_path):
    (tmp_path / "a.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(KilnError, match="a.json: not UTF-8"):
        read_split(tmp_path / "a.json", CLASSES)
    with pytest.raises(KilnError, match="b.json: cannot be read"):
        read_split(tmp_path / "b.json", CLASSES)


def test_faults_of_published_files_stop_the_audit(scans, tmp_path):
    given = sides(tmp_path, [*scans.rows(), ("Benign/benign (1).png", 2)], scans.rows()[:1])
    rows = len(scans.rows())
    said = rf"train.json, rows \d+ and {rows + 1}: two rows for benign/benign \(1\).png, with the labels 1 .* and 2"
    with pytest.raises(KilnError, match=said):  # the same image, though written in another letter case
        audit(tmp_path, scans.images, *given)
    assert not (tmp_path / "report").exists()


# Whose image a row means


def test_letter_case_of_folders_then_of_names_is_overlooked():
    paths = ["normal/a (1).png", "normal/A (1).png", "BENIGN/deep/b.PNG", "c.png"]
    asked = ["Normal/a (1).png", "NORMAL/A (1).png", "benign/Deep/b.PNG", "Benign/deep/B.png", "C.png", "normal/b.PNG"]
    found = match(pd.Series(asked, index=range(5, 11)), paths)
    assert found.index.tolist() == list(range(5, 11))
    assert found.iloc[:5].tolist() == [paths[0], paths[1], paths[2], paths[2], paths[3]] and pd.isna(found.iloc[5])


def test_what_could_mean_two_images_means_none():
    paths = ["normal/a.png", "Normal/a.png", "x/b.png", "x/B.png"]
    found = match(pd.Series(["NORMAL/a.png", "Normal/a.png", "x/b.PNG", "X/B.png"]), paths)
    assert pd.isna(found[0]) and found[1] == "Normal/a.png" and pd.isna(found[2]) and found[3] == "x/B.png"


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text("aAbB /", min_size=1, max_size=6), min_size=1, max_size=8, unique=True), st.randoms())
def test_a_path_means_itself_and_nothing_means_another_name(paths, chance):
    assert match(pd.Series(paths), paths).tolist() == paths
    asked = pd.Series([path.swapcase() if chance.random() < 0.5 else path for path in paths])
    for image, path in zip(asked, match(asked, paths), strict=True):
        assert pd.isna(path) or path.casefold() == image.casefold()
