"""Rows for SFT, GRPO and scoring: both published layouts, what is dropped, what is refused, who sees what."""

import ast
import importlib.util
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from vase_fixtures import ROOT, command_line, error_of, files_below, picture, run, write

from scripts.common.artefacts import sha256_file
from scripts.common.errors import KilnError
from scripts.vase import build_dataset
from scripts.vase.build_dataset import DROPPED, facts_text, seen_by_sft
from scripts.vase.lint_rows import SHOWN
from scripts.vase.published_rows import match_images, read_captions, read_questions
from scripts.vase.settings import DIMENSIONS
from scripts.vase.vqa_rows import read_rows

SIDES = {**{f"A{i}": "train" for i in range(6)}, **{"B0": "validation", "B1": "validation", "C0": "test", "C1": "test"}}
FILES = ("sft_train", "sft_validation", "grpo_train", "grpo_validation", "test")
# image: (why it is dropped, what dropped.tsv names)
BAD = {
    "A0_3.jpg": ("rejected", "north/A0_3.jpg"),
    "A1_2.jpg": ("low_quality", "north/A1_2.jpg"),
    "A2_1.jpg": ("quarantined", "north/A2_1.jpg"),
    "D0_1.jpg": ("no_side", "D0"),
    "gone.jpg": ("not_in_manifest", "gone.jpg"),
}


class World:
    """The tables of earlier steps: vases with three views each, A0 to A5 below north/.

    Beside those of SIDES: D0 stands on no side, no view of E0 is accepted, and two files are called same.jpg.
    """

    def __init__(self, folder: Path):
        self.folder, self.images = folder, folder / "images"
        rows = []
        for vase in (*SIDES, "D0", "E0"):
            for view in (1, 2, 3):
                path = f"{'north/' if vase[0] == 'A' else ''}{vase}_{view}.jpg"
                rows.append({"path": path, "vase": vase, "view": str(view)})
        rows += [{"path": f"{place}/same.jpg", "vase": "A5", "view": "9"} for place in ("north", "south")]
        for seed, row in enumerate(rows):
            bad = BAD.get(Path(row["path"]).name, ("",))[0]
            file = picture(self.images / row["path"], seed)
            if bad == "quarantined":
                file.write_bytes(b"no picture")
            row |= {"sha256": sha256_file(file), "width": 32, "height": 32}
            row |= {"status": "quarantined" if bad == "quarantined" else "ok", "listed": bad}
        frame = pd.DataFrame(rows)
        self.manifest = write(folder / "manifest.parquet", frame.drop(columns="listed"))
        high = frame[(frame["status"] == "ok") & (frame["listed"] != "low_quality")]
        high = high.assign(accepted=(high["listed"] != "rejected") & (high["vase"] != "E0"), score=0.5)
        self.accepted = write(folder / "accepted.parquet", high[["path", "vase", "view", "score", "accepted"]])
        best = high[high["accepted"]].drop_duplicates("vase", keep="first")
        self.best = write(folder / "best.parquet", best[["vase", "path"]], "vase")
        splits = [{"vase": vase, "side": side} for vase, side in [*SIDES.items(), ("E0", "train")]]
        self.splits = write(folder / "splits.parquet", splits, "vase")

    def arguments(self, **changed):
        tables = {"manifest": self.manifest, "accepted": self.accepted, "best-views": self.best, "splits": self.splits}
        given = {"images": self.images, **tables, **changed}
        return [word for name, value in given.items() for word in (f"--{name}", value)]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A world that no test changes."""
    return World(tmp_path_factory.mktemp("world"))


def ask(dimension="technique", answer="black-figure", question="What technique?", **shown):
    return {"question": question, "answer": answer, "dimension": dimension, **shown}


def describe(*images, caption="a fine pot", **more):
    return {"images": list(images), "caption": caption, "data_by": "us", **more}


def questions():
    """Two questions about the second view of most vases of SIDES."""
    rows = []
    for number, vase in enumerate(SIDES):
        if vase != "A1":
            rows.append(ask(answer=("black-figure", "red-figure")[number % 2], image=f"{vase}_2.jpg"))
            rows.append(ask("shape", "krater", "What shape?", image=f"{vase}_2.jpg"))
    return rows


def captions():
    return [describe(f"{vase}_2.jpg", caption=f"pot {vase}") for vase in SIDES if vase != "A1"]


def save(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def build(folder, world, asked=None, described=None, ending=".json", tables=None, **settings):
    """Run the step: {file: its rows}, dropped.tsv, summary."""
    out = folder / "out"
    given = world.arguments(**(tables or {}))
    if asked is not None:
        given += ["--questions", save(folder / f"questions{ending}", asked)]
    if described is not None:
        given += ["--captions", save(folder / "captions.json", described)]
    given += ["--output-folder", out, "--meta", out / "meta.json"]
    run(build_dataset.main, *given, settings=settings)
    made = {name: [json.loads(line) for line in lines(out / f"{name}.jsonl")] for name in FILES}
    return made, pd.read_csv(out / "dropped.tsv", sep="\t"), json.loads((out / "summary.json").read_text())


def lines(path):
    return path.read_text(encoding="utf-8").removesuffix("\n").split("\n")


def refused(folder, world, said, *args, **given):
    with pytest.raises(KilnError, match=said) as caught:
        build(folder, world, *args, **given)
    assert caught.value.hint
    assert files_below(folder / "out") == []
    return caught.value.message


# What is written


def test_rows_of_both_layouts_are_written_as_ms_swift_reads_them(world, tmp_path):
    asked = [*questions(), ask("dating", "-525 to -500", "How old is\nit?", vase="A3")]
    talk = [{"value": "What technique?"}, {"value": "red-figure"}, {"value": "And?"}, {"value": "riders"}]
    described = [*captions(), describe("A4_1.jpg", "north/A4_2.jpg", caption="not used", conversations=talk)]
    made, dropped, summary = build(tmp_path, world, asked, described)
    assert dropped.empty
    rows = {row["id"]: row for row in made["sft_train"]}
    assert rows["A0/A0_2/technique"] == {
        "id": "A0/A0_2/technique",
        "vase": "A0",
        "dimension": "technique",
        "messages": [
            {"role": "user", "content": "<image>What technique?"},
            {"role": "assistant", "content": "black-figure"},
        ],
        "images": ["north/A0_2.jpg"],
        "reference": "black-figure",
        "facts": '{"shape": "krater", "technique": "black-figure"}',
    }
    one = rows["A0/A0_2/caption"]
    assert [turn["content"] for turn in one["messages"]] == ["<image>Describe the vase.", "pot A0"]
    assert one["reference"] == "pot A0" and one["facts"] == rows["A0/A0_2/technique"]["facts"]
    best = rows["A3/A3_1/dating"]  # the first accepted view is the best of this world
    assert best["images"] == ["north/A3_1.jpg"] and json.loads(best["facts"])["dating"] == "-525 to -500"
    talked = rows["A4/A4_1/caption"]
    assert talked["images"] == ["north/A4_1.jpg", "north/A4_2.jpg"]
    assert [(turn["role"], turn["content"]) for turn in talked["messages"]] == [
        ("user", "<image><image>What technique?"),
        ("assistant", "red-figure"),
        ("user", "And?"),
        ("assistant", "riders"),
    ]
    assert talked["reference"] == "riders"
    for name in FILES:  # later steps read the same
        read = read_rows(tmp_path / f"out/{name}.jsonl")
        assert [row.id for row in read] == sorted(row["id"] for row in made[name])
        assert [row.reference for row in read] == [row["reference"] for row in made[name]]
    assert summary["sides"]["train"]["dimensions"] == {"technique": 5, "shape": 5, "dating": 1, "caption": 6}
    assert summary["rows"]["in"] == 29 and summary["files"] == {name: len(made[name]) for name in FILES}


def test_each_vase_stands_on_its_side(world, tmp_path):
    made, _, summary = build(tmp_path, world, questions(), captions())
    for name in FILES:
        side = name.partition("_")[2] or name
        assert {SIDES[row["vase"]] for row in made[name]} == {side}
    for side, found in summary["sides"].items():
        own = {vase for vase in SIDES if SIDES[vase] == side and vase != "A1"}
        assert found == {
            "rows": 3 * len(own), "vases": len(own), "images": len(own),
            "dimensions": {"technique": len(own), "shape": len(own), "caption": len(own)},
        }  # fmt: skip


def test_grpo_rows_end_with_the_question(world, tmp_path):
    talk = [{"from": "human", "value": "Q1"}, {"from": "gpt", "value": "A"}, {"from": "human", "value": "Q2"}]
    system = [{"from": "system", "value": "Be brief."}, *talk, {"from": "gpt", "value": "B"}]
    made, *_ = build(tmp_path, world, questions(), [*captions(), describe("A4_1.jpg", conversations=system)])
    for side in ("train", "validation"):
        full, cut = made[f"sft_{side}"], made[f"grpo_{side}"]
        for one, other in zip(full, cut, strict=True):
            assert one["messages"][:-1] == other["messages"] and other["messages"][-1]["role"] == "user"
            assert one["messages"][-1] == {"role": "assistant", "content": other["reference"]}
            assert {**one, "messages": 0} == {**other, "messages": 0}
    (spoken,) = [row for row in made["grpo_train"] if row["id"] == "A4/A4_1/caption"]
    assert [turn["role"] for turn in spoken["messages"]] == ["system", "user", "assistant", "user"]
    assert spoken["messages"][1]["content"] == "<image>Q1"


def test_no_column_is_folded_into_messages_by_swift():
    spec = importlib.util.find_spec("swift")
    if spec is None:
        pytest.skip("needs ms-swift")
    source = Path(spec.origin).parent / "dataset/preprocessor/core.py"
    folded = {"history"}
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Assign) and any(getattr(t, "id", "").endswith("_keys") for t in node.targets):
            folded |= {leaf.value for leaf in ast.walk(node.value) if isinstance(leaf, ast.Constant)}
    assert {"answer", "solution", "query", "text", "instruction", "system"} <= folded
    ours = {"id", "vase", "dimension", "reference", "facts"}
    assert not ours & folded


def test_columns_survive_datasets(world, tmp_path):
    datasets = pytest.importorskip("datasets")
    made, *_ = build(tmp_path, world, questions(), captions())
    for name in FILES:
        file = str(tmp_path / f"out/{name}.jsonl")
        read = datasets.load_dataset("json", data_files=file, split="train", cache_dir=str(tmp_path / "cache"))
        assert read.to_list() == made[name]


@pytest.mark.slow
def test_columns_survive_swift(world, tmp_path):
    if importlib.util.find_spec("swift") is None:
        pytest.skip("needs ms-swift")
    made, *_ = build(tmp_path, world, questions(), captions())
    code = """
import json, sys
from datasets import load_dataset
from swift.dataset.preprocessor.core import AutoPreprocessor
read = load_dataset("json", data_files=sys.argv[1], split="train", cache_dir=sys.argv[2])
read = AutoPreprocessor()(read, load_from_cache_file=False)
with open(sys.argv[3], "w") as file:
    json.dump([{**row, "images": [image["path"] for image in row["images"]]} for row in read], file)
"""
    given = [str(tmp_path / name) for name in ("out/grpo_train.jsonl", "cache", "read.json")]
    env = {**os.environ, "MODELSCOPE_CACHE": str(tmp_path / "scope")}
    subprocess.run([sys.executable, "-c", code, *given], check=True, env=env, cwd=ROOT, timeout=300)
    read = json.loads((tmp_path / "read.json").read_text())
    for one, other in zip(read, made["grpo_train"], strict=True):
        assert {key: one[key] for key in other} == other


@pytest.mark.parametrize("ending", [".json", ".jsonl"])
def test_the_order_of_rows_decides_no_byte(world, tmp_path, ending):
    more = [ask("decoration", text, f"{text}?", image="A0_2.jpg") for text in ("riders", "dancers", "riders on foot")]
    asked, described = [*questions(), *more], captions()
    build(tmp_path / "one", world, asked, described)
    for seed in range(3):
        rng = random.Random(seed)
        rng.shuffle(asked)
        rng.shuffle(described)
        build(tmp_path / f"{seed}", world, asked, described, ending)
        for name in (*(f"{name}.jsonl" for name in FILES), "summary.json"):
            assert (tmp_path / f"{seed}/out/{name}").read_bytes() == (tmp_path / f"one/out/{name}").read_bytes()


def test_ids_of_the_same_view_and_dimension_are_counted(world, tmp_path):
    more = [ask(answer=answer, question=f"Is it {answer}?", image="A0_2.jpg") for answer in ("x", "y")]
    made, *_ = build(tmp_path, world, [*questions(), *more])
    own = [row for row in made["test"] + made["sft_train"] if row["id"].startswith("A0/A0_2/technique")]
    assert [row["id"] for row in own] == [f"A0/A0_2/technique{n}" for n in ("", "#2", "#3")]
    assert [row["reference"] for row in own] == ["x", "y", "black-figure"]


def test_tags_that_are_written_stay_where_they_are(world, tmp_path):
    two = ask(question="Is <image> the vase of <image>?", answer="yes", images=["A0_1.jpg", "A0_2.jpg"])
    made, *_ = build(tmp_path, world, [*questions(), two])
    (row,) = [row for row in made["sft_train"] if len(row["images"]) == 2]
    assert row["messages"][0]["content"] == "Is <image> the vase of <image>?"


def test_a_row_of_two_vases_of_one_side_knows_no_facts(world, tmp_path):
    both = ask(question="Which is older?", answer="the first", dimension="dating", images=["A3_2.jpg", "A0_2.jpg"])
    made, *_ = build(tmp_path, world, [*questions(), both])
    (row,) = [row for row in made["sft_train"] if len(row["images"]) == 2]
    assert (row["vase"], row["facts"], row["id"]) == ("A3", "", "A3/A3_2/dating")
    assert all("dating" not in row["facts"] for row in made["sft_train"])


def test_facts_take_the_most_frequent_answer_and_say_so(world, tmp_path):
    more = [
        ask("shape", "bowl", f"Shape {n}?", image=name) for n, name in enumerate(("A0_1.jpg", "A0_2.jpg", "A0_3.jpg"))
    ]
    made, dropped, summary = build(tmp_path, world, [*questions(), *more])
    facts = {row["facts"] for row in made["sft_train"] if row["vase"] == "A0"}
    assert facts == {'{"shape": "bowl", "technique": "black-figure"}'}
    assert summary["facts_with_several_answers"] == 1 and len(dropped) == 1
    assert facts_text({"shape": {"b": 2, "a": 2, "c": 1}}) == '{"shape": "a"}' and facts_text({}) == ""


def test_texts_of_any_script_stay_as_they_are(world, tmp_path):
    text = "红绘式\u2028双耳瓶 “Ἀθῆναι”\n<b>"
    asked = [*questions(), ask("decoration", text, "这是什么？", image="A0_2.jpg")]
    made, *_ = build(tmp_path, world, asked, caption_question="描述这个花瓶。", described=captions())
    (row,) = [row for row in made["sft_train"] if row["dimension"] == "decoration"]
    assert row["reference"] == text and row["messages"][0]["content"] == "<image>这是什么？"
    assert "红绘式" in (tmp_path / "out/sft_train.jsonl").read_text(encoding="utf-8")
    assert read_rows(tmp_path / "out/sft_train.jsonl")[0].turns[0][1] == "<image>描述这个花瓶。"
    (one,) = [one for one in read_rows(tmp_path / "out/grpo_train.jsonl") if one.dimension == "decoration"]
    assert one.reference == text


def test_sft_sees_a_share_of_the_train_vases_and_grpo_all(world, tmp_path):
    full, *_ = build(tmp_path / "full", world, questions())
    made, _, summary = build(tmp_path / "half", world, questions(), sft_share=0.4)
    vases = {row["vase"] for row in made["sft_train"]}
    assert len(vases) == 2 and summary["sft"] == {"vases": 2, "of": 5, "share": 0.4}
    assert made["sft_train"] == [row for row in full["sft_train"] if row["vase"] in vases]
    for name in FILES[1:]:
        assert made[name] == full[name]
    least, _, summary = build(tmp_path / "least", world, questions(), sft_share=0.01)
    assert {row["vase"] for row in least["sft_train"]} < vases and summary["sft"]["vases"] == 1
    drawn = {seed: seen_by_sft(map(str, range(50)), 0.5, seed) for seed in (1, 2)}
    assert drawn[1] != drawn[2] and len(drawn[1]) == len(drawn[2]) == 25
    one_more = seen_by_sft(map(str, range(51)), 0.5, 1)
    assert len(one_more ^ drawn[1]) <= 2


# What is dropped


@pytest.mark.parametrize("image", BAD)
def test_a_row_of_an_image_that_cannot_be_used_is_dropped_with_its_reason(world, tmp_path, image):
    whole, *_ = build(tmp_path / "whole", world, questions(), captions())
    reason, blamed = BAD[image]
    asked = [ask("fabric", "Athenian", image=image), *questions()]
    described = [*captions(), describe(image)]
    made, dropped, summary = build(tmp_path, world, asked, described)
    assert {(row.file, row.row) for row in dropped.itertuples()} == {("captions", len(described)), ("questions", 1)}
    assert set(dropped["reason"]) == {reason} and set(dropped["image_or_vase"]) == {blamed}
    assert summary["dropped"] == {reason: {"rows": 2, "why": DROPPED[reason]}}
    assert [row["id"] for row in made["test"]] == [row["id"] for row in whole["test"]]


@pytest.mark.parametrize(
    ("vase", "reason"),
    [("E0", "no_accepted_view"), ("Z9", "not_in_manifest"), ("D0", "no_side"), (7, "not_in_manifest")],
)
def test_a_row_of_a_vase_that_cannot_be_shown_is_dropped(world, tmp_path, vase, reason):
    _, dropped, summary = build(tmp_path, world, [*questions(), ask("fabric", vase=vase)])
    assert dropped.to_dict("records") == [{"file": "questions", "row": 19, "image_or_vase": vase, "reason": reason}]
    assert summary["rows"][reason] == 1


def test_one_bad_image_of_several_drops_the_row(world, tmp_path):
    _, dropped, _ = build(tmp_path, world, questions(), [describe("A0_1.jpg", "A0_3.jpg", "A0_2.jpg")])
    assert dropped["image_or_vase"].tolist() == ["north/A0_3.jpg"]


def test_all_rows_are_accounted_for(world, tmp_path):
    more = [ask("fabric", "Athenian", image=image) for image in BAD] + [ask("fabric", vase="E0")]
    made, dropped, summary = build(tmp_path, world, [*questions(), *more], [*captions(), describe("gone.jpg")])
    rows = summary["rows"]
    assert rows["in"] == 18 + 6 + 9 + 1 == sum(count for name, count in rows.items() if name != "in")
    assert rows["in"] == sum(len(made[name]) for name in ("grpo_train", "grpo_validation", "test")) + len(dropped)
    reasons = {name: one["rows"] for name, one in summary["dropped"].items()}
    assert dropped["reason"].value_counts().to_dict() == reasons
    assert reasons == {**dict.fromkeys(DROPPED, 1), "not_in_manifest": 2}


# What is refused


KNOWN = ", ".join((*DIMENSIONS, "caption"))


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (ask(answer=" \n", image="A0_1.jpg"), "row 2: empty answer"),
        (ask(question="<image>", image="A0_1.jpg"), "row 2: empty question"),
        (ask(question="<image><image>?", image="A0_1.jpg"), "row 2: 2 <image> tags, but 1 images"),
        (ask(question="<image>?", images=["A0_1.jpg", "A0_2.jpg"]), "row 2: 1 <image> tags, but 2 images"),
        (ask(answer="an <image>", question="<image>?", image="A0_1.jpg"), "row 2: <image> in a turn of the assistant"),
        (ask("age", image="A0_1.jpg"), f"row 2: dimension 'age' is unknown; these are {KNOWN}"),
        ({"question": "?", "answer": "!", "image": "A0_1.jpg"}, f"row 2: no dimension; these are {KNOWN}"),
        (ask(image="north/A0_2.jpg"), "row 2: the same images, question and answer as row 1"),
        (ask(images=["A0_1.jpg", "B0_1.jpg"]), r"row 2: vases of two sides: A0 \(train\), B0 \(validation\)"),
    ],
)
def test_a_row_that_no_model_should_see_is_refused(world, tmp_path, row, said):
    asked = questions()
    said = refused(tmp_path, world, f"questions.json, {said}", [asked[0], row, *asked[1:]])
    assert said.startswith("1 problem in rows")


def test_a_dropped_row_is_checked_too(world, tmp_path):
    refused(tmp_path, world, "row 19: empty answer", [*questions(), ask(answer="", image="A0_3.jpg")])


def test_twins_in_two_files_are_refused(world, tmp_path):
    twin = ask("caption", "pot A0", "Describe the vase.", vase="A0")
    said = r"questions.json, row 19: the same images, question and answer as .*captions.json, row 10"
    refused(tmp_path, world, said, [*questions(), twin], [*captions(), describe("A0_1.jpg", caption="pot A0")])


def test_all_problems_are_counted_and_the_first_are_shown(world, tmp_path):
    bad = [ask(answer="", question=f"{n}?", image="A0_1.jpg") for n in range(SHOWN + 3)]
    message = refused(tmp_path, world, "8 problems", [*questions(), *bad])
    assert [line.rpartition("row ")[2] for line in message.splitlines()[1:]] == [
        *(f"{n}: empty answer" for n in range(19, 19 + SHOWN)), "... and 3 more",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (None, "no such file"),
        (b"", "empty file"),
        (b"no picture", "not an image"),
        ("cut", "truncated or corrupt"),
        ("other", "not the file that was listed"),
    ],
)
def test_an_image_that_changed_since_it_was_listed_is_refused(tmp_path, data, said):
    world = World(tmp_path / "world")
    file = world.images / "north/A0_2.jpg"
    if data is None:
        file.unlink()
    elif data == "other":
        file.write_bytes((world.images / "north/A0_1.jpg").read_bytes())
    else:
        file.write_bytes(file.read_bytes()[:-20] if data == "cut" else data)
    message = refused(tmp_path, world, f"row 1: image .*A0_2.jpg: {said}", questions())
    assert message.startswith("1 problem ")  # one for the file, not for each of its rows


def test_an_image_name_that_means_two_files_is_refused(world, tmp_path):
    said = r"row 1: image same.jpg may be any of 2 files: north/same.jpg, south/same.jpg"
    refused(tmp_path, world, said, [ask(image="same.jpg"), *questions()])
    _, dropped, _ = build(tmp_path, world, [ask(image="./north/same.jpg"), *questions()])
    assert dropped.empty


def test_a_name_means_the_path_else_the_only_file_of_that_name(tmp_path):
    names = ["b.jpg", "./x/a.jpg", "C:\\pots\\b.jpg", "/data/c.jpg", "d.jpg"]
    rows = match_images(
        read_captions(save(tmp_path / "c.json", [describe(*names)]), "?"), ["x/a.jpg", "y/b.jpg", "c.jpg"]
    )
    assert rows[0].images == ("y/b.jpg", "x/a.jpg", "y/b.jpg", "c.jpg", "d.jpg")


@pytest.mark.parametrize("side", ["train", "validation", "test"])
def test_an_empty_side_is_refused(world, tmp_path, side):
    asked = [row for row in questions() if SIDES[row["image"][:2]] != side] + [ask(image="gone.jpg")]
    message = refused(tmp_path, world, f"no row on side {side};", asked)
    assert message.endswith("dropped: not_in_manifest 1")


@pytest.mark.parametrize(("asked", "said"), [(None, "neither captions nor questions"), ([], "questions.json: no rows")])
def test_no_rows_are_refused(world, tmp_path, asked, said):
    refused(tmp_path, world, said, asked)


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ({"vase": "A0", "side": "test"}, "vase A0 is on two sides: (train, test|test, train)"),
        ({"vase": "Z", "side": "dev"}, "vase Z is on side 'dev', expected one of train, validation, test"),
    ],
)
def test_a_split_that_is_none_is_refused(world, tmp_path, extra, said):
    splits = pd.concat([pd.read_parquet(world.splits), pd.DataFrame([extra])])
    splits.to_csv(tmp_path / "splits.csv", index=False)
    refused(tmp_path, world, said, questions(), tables={"splits": tmp_path / "splits.csv"})


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"answer": "x", "dimension": "shape", "image": "a.jpg"}, "no question; it has answer, dimension, image"),
        ({"question": "x", "dimension": "shape", "image": "a.jpg"}, "no answer"),
        (ask(), "no image, images or vase; it has question, answer, dimension"),
        (ask(answer=-525, image="a.jpg"), "answer is -525, expected a text"),
        (ask(dimension=3, image="a.jpg"), "dimension is 3, expected a text"),
        (ask(images=[]), r"images is \[\], expected file names"),
        (ask(image={"path": "a.jpg"}), "image is .*, expected file names"),
        (ask(vase=["A0"]), r"vase is \['A0'\], expected a text"),
        (ask(answer="\ud83d", image="a.jpg"), "answer is no Unicode text"),
        (["What?", "that"], r"\['What\?', 'that'\], expected an object"),
    ],
)
@pytest.mark.parametrize("ending", ["json", "jsonl"])
def test_a_question_of_another_layout_is_named(tmp_path, row, said, ending):
    file = save(tmp_path / f"q.{ending}", [ask(image="a.jpg"), row])
    with pytest.raises(KilnError, match=f"q.{ending}, row 2: {said}"):
        read_questions(file)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"caption": "x"}, "row 2: no images; it has caption"),
        ({"images": ["a.jpg"]}, "row 2: no caption; it has images"),
        (describe("a.jpg", conversations="Q"), "row 2: conversations is 'Q', expected a list"),
        (describe("a.jpg", conversations=[{"value": "Q"}, {"text": "A"}]), "row 2, turn 2: no value; it has text"),
        (
            describe("a.jpg", conversations=[{"value": "Q"}]),
            "row 2: turns of user; expected user and assistant in turn",
        ),
        (describe("a.jpg", conversations=[{"from": "bot", "value": "Q"}]), "row 2: turn 1 is from 'bot', expected one"),
        (describe("a.jpg", conversations=[{"from": "gpt", "value": "A"}]), "row 2: turns of assistant; expected"),
        (
            describe("a.jpg", conversations=[{"value": "Q"}, {"value": "A"}, {"from": "system", "value": "S"}]),
            "row 2: turns of user, assistant, system; expected",
        ),
    ],
)
def test_a_caption_of_another_layout_is_named(tmp_path, row, said):
    file = save(tmp_path / "c.json", [describe("a.jpg"), row])
    with pytest.raises(KilnError, match=f"c.json, {said}"):
        read_captions(file, "?")


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("q.json", b"[{", "q.json: not JSON"),
        ("q.json", b'{"question": "?"}', "q.json: a JSON dict, expected a list of rows"),
        ("q.jsonl", b'{"question": "?", "answer": "!", "image": "a"}\n\n{"x"\n', "q.jsonl, row 3: not JSON"),
        ("q.json", "[\"é\"]".encode("latin-1"), "q.json: not UTF-8"),
        ("q.json", None, "q.json: cannot be read"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_json_is_named(tmp_path, name, data, said):
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(KilnError, match=said) as caught:
        read_questions(tmp_path / name)
    assert caught.value.hint


def test_a_user_is_told_on_the_command_line(world, tmp_path):
    file = save(tmp_path / "q.json", [ask(answer="", image="A0_1.jpg")])
    given = world.arguments(questions=file)
    said = error_of(
        command_line("build_dataset", *given, "--output-folder", tmp_path, "--meta", tmp_path / "meta.json")
    )
    assert f"{file}, row 1: empty answer" in said


def test_the_record_names_what_was_read(world, tmp_path):
    build(tmp_path, world, questions(), captions(), sft_share=0.5)
    meta = json.loads((tmp_path / "out/meta.json").read_text())
    assert set(meta["inputs"]) == {"manifest", "accepted", "best_views", "splits", "captions", "questions"}
    assert set(meta["outputs"]) == {*(f"{name}.jsonl" for name in FILES), "dropped.tsv", "summary.json"}
    assert meta["settings"]["sft_share"] == 0.5
