"""The demo's slides: equal bytes from equal settings, the truth is in the tiles and in the text, no shortcuts."""

import json
from collections import Counter

import h5py
import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from scripts.coca.slides import open_slide, read_tiles
from scripts.coca.texts import class_of
from scripts.common.errors import KilnError
from scripts.demo import draw_slides
from scripts.demo.settings import SlidesSettings
from scripts.demo.slides import DIAGNOSES, GRADES, SITES

SMALL = {"slides": 30, "patients": 20, "dim": 64, "max_tiles": 200, "seed": 3}
KEYS = ("embeddings", "features")


def draw(folder, **changes):
    meta = folder.with_name(f"{folder.name}.meta.json")
    arguments = ["--output-folder", str(folder), "--settings", json.dumps(changes), "--meta", str(meta)]
    draw_slides.main([*arguments, "--threads", "1"])
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return draw(tmp_path_factory.mktemp("demo") / "draw", **SMALL)


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """As many slides as the default has, but narrow and short ones."""
    return draw(tmp_path_factory.mktemp("demo") / "draw", dim=192, max_tiles=400)


def truth(folder):
    return pd.read_parquet(folder / "truth.parquet")


def texts(folder):
    return json.loads((folder / "labels.json").read_text(encoding="utf-8"))


def means(folder):
    """Mean tile of each slide, [slides,dim], in the order of the truth."""
    slides = (open_slide(folder / "slides" / f"{name}.h5", KEYS) for name in truth(folder)["slide"])
    return np.stack([read_tiles(slide).astype(np.float64).mean(axis=0) for slide in slides])


def test_equal_settings_give_equal_bytes(small, tmp_path):
    again = draw(tmp_path / "again", **SMALL)
    assert (again / "files.json").read_bytes() == (small / "files.json").read_bytes()
    other = draw(tmp_path / "other", **{**SMALL, "seed": 4})
    assert (other / "files.json").read_bytes() != (small / "files.json").read_bytes()


def test_the_number_of_processes_decides_no_byte(small, tmp_path):
    (tmp_path / "two").mkdir()
    draw_slides.write_demo(tmp_path / "two", SlidesSettings(**SMALL), processes=2)
    assert (tmp_path / "two/files.json").read_bytes() == (small / "files.json").read_bytes()


def test_files_json_lists_every_file(small):
    listing = json.loads((small / "files.json").read_text())
    files = {str(p.relative_to(small)): p.stat().st_size for p in small.rglob("*") if p.is_file()}
    files.pop("files.json")
    assert {name: record["bytes"] for name, record in listing.items()} == files


def test_slides_come_in_the_layouts_found_in_practice(small):
    found = Counter()
    for _, row in truth(small).iterrows():
        path = small / "slides" / f"{row['slide']}.h5"
        slide = open_slide(path, KEYS)
        assert (slide.tiles, slide.dim, slide.dtype) == (row["tiles"], 64, "float16")
        assert np.isfinite(read_tiles(slide)).all()
        with h5py.File(path) as file:
            assert "coords" not in file or file["coords"].shape == (slide.tiles, 2)
            found.update([slide.key, f"batched {slide.batched}", f"coords {'coords' in file}"])
    assert all(found[kind] >= 5 for kind in (*KEYS, "batched True", "batched False", "coords True", "coords False"))


def test_every_patient_has_slides_of_one_diagnosis_and_site(many):
    frame = truth(many).merge(pd.read_csv(many / "patients.csv"), on="slide")
    assert len(frame) == 400 and frame["patient"].nunique() == 250
    assert (frame["patient"].value_counts() > 1).sum() > 80
    assert frame.groupby("patient")[["diagnosis", "site"]].nunique().eq(1).all().all()
    assert frame["tiles"].between(50, 400).all()
    assert frame["diagnosis"].value_counts(normalize=True).between(0.1, 0.3).all()


def test_texts_say_what_is_true_in_two_languages(many):
    written, frame = texts(many), truth(many).set_index("slide")
    assert sorted(written) == sorted(frame.index)
    chinese = 0
    for slide, text in written.items():
        row = frame.loc[slide]
        assert class_of(text, DIAGNOSES) == row["diagnosis"]
        assert class_of(text, {name: [name, term] for name, term in SITES.items()}) == row["site"]
        assert class_of(text, {name: [name, term] for name, term in GRADES.items()}) == row["grade"]
        chinese += not text.isascii()
    assert 0.4 < chinese / len(written) < 0.6
    times = Counter(written.values())
    assert len(times) > 150 and sum(n > 1 for n in times.values()) > 30  # equal texts are to be met, too


def test_the_mean_tile_tells_most_and_trivial_features_nothing_of_the_diagnosis(many):
    frame = truth(many).merge(pd.read_csv(many / "patients.csv"), on="slide")
    mean = means(many)
    trivial = np.stack([frame["tiles"], np.linalg.norm(mean, axis=1)], axis=1)
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=1000))

    def right(features, column):
        folds = GroupKFold(5)
        answers = cross_val_predict(model, features, frame[column], groups=frame["patient"], cv=folds)
        return (answers == frame[column]).mean()

    most = frame["diagnosis"].value_counts(normalize=True).max()
    assert 0.7 < right(mean, "diagnosis") < 0.98
    assert right(mean, "site") > 0.8 and right(mean, "grade") > 0.6
    assert right(trivial, "diagnosis") < most + 0.05


def test_settings_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(KilnError, match="slides 5 must be at least patients 9"):
        draw(tmp_path / "draw", slides=5, patients=9)
    with pytest.raises(KilnError, match="max_tiles 3 must be at least min_tiles 50"):
        draw(tmp_path / "draw", max_tiles=3)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_run_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("stopped")

    monkeypatch.setattr(draw_slides.tables, "write_table", fail)
    with pytest.raises(RuntimeError):
        draw(tmp_path / "draw", slides=2, patients=1, dim=4)
    assert list(tmp_path.iterdir()) == []
