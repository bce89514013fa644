"""The demo's vases: equal bytes from equal settings, and a truth table that tells the truth."""

import json
import re

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from scripts.common.errors import KilnError
from scripts.demo import draw_vases
from scripts.demo.captions import caption
from scripts.demo.settings import VASE_ANSWERS, DrawSettings
from scripts.demo.vase_flaws import FLAWS
from scripts.demo.vase_questions import DESCRIBE, QUESTIONS
from scripts.demo.vase_shapes import SHAPES
from scripts.demo.vases import SIDES, Vase
from scripts.vase.published_rows import read_captions, read_questions
from scripts.vase.settings import CAPTION, DIMENSIONS, DatasetSettings, PromptSettings

NAME = re.compile(r"^([A-F0-9-]+)_(\d+)_ac001001\.jpg$")
SMALL = {"vases": 4, "labelled_vases": 3, "shared_vases": 2, "clip_vases": 3, "image_size": 64, "seed": 3}


def draw(folder, **changes):
    settings = json.dumps({**SMALL, **changes})
    meta = folder.with_name(f"{folder.name}.meta.json")
    draw_vases.main(
        ["--output-folder", str(folder), "--settings", settings, "--meta", str(meta), "--threads", "1"],
    )
    return folder


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    return draw(tmp_path_factory.mktemp("demo") / "draw")


def test_equal_settings_give_equal_bytes(drawn, tmp_path):
    again = draw(tmp_path / "again")
    assert (again / "files.json").read_bytes() == (drawn / "files.json").read_bytes()
    other = draw(tmp_path / "other", seed=4)
    assert (other / "files.json").read_bytes() != (drawn / "files.json").read_bytes()


def test_the_number_of_processes_decides_no_byte(drawn, tmp_path):
    (tmp_path / "two").mkdir()
    draw_vases.write_demo(tmp_path / "two", DrawSettings(**SMALL), processes=2)
    assert (tmp_path / "two" / "files.json").read_bytes() == (drawn / "files.json").read_bytes()


def test_files_json_lists_every_file(drawn):
    listing = json.loads((drawn / "files.json").read_text())
    files = {str(p.relative_to(drawn)): p.stat().st_size for p in drawn.rglob("*") if p.is_file()}
    files.pop("files.json")
    assert {name: record["bytes"] for name, record in listing.items()} == files


def test_the_truth_fits_the_files(drawn):
    truth = pd.read_parquet(drawn / "truth.parquet")
    vases = pd.read_parquet(drawn / "vases.parquet")
    assert sorted(p.name for p in (drawn / "images").iterdir()) == list(truth["path"])
    matches = [NAME.match(path) for path in truth["path"]]
    assert [m[1] for m in matches] == list(truth["vase"])
    assert [int(m[2]) for m in matches] == list(truth["view"])
    assert len(vases) == SMALL["vases"] and set(vases["vase"]) == set(truth["vase"])
    assert (truth.groupby("vase")["side"].nunique() == 6).all()
    assert ((truth["flaw"] == "none") == (truth["quality"] == 1)).all()
    assert (truth.loc[truth["quality"] == 0, "view_quality"] == 0).all()
    good = truth[truth["quality"] == 1]
    assert (good["view_quality"] == good["side"].map({side: SIDES[side][2] for side in SIDES})).all()
    assert (truth["date_from"] < truth["date_to"]).all() and (truth["date_to"] < 0).all()


def test_shared_labels_are_the_raw_files_and_tell_their_quality(drawn):
    truth = pd.read_parquet(drawn / "truth.parquet").set_index("path")
    shared = [p for p in drawn.glob("labelled/*/*.jpg") if p.name in truth.index]
    assert len(shared) == 6 * SMALL["shared_vases"]
    for path in shared:
        assert path.read_bytes() == (drawn / "images" / path.name).read_bytes()
        assert int(path.parent.name) == truth.loc[path.name, "quality"]


def test_no_vase_is_in_two_sets(drawn):
    raw, clip, labelled = (
        {NAME.match(p.name)[1] for p in drawn.glob(pattern)}
        for pattern in ("images/*.jpg", "clip/*.jpg", "labelled/*/*.jpg")
    )
    assert not raw & clip and not labelled & clip
    assert len(raw & labelled) == SMALL["shared_vases"]
    assert len(labelled) == SMALL["shared_vases"] + SMALL["labelled_vases"]


def test_captions_name_every_clip_picture(drawn):
    table = pd.read_csv(drawn / "clip" / "captions.tsv", sep="\t")
    assert set(table["path"]) == {p.name for p in drawn.glob("clip/*.jpg")}
    assert (table.groupby("path").size() == draw_vases.CAPTIONS).all()


def test_questions_are_asked_where_their_answers_can_be_seen(drawn):
    truth = pd.read_parquet(drawn / "truth.parquet").set_index("path")
    rows = read_questions(drawn / "published/questions.json")
    asked = {(row.images[0], row.dimension) for row in rows}
    assert len(asked) == len(rows) == SMALL["vases"] * (6 * 4 + 2)
    front = {path for path, dimension in asked if dimension in ("decoration", "attribution")}
    assert front == set(truth.index[truth["side"] == "front"])
    assert tuple(QUESTIONS) == DIMENSIONS
    for row in rows:
        one = truth.loc[row.images[0]]
        expected = f"{one['date_from']} to {one['date_to']}" if row.dimension == "dating" else one[row.dimension]
        assert row.turns == (("user", f"<image>{QUESTIONS[row.dimension]}"), ("assistant", expected))
        assert row.answer in VASE_ANSWERS


def test_published_captions_tell_what_each_vase_is(drawn):
    truth = pd.read_parquet(drawn / "truth.parquet").set_index("path")
    published = json.loads((drawn / "published/captions.json").read_text())
    talks = [row for row in published if "conversations" in row]
    assert len(talks) == len(published) / 2
    rows = read_captions(drawn / "published/captions.json", DatasetSettings().caption_question)
    assert sorted(row.images[0] for row in rows) == list(truth.index)
    assert {row.dimension for row in rows} == {CAPTION}
    for row, made in zip(rows, published, strict=True):
        one = truth.loc[row.images[0]]
        kind, dating, decoration, attribution = row.answer.split(", ")
        assert kind == f"{one['fabric']} {one['technique']} {one['shape']}"
        assert dating == f"{one['date_from']} to {one['date_to']}"
        assert (decoration, attribution) == (one["decoration"], one["attribution"])
        assert row.answer == made["caption"] and row.turns[0] == ("user", f"<image>{DESCRIBE}")


def test_captions_are_not_the_prompts():
    rng = np.random.default_rng(0)
    prompts = {*PromptSettings().positive, *PromptSettings().negative}
    facts = {"shape": "krater", "technique": "red-figure", "decoration": "riders"}
    made = {caption(facts, side, flaw, rng) for side in SIDES for flaw in (None, *FLAWS) for _ in range(200)}
    assert len(made) > 1000
    assert not made & prompts
    words = {word for text in made for word in re.findall(r"[a-z-]+", text)}
    assert {"intact", "complete", "undamaged", "front", "frontal", "broken", "fragments", "shards", "dark"} <= words


@pytest.mark.parametrize("shape", SHAPES)
def test_each_side_looks_different(shape):
    vase = Vase(np.random.default_rng(1), (shape,))
    pictures = {side: vase.photograph(side, None, 64, np.random.default_rng(2)).astype(float) for side in SIDES}
    sides = list(SIDES)
    for i, one in enumerate(sides):
        for other in sides[i + 1 :]:
            changed = (np.abs(pictures[one] - pictures[other]).max(2) > 30).mean()
            # left and right are alike but for the edges of the scenes
            assert changed > (0 if {one, other} == {"left", "right"} else 0.005), (one, other)


@pytest.mark.parametrize("side", ["front", "top", "bottom"])
@pytest.mark.parametrize("flaw", FLAWS)
def test_a_flaw_changes_the_picture(flaw, side):
    for seed, shape in enumerate(SHAPES):
        vase = Vase(np.random.default_rng(seed), (shape,))
        # both draw the same conditions first, so that only the flaw differs
        good, bad = (
            vase.photograph(side, which, 128, np.random.default_rng(7)).astype(float) for which in (None, flaw)
        )
        # more than grain: in one pixel of a hundred the colour is another
        assert (np.abs(good - bad).max(2) > 25).mean() > 0.01, shape
    assert bad.shape == (128, 128, 3)


def test_more_shared_than_raw_vases_is_refused(tmp_path):
    with pytest.raises(KilnError, match="shared_vases"):
        draw(tmp_path / "demo", shared_vases=9)


def test_a_failed_run_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("stopped")

    monkeypatch.setattr(draw_vases.tables, "write_table", fail)
    with pytest.raises(RuntimeError):
        draw(tmp_path / "demo", vases=1, labelled_vases=1, shared_vases=0, clip_vases=1)
    assert list(tmp_path.iterdir()) == []


def test_pictures_are_what_the_settings_say(drawn):
    with Image.open(next((drawn / "images").iterdir())) as image:
        assert image.size == (64, 64) and image.mode == "RGB" and image.format == "JPEG"


@pytest.mark.slow
def test_the_small_clip_loads_as_users_load_it(drawn, tmp_path):
    open_clip = pytest.importorskip("open_clip")
    from scripts.demo import train_clip

    small = ["vision_width=8", "epochs=2", "batch_size=4", "text_layers=1", "embed_dim=16"]
    for name in ("one", "two"):
        arguments = ["--data", str(drawn), "--output-folder", str(tmp_path / name), "--threads", "1"]
        arguments += ["--meta", str(tmp_path / name / "meta.json")]
        train_clip.main([*arguments, *(word for item in small for word in ("--settings", item))])
    first, second = ((tmp_path / name / train_clip.WEIGHTS).read_bytes() for name in ("one", "two"))
    assert first == second
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'one'}")
    tokens = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'one'}")(["an intact vase", "a broken vase"])
    assert tokens.shape == (2, 24) and model.encode_text(tokens).shape == (2, 16)
    metrics = json.loads((tmp_path / "one" / "metrics.json").read_text())
    assert metrics["untrained"]["pictures"] == metrics["held_out"]["pictures"] == 6


def test_too_few_pictures_for_a_batch_is_said(drawn, tmp_path):
    pytest.importorskip("open_clip")
    from scripts.demo import train_clip

    arguments = ["--data", str(drawn), "--output-folder", str(tmp_path / "clip"), "--meta", str(tmp_path / "m.json")]
    with pytest.raises(KilnError, match="batch_size"):
        train_clip.main([*arguments, "--threads", "1"])
