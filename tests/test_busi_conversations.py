"""Chat rows of our split and of published ones: who stands where, with which prompt, and what is refused."""

import json
import shutil

import pandas as pd
import pytest
from busi_fixtures import CLASSES, Scans, published
from vase_fixtures import files_below, run

from scripts.busi import audit_split, build_conversations
from scripts.busi.chat_rows import read_rows
from scripts.busi.published import read_split
from scripts.common import tables
from scripts.common.artefacts import sha256_file
from scripts.common.errors import KilnError

SIDES = ("train", "validation", "test")
PROMPTS = ("What is it?", "Which of the three?\u2028Say one.", "好 or not?")


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    """Drawn scans that no test changes."""
    return Scans(tmp_path_factory.mktemp("scans"))


def build(folder, scans, *split, manifest=None, groups=None, classes=CLASSES, **values):
    """Run the step: {side: published rows}, {side: chat rows}, summary."""
    out = folder / "out"
    given = ("--manifest", manifest or scans.manifest, "--groups", groups or scans.groups, "--classes", *classes)
    given += ("--output-folder", out, "--meta", out / "meta.json")
    run(build_conversations.main, *given, *split, settings=values)
    rows = {side: json.loads((out / f"{side}.json").read_text(encoding="utf-8")) for side in SIDES}
    lines = {side: (out / f"{side}.jsonl").read_text(encoding="utf-8").splitlines() for side in SIDES}
    chat = {side: [json.loads(line) for line in lines[side]] for side in SIDES}
    return rows, chat, json.loads((out / "summary.json").read_text())


def halves(folder, scans, without=(), ending=".json"):
    """A published split that leaks: every third image of the folder, in order of path, is on the test side."""
    rows = [row for row in scans.rows() if row[0] not in without]
    made = published(folder / f"train{ending}", [row for i, row in enumerate(rows) if i % 3], text="Published?")
    return "--train", made, "--test", published(folder / f"test{ending}", rows[::3], text="Published?")


# Our split


def test_each_side_is_written_in_both_forms(scans, tmp_path):
    rows, chat, summary = build(tmp_path, scans, "--splits", scans.splits)
    frame = pd.read_csv(scans.splits).set_index("path")
    prompt = build_conversations.ConversationSettings().prompts[0]
    for side in SIDES:
        own = frame[frame["side"] == side].sort_index()
        assert rows[side] == [
            {"image": path, "text": prompt, "answer": CLASSES[label], "label": label}
            for path, label in own["label"].items()
        ]
        assert chat[side] == [
            {
                "image": path, "sha256": sha256_file(scans.images / path), "label": one.label, "group": one.group,
                "messages": [
                    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]},
                    {"role": "assistant", "content": [{"type": "text", "text": CLASSES[one.label]}]},
                ],
            }
            for path, one in zip(own.index, own.itertuples(), strict=True)
        ]  # fmt: skip
        assert summary["images"][side] == {
            name: int((own["label"] == label).sum()) for label, name in enumerate(CLASSES)
        }
        assert summary["groups"][side] == own["group"].nunique()
    assert summary["in"] == sum(summary[side] for side in SIDES) + summary["not_in_split"]
    assert summary["not_in_split"] == 2  # the label conflict
    assert summary["groups_on_both_sides_of_test"] == 0 and summary["split"] == "ours"


def test_training_draws_prompts_by_seed_and_path_and_scoring_uses_the_first(scans, tmp_path):
    made = {
        seed: build(tmp_path / str(seed), scans, "--splits", scans.splits, prompts=PROMPTS, seed=seed)
        for seed in (1, 2)
    }
    rows, chat, summary = made[1]
    assert summary["prompts"] == {"train": 3, "validation": 1, "test": 1}
    for side in ("validation", "test"):
        assert {row["text"] for row in rows[side]} == {PROMPTS[0]}
    texts = [row["text"] for row in rows["train"]]
    assert all(texts.count(prompt) >= len(texts) / 6 for prompt in PROMPTS)
    assert texts != [row["text"] for row in made[2][0]["train"]]
    for side in SIDES:  # both forms say the same, and the reader of training sees it
        assert [line["messages"][0]["content"][1]["text"] for line in chat[side]] == [r["text"] for r in rows[side]]
        read = read_rows(tmp_path / f"1/out/{side}.jsonl", CLASSES)
        assert read["prompt"].tolist() == [row["text"] for row in rows[side]]
        assert read["answer"].tolist() == [CLASSES[label] for label in read["label"]]
    frame = pd.read_csv(scans.splits)
    fewer = frame.drop(frame.index[frame["side"] == "train"][:5])
    fewer.to_csv(tmp_path / "fewer.csv", index=False)
    rest, *_ = build(tmp_path / "fewer", scans, "--splits", tmp_path / "fewer.csv", prompts=PROMPTS, seed=1)
    drawn = {row["image"]: row["text"] for row in rows["train"]}
    assert all(drawn[row["image"]] == row["text"] for row in rest["train"])  # an image keeps its own


def test_the_bytes_do_not_depend_on_the_order_of_rows(scans, tmp_path):
    build(tmp_path / "one", scans, "--splits", scans.splits, prompts=PROMPTS)
    pd.read_csv(scans.splits).sample(frac=1, random_state=3).to_csv(tmp_path / "shuffled.csv", index=False)
    build(tmp_path / "two", scans, "--splits", tmp_path / "shuffled.csv", prompts=PROMPTS)
    for side in SIDES:
        for ending in ("json", "jsonl"):
            one, two = (tmp_path / f"{n}/out/{side}.{ending}" for n in ("one", "two"))
            assert one.read_bytes() == two.read_bytes()


def test_our_rows_are_a_published_split_that_audits_to_zero(scans, tmp_path):
    rows, *_ = build(tmp_path, scans, "--splits", scans.splits)
    for side in SIDES:
        assert read_split(tmp_path / f"out/{side}.json", CLASSES)["image"].tolist() == [r["image"] for r in rows[side]]
    given = ("--train", tmp_path / "out/train.json", "--test", tmp_path / "out/test.json")
    run(audit_split.main, "--images", scans.images, *given, "--output", tmp_path / "r.json", "--require-clean", 0.98)


def test_a_group_on_two_sides_is_refused(scans, tmp_path):
    frame = pd.read_csv(scans.splits)
    one = frame.index[frame["path"] == "benign/benign (30).png"][0]
    frame.loc[one, "side"] = "test" if frame.loc[one, "side"] != "test" else "train"
    frame.to_csv(tmp_path / "splits.csv", index=False)
    refused(
        tmp_path, scans, r"duplicate group benign/benign \(1\).png is on two sides", "--splits", tmp_path / "splits.csv"
    )


@pytest.mark.parametrize(("column", "value"), [("sha256", "0" * 64), ("group", "benign/other.png"), ("label", 1)])
def test_a_split_of_another_run_is_refused(scans, tmp_path, column, value):
    frame = pd.read_csv(scans.splits)
    frame.loc[4, column] = value
    frame.to_csv(tmp_path / "splits.csv", index=False)
    said = r"splits.csv, row 5: .*not listed, or not with these bytes, this group, this label"
    refused(tmp_path, scans, said, "--splits", tmp_path / "splits.csv")


def test_an_image_that_is_no_longer_listed_is_named(scans, tmp_path):
    frame = pd.read_csv(scans.splits)
    frame.loc[len(frame)] = {**frame.iloc[0].to_dict(), "path": "Normal/normal (77).png"}
    frame.to_csv(tmp_path / "splits.csv", index=False)
    refused(
        tmp_path, scans, rf"row {len(frame)}: Normal/normal \(77\).png: not listed", "--splits", tmp_path / "splits.csv"
    )


def test_groups_of_another_run_are_refused(scans, tmp_path):
    groups = pd.read_parquet(scans.groups)
    tables.write_table(tmp_path / "groups.parquet", groups[groups["path"] != "Normal/normal (2).png"], ["path"])
    said = r"groups.parquet: no row for 1 readable images, such as Normal/normal \(2\).png"
    refused(tmp_path, scans, said, "--splits", scans.splits, groups=tmp_path / "groups.parquet")


def test_a_side_without_an_image_is_refused(scans, tmp_path):
    frame = pd.read_csv(scans.splits)
    frame[frame["side"] != "validation"].to_csv(tmp_path / "splits.csv", index=False)
    refused(tmp_path, scans, "no image on side validation", "--splits", tmp_path / "splits.csv")


# A published split


@pytest.mark.parametrize("ending", [".json", ".jsonl", ".csv"])
def test_a_published_split_is_taken_as_it_is(scans, tmp_path, ending):
    given = halves(tmp_path, scans, ending=ending)
    rows, chat, summary = build(tmp_path, scans, *given, prompts=PROMPTS)
    listed = {side: read_split(given[i], CLASSES) for side, i in (("train", 1), ("test", 3))}
    assert [row["image"] for row in rows["test"]] == sorted(listed["test"]["image"])
    both = sorted(row["image"] for side in ("train", "validation") for row in rows[side])
    assert both == sorted(listed["train"]["image"])
    assert {row["text"] for side in SIDES for row in rows[side]} == {"Published?"}
    assert summary["in"] == sum(summary[side] for side in SIDES) and summary["not_in_split"] == 0
    assert summary["split"] == "published"
    groups = pd.read_parquet(scans.groups).set_index("path")["group"]
    for side in SIDES:
        for row, line in zip(rows[side], chat[side], strict=True):
            assert (line["image"], line["label"], line["group"]) == (row["image"], row["label"], groups[row["image"]])
    # by hand: groups that are in test and in train or validation
    held = {side: {groups[row["image"]] for row in rows[side]} for side in SIDES}
    straddling = (held["train"] | held["validation"]) & held["test"]
    assert summary["groups_on_both_sides_of_test"] == len(straddling) > 0
    n = sum(groups[row["image"]] in straddling for row in rows["test"])
    assert summary["test_images_in_such_groups"] == n


def test_validation_is_cut_off_by_group_and_class(scans, tmp_path):
    given = halves(tmp_path, scans)
    sides = {}
    for seed in range(4):
        _, chat, summary = build(tmp_path / str(seed), scans, *given, seed=seed, validation_share=0.2)
        groups = {side: {line["group"] for line in chat[side]} for side in SIDES}
        assert not groups["train"] & groups["validation"]
        n = summary["train"] + summary["validation"]
        assert summary["validation"] == pytest.approx(0.2 * n, abs=1.5)
        for name in CLASSES:
            own = summary["images"]["train"][name] + summary["images"]["validation"][name]
            assert abs(summary["images"]["validation"][name] - 0.2 * own) <= 1
        sides[seed] = tuple(line["image"] for line in chat["validation"])
    assert len(set(sides.values())) == 4
    again, *_ = build(tmp_path / "again", scans, *given, seed=2, validation_share=0.2)
    assert tuple(row["image"] for row in again["validation"]) == sides[2]


def test_published_letter_case_becomes_that_of_the_folder(scans, tmp_path):
    plain = build(tmp_path / "plain", scans, *halves(tmp_path / "plain", scans))
    given = halves(tmp_path, scans)
    for file in given[1::2]:
        rows = json.loads(file.read_text())
        for row in rows:
            row["image"] = row["answer"] + row["image"][row["image"].index("/") :]
        file.write_text(json.dumps(rows))
    assert build(tmp_path, scans, *given) == plain


def test_a_label_other_than_the_folders_is_the_published_one(scans, tmp_path):
    given = halves(tmp_path, scans, without=["benign/benign (3).png"])
    rows = json.loads(given[1].read_text())
    rows.append({"image": "Benign/benign (3).png", "text": "So?", "answer": "Malignant", "label": 2})
    given[1].write_text(json.dumps(rows))
    made, _, summary = build(tmp_path, scans, *given)
    assert summary["label_not_folder"] == 1
    (one,) = [row for side in SIDES for row in made[side] if row["image"] == "benign/benign (3).png"]
    assert (one["label"], one["answer"], one["text"]) == (2, "Malignant", "So?")


def refused(folder, scans, said, *split, **given):
    with pytest.raises(KilnError, match=said) as caught:
        build(folder, scans, *split, **given)
    assert caught.value.hint
    assert not (folder / "out").exists() or files_below(folder / "out") == []


@pytest.mark.parametrize("side", [1, 3])
def test_a_row_for_a_missing_image_is_named(scans, tmp_path, side):
    given = halves(tmp_path, scans)
    rows = json.loads(given[side].read_text())
    rows.insert(2, {"image": "Benign/benign (99).png", "text": "?", "answer": "Benign", "label": 1})
    given[side].write_text(json.dumps(rows))
    refused(tmp_path, scans, rf"{given[side]}, row 3: Benign/benign \(99\).png: no such image", *given)


def test_a_row_for_an_unreadable_image_is_named(scans, tmp_path):
    manifest = pd.read_parquet(scans.manifest).set_index("path")
    manifest.loc["Normal/normal (2).png", ["status", "reason"]] = "quarantined", "not an image"
    tables.write_table(tmp_path / "manifest.parquet", manifest.reset_index(), ["path"])
    said = r"row \d+: Normal/normal \(2\).png: unreadable: not an image"
    refused(tmp_path, scans, said, *halves(tmp_path, scans), manifest=tmp_path / "manifest.parquet")


def test_an_image_on_two_sides_is_named_with_its_rows(scans, tmp_path):
    given = halves(tmp_path, scans)
    rows = json.loads(given[3].read_text())
    one = json.loads(given[1].read_text())[4]
    rows.append({**one, "image": one["image"].upper().replace(".PNG", ".png")})
    given[3].write_text(json.dumps(rows))
    said = rf"is on two sides: row 5 of .*train.json, row {len(rows)} of .*test.json \(1 such images\)"
    refused(tmp_path, scans, said, *given)


def test_two_rows_for_one_image_are_refused_whatever_their_spelling(scans, tmp_path):
    given = halves(tmp_path, scans)
    rows = json.loads(given[1].read_text())
    first = next(row for row in rows if row["label"] == 1)
    rows.append({**first, "image": first["image"].replace("benign/", "BENIGN/"), "label": 0, "answer": "Normal"})
    given[1].write_text(json.dumps(rows))
    refused(tmp_path, scans, r"two rows for benign/.*, with the labels 1 \(Benign\) and 0 \(Normal\)", *given)


def test_a_train_side_too_small_for_validation_is_refused(scans, tmp_path):
    rows = scans.rows()
    few = [row for row in rows if row[1] != 2] + [row for row in rows if row[1] == 2][:1]
    used = {path for path, _ in few}
    given = ("--train", published(tmp_path / "train.json", few))
    given += ("--test", published(tmp_path / "test.json", [row for row in rows if row[0] not in used]))
    said = (
        r"train.json: class Malignant is too small to split: 1 duplicate groups \(1 images\) for the sides train, val"
    )
    refused(tmp_path, scans, said, *given)


def test_answers_of_other_classes_are_refused(scans, tmp_path):
    given = halves(tmp_path, scans)
    refused(tmp_path, scans, "answer 'Malignant', but label 2, which is Tumour|answer 'Malignant' is no class", *given,
            classes=("Normal", "Benign", "Tumour"))  # fmt: skip


def test_the_record_names_what_was_read(scans, tmp_path):
    build(tmp_path, scans, *halves(tmp_path, scans))
    meta = json.loads((tmp_path / "out/meta.json").read_text())
    assert set(meta["inputs"]) == {"manifest", "groups", "train", "test"}
    assert set(meta["outputs"]) == {f"{s}.{e}" for s in SIDES for e in ("json", "jsonl")} | {"summary.json"}
    assert set(meta["settings"]) == {"split", "prompts", "validation_share", "seed"}


@pytest.mark.parametrize("given", [(), ("--splits", "a.csv", "--test", "b.json"), ("--train", "a.json")])
def test_one_split_must_be_named(scans, tmp_path, capsys, given):
    with pytest.raises(SystemExit):
        build(tmp_path, scans, *given)
    assert "--train" in capsys.readouterr().err


def test_a_rerun_replaces_what_was_there(scans, tmp_path):
    build(tmp_path, scans, *halves(tmp_path, scans))
    first = (tmp_path / "out/train.jsonl").read_bytes()
    shutil.copy(tmp_path / "out/train.jsonl", tmp_path / "kept")
    build(tmp_path, scans, "--splits", scans.splits)
    assert (tmp_path / "out/train.jsonl").read_bytes() != first
    build(tmp_path, scans, *halves(tmp_path, scans))
    assert (tmp_path / "out/train.jsonl").read_bytes() == first
