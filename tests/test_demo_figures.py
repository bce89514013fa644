"""The demo's figures: equal bytes from equal settings, captions that tell the truth, real shards with their faults."""

import io
import json
import re
import tarfile

import numpy as np
import pandas as pd
import pytest
import webdataset
from PIL import Image
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from scripts.common.errors import KilnError
from scripts.common.retrieval import recall_at_k
from scripts.demo import draw_figures
from scripts.demo.settings import FiguresSettings

SMALL = {"figures": 120, "samples_per_shard": 20, "flawed": 0.3, "seed": 3}
NUMBERS = {"no": 0, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6}
# what a reader takes from the words, apart from the tables that the captions are made of
KINDS = {
    "line chart": r"line (chart|graph|plot)|time course",
    "bar chart": r"bar (chart|graph|plot)",
    "scatter plot": r"scatter|dot plot",
    "histogram": r"histogram|frequency",
    "gel": r"\bgel\b|blot",
    "microscopy": r"microscop|micrograph",
}
FORMS = {
    "line chart": {"rising": "rising|increas|up", "falling": "falling|decreas|down", "peaked": "peak|highest",
                   "dipping": "dip|lowest"},
    "bar chart": {"rising": "rising|increas|last being the longest", "falling": "falling|decreas|first being",
                  "peaked": "middle", "equal": "equal|same"},
    "scatter plot": {"positive": "positive", "negative": "negative", "none": "without|uncorrelated"},
    "histogram": {"symmetric": "symmetric|bell", "left-skewed": "left", "right-skewed": "right",
                  "bimodal": "bimodal|two peaks"},
    "gel": {"rising": "stronger|increas", "falling": "weaker|decreas", "equal": "equal", "gap": "absent|empty"},
    "microscopy": {"round": "round|spherical", "elongated": "elongated|spindle", "branched": "branched|star"},
}  # fmt: skip
STYLES = {
    "line chart": {"plain": "solid|unbroken", "dashed": r"dashed|\bbroken", "marked": "marked|knotted"},
    "bar chart": {"vertical": "vertical|upright", "horizontal": "horizontal|sideways"},
    "scatter plot": {"discs": "discs|circles", "squares": "squares", "crosses": "crosses"},
    "histogram": {"filled": "filled|solid", "outlined": "outlined|open"},
    "gel": {"one row": "one band|single", "two rows": "two bands|double", "three rows": "three bands|triple"},
    "microscopy": {"sparse": "few|sparse", "dense": "many|dense", "clustered": "clustered|aggregated"},
}
INKS = "red|blue|green|orange|purple|black|grey|brown"


def draw(folder, **changes):
    meta = folder.with_name(f"{folder.name}.meta.json")
    arguments = ["--output-folder", str(folder), "--settings", json.dumps(changes), "--meta", str(meta)]
    draw_figures.main([*arguments, "--threads", "1"])
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return draw(tmp_path_factory.mktemp("demo") / "draw", **SMALL)


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    return draw(tmp_path_factory.mktemp("demo") / "draw", figures=800)


def truth(folder):
    return pd.read_parquet(folder / "truth.parquet")


def shards(folder):
    """{place: [path of its shards]}."""
    return {
        "local": sorted((folder / "local").iterdir()),
        "hub": sorted((folder / "hub/datasets/kiln/figures").iterdir()),
    }


def contents(folder):
    """{key: {ending: bytes}} of all shards."""
    found = {}
    for path in sum(shards(folder).values(), []):
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, end = member.name.partition(".")
                assert end not in found.setdefault(key, {})
                found[key][end] = tar.extractfile(member).read()
    return found


def only(text, patterns):
    """The one name whose pattern the text has."""
    (name,) = [name for name, pattern in patterns.items() if re.search(pattern, text)]
    return name


def test_equal_settings_give_equal_bytes(small, tmp_path):
    again = draw(tmp_path / "again", **SMALL)
    assert (again / "files.json").read_bytes() == (small / "files.json").read_bytes()
    other = draw(tmp_path / "other", **{**SMALL, "seed": 4})
    assert (other / "files.json").read_bytes() != (small / "files.json").read_bytes()


def test_the_number_of_processes_decides_no_byte(small, tmp_path):
    (tmp_path / "two").mkdir()
    draw_figures.write_demo(tmp_path / "two", FiguresSettings(**SMALL), processes=2)
    assert (tmp_path / "two/files.json").read_bytes() == (small / "files.json").read_bytes()


def test_files_json_lists_every_file(small):
    listing = json.loads((small / "files.json").read_text())
    files = {str(p.relative_to(small)): p.stat().st_size for p in small.rglob("*") if p.is_file()}
    files.pop("files.json")
    assert {name: record["bytes"] for name, record in listing.items()} == files


def test_articles_are_whole_and_a_fifth_of_them_lies_here(many):
    frame = truth(many)
    assert len(frame) == 800 and frame["key"].is_unique
    assert frame["key"].str.fullmatch(r"\d{5}-PMC\d{7}-[0-3]-[0-9a-f]{8}").all()
    assert (frame["key"].str.split("-").str[1] == frame["article"]).all()
    places = frame.groupby("article")["place"].agg(["nunique", "first", "size"])
    assert (places["nunique"] == 1).all() and places["size"].between(1, 4).all() and places["size"].nunique() == 4
    assert (places["first"] == "local").mean() == pytest.approx(0.2, abs=0.001)
    # one distribution: no kind is much more common in one place
    shares = pd.crosstab(frame["place"], frame["panel_type"], normalize="index")
    assert shares.min().min() > 0.09 and (shares.loc["local"] - shares.loc["hub"]).abs().max() < 0.08


def test_captions_say_what_is_true(many):
    frame = truth(many)
    assert frame["caption"].nunique() > 0.995 * len(frame)
    letters = 0
    for row in frame.rename(columns={"count": "number"}).itertuples():  # a tuple's count is its method
        assert row.topic.lower() in row.caption.lower()
        text = re.sub(re.escape(row.topic), "", row.caption, flags=re.IGNORECASE)
        prefix = re.match(r"\(([A-D])\) |([A-D])[.:] |Panel ([A-D]): ", text)
        assert (next(filter(None, prefix.groups())) if prefix else "") == row.letter
        letters += bool(prefix)
        text = text[prefix.end() if prefix else 0 :].lower()
        assert only(text, KINDS) == row.panel_type
        assert only(text, FORMS[row.panel_type]) == row.form
        assert only(text, STYLES[row.panel_type]) == row.style
        assert re.findall(rf"\b({INKS})\b", text) == row.colours.split(", ")
        things = r"\b(\w+) (?:lanes|groups?|pairs|solid|unbroken|dashed|broken|marked|knotted|vertical|upright|" \
                 rf"horizontal|sideways|{INKS})\b"  # fmt: skip
        counted = [NUMBERS[word] for word in re.findall(things, text) if word in NUMBERS]
        assert counted == ([row.number] if row.number else [])
    assert 0.3 < letters / len(frame) < 0.5


def test_pictures_show_the_colours_and_the_letter(many):
    hues = {"red": 255, "orange": 22, "green": 85, "blue": 155, "purple": 195}  # of Pillow's 0 to 255
    frame, files, by_chance = truth(many), contents(many), []
    for row in frame[frame["flaw"] != "broken image"].query("flaw != 'small image'").itertuples():
        picture = Image.open(io.BytesIO(files[row.key]["jpg"]))
        hue, saturation, value = np.moveaxis(np.asarray(picture.convert("HSV"), int), -1, 0)
        strong = (saturation > 85) & (value > 80)
        for colour in set(row.colours.split(", ")) & set(hues):
            near = np.abs((hue - hues[colour] + 128) % 256 - 128) < 18
            assert (strong & near).sum() > 10, row
        corner = np.asarray(picture.convert("L"))[:14, :14]
        lettered = (corner < 110).sum() > 8 and (corner > 200).sum() > 40
        assert lettered or not row.letter, row
        by_chance.append(lettered and not row.letter)  # a mark lies in the corner
    assert np.mean(by_chance) < 0.03


def test_trivial_features_find_little(many):
    """Ridge regression from mean colour, sides and bytes of a picture to the words of its caption; and text length."""
    frame, files = truth(many).query("flaw == ''").reset_index(drop=True), contents(many)
    rows = []
    for key in frame["key"]:
        image = Image.open(io.BytesIO(files[key]["jpg"]))
        rows.append([*np.asarray(image).mean(axis=(0, 1)), *image.size, len(files[key]["jpg"])])
    words = TfidfVectorizer().fit_transform(frame["caption"]).toarray()
    folds = GroupKFold(5)
    model = make_pipeline(StandardScaler(), Ridge(1.0))
    guessed = cross_val_predict(model, np.array(rows), words, groups=frame["article"], cv=folds)
    test = next(folds.split(words, groups=frame["article"]))[1]
    found = recall_at_k(guessed[test] @ words[test].T, (5,))["row_to_column"]
    assert found["recall"][5] < 5 * found["chance"][5]
    lengths = frame["caption"].str.len().to_numpy()[:, None]
    kinds = cross_val_predict(
        LogisticRegression(max_iter=1000), lengths, frame["panel_type"], groups=frame["article"], cv=folds
    )
    assert (kinds == frame["panel_type"]).mean() < 0.4


def test_shards_are_laid_out_as_the_real_ones(many):
    frame = truth(many).set_index("key")
    for place, paths in shards(many).items():
        for number, path in enumerate(paths):
            with tarfile.open(path) as tar:
                names = [member.name for member in tar]
            keys = list(dict.fromkeys(name.partition(".")[0] for name in names))
            assert set(frame.loc[keys, "shard"]) == {path.name} and set(frame.loc[keys, "place"]) == {place}
            assert re.fullmatch(r"\d{3}_\d{9}\.tar", path.name) and len(keys) <= 200
            full = [f"{key}.{end}" for key in keys for end in ("jpg", "json", "txt")
                    if end != "json" or frame.loc[key, "flaw"] != "no json"]  # fmt: skip
            assert sorted(full) == sorted(names)
            if number:  # webdataset, which expects a key's members in a row, reads them all
                assert full == names
                read = [*webdataset.WebDataset(str(path), shardshuffle=False)]
                assert [one["__key__"] for one in read] == keys
            else:
                assert [name for name in names if name.startswith((keys[2], keys[3]))] == [
                    f"{key}.{end}" for key, end in zip((keys[2], keys[3], *[keys[2]] * 2, *[keys[3]] * 2),
                                                       ("jpg", "jpg", *("json", "txt") * 2), strict=True)]  # fmt: skip


def test_flaws_are_as_the_truth_says(small):
    frame, files = truth(small), contents(small)
    assert set(frame["key"]) == set(files)
    for place, part in frame.groupby("place"):
        counts = part["flaw"].value_counts()
        assert counts.drop("").sum() == round(0.3 * len(part)), place
        assert set(counts.index) == {"", *draw_figures.FLAWS}
        assert counts.drop("").max() - counts.drop("").min() <= 1
    for row in frame.itertuples():
        parts = files[row.key]
        broken = ("json" not in parts, flaw_of_text(parts["txt"], row.caption), flaw_of_image(parts))
        found = ["no json"] * broken[0] + [flaw for flaw in broken[1:] if flaw]
        assert found == ([row.flaw] if row.flaw else [])


def flaw_of_text(text, caption):
    try:
        text = text.decode("utf-8")
    except UnicodeDecodeError:
        return "caption not utf-8"
    if text.strip() in ("", "No caption found"):
        return "no caption found" if text.strip() else "empty caption"
    assert text == caption
    return ""


def flaw_of_image(parts):
    try:
        image = Image.open(io.BytesIO(parts["jpg"]))
        image.load()
    except OSError:
        return "broken image"
    if "json" in parts:
        assert json.loads(parts["json"])["image_size"] == list(image.size)
    return "small image" if min(image.size) <= 20 else ""


def test_json_has_the_fields_of_the_data_set(small):
    frame = truth(small).set_index("key")
    for key, parts in contents(small).items():
        if "json" not in parts:
            continue
        facts = json.loads(parts["json"])
        assert facts["image_panel_type"] == frame.loc[key, "panel_type"]
        assert facts["image_panel_subtype"] == frame.loc[key, "panel_subtype"]
        assert facts["article_accession_id"] == frame.loc[key, "article"]
        fields = "image_file_name image_cluster_id image_hash image_label_id image_panel_type image_panel_subtype " \
                 "image_primary_label image_secondary_label image_size image_set image_context article_accession_id " \
                 "article_title article_journal article_date article_abstract article_mesh_terms article_keywords " \
                 "article_reference_ids article_reference_count article_reference_list article_subject " \
                 "article_citation article_license article_text"  # fmt: skip
        assert set(facts) == set(fields.split())


def test_settings_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(KilnError, match="max_side 50 must be at least min_side 96"):
        draw(tmp_path / "draw", max_side=50)
    with pytest.raises(KilnError, match="repo"):
        draw(tmp_path / "draw", repo="../outside/x")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_run_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("stopped")

    monkeypatch.setattr(draw_figures.tables, "write_table", fail)
    with pytest.raises(RuntimeError):
        draw(tmp_path / "draw", figures=8, samples_per_shard=4)
    assert list(tmp_path.iterdir()) == []
