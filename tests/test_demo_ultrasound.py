"""The demo's ultrasound: equal bytes from equal settings, planted twins and no others, signs that fit the class."""

import io
import itertools
import json
import re
from collections import Counter

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy import ndimage
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, roc_auc_score
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from scripts.busi.settings import PROMPT, ListSettings
from scripts.common.errors import KilnError
from scripts.common.trivial import image_features
from scripts.demo import draw_ultrasound
from scripts.demo.settings import UltrasoundSettings
from scripts.demo.ultrasound import CLASSES, draw_frame, look, near_twin

NAME = re.compile(r"^(normal|benign|malignant)/(\1) \((\d+)\)\.png$")
SMALL = {"normal": 17, "benign": 21, "malignant": 19, "identical": 4, "near": 20, "conflicts": 2, "second_lesion": 0.3}


def draw(folder, **changes):
    settings = json.dumps(changes)
    meta = folder.with_name(f"{folder.name}.meta.json")
    draw_ultrasound.main(
        ["--output-folder", str(folder), "--settings", settings, "--meta", str(meta), "--threads", "1"],
    )
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return draw(tmp_path_factory.mktemp("demo") / "draw", **SMALL, seed=3)


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    return draw(tmp_path_factory.mktemp("demo") / "draw")


def pictures(folder):
    """{path below images/: grey uint8 picture}, without masks."""
    found = (p for p in (folder / "images").rglob("*.png") if "_mask" not in p.name)
    return {str(p.relative_to(folder / "images")): np.asarray(Image.open(p).convert("L")) for p in sorted(found)}


def masks_of(folder, path):
    stem = (folder / "images" / path).with_suffix("")
    return [p for i in range(9) if (p := stem.with_name(f"{stem.name}_mask{f'_{i}' if i else ''}.png")).exists()]


def planted_pairs(folder):
    table = pd.read_parquet(folder / "planted.parquet")
    return table, set(zip(table["first"], table["second"], strict=True))


def correlations(found, reduce=Image.Resampling.BICUBIC):
    """Correlations of all pairs' thumbnails, [n, n]."""
    resized = [Image.fromarray(p).resize((64, 64), reduce) for p in found.values()]
    return np.corrcoef([np.asarray(image, float).ravel() for image in resized])


def groups_of(paths, pairs):
    group = {path: path for path in paths}
    for first, second in sorted(pairs):
        group = {path: group[first] if of == group[second] else of for path, of in group.items()}
    return [group[path] for path in paths]


def test_equal_settings_give_equal_bytes(small, tmp_path):
    again = draw(tmp_path / "again", **SMALL, seed=3)
    assert (again / "files.json").read_bytes() == (small / "files.json").read_bytes()
    other = json.loads((draw(tmp_path / "other", **SMALL, seed=4) / "files.json").read_text())
    before = json.loads((small / "files.json").read_text())
    same = {name for name, record in other.items() if before.get(name) == record}
    assert all("normal" in name and "_mask" in name for name in same)  # black ones of equal size


def test_the_number_of_processes_decides_no_byte(small, tmp_path):
    (tmp_path / "two").mkdir()
    draw_ultrasound.write_demo(tmp_path / "two", UltrasoundSettings(**SMALL, seed=3), processes=2)
    assert (tmp_path / "two" / "files.json").read_bytes() == (small / "files.json").read_bytes()


def test_files_json_lists_every_file(small):
    listing = json.loads((small / "files.json").read_text())
    files = {str(p.relative_to(small)): p.stat().st_size for p in small.rglob("*") if p.is_file()}
    files.pop("files.json")
    assert {name: record["bytes"] for name, record in listing.items()} == files


def test_names_and_formats_are_those_of_busi(small):
    paths = list(pictures(small))
    assert all(NAME.match(path) for path in paths)
    numbers = {name: sorted(int(NAME.match(p)[3]) for p in paths if p.startswith(f"{name}/")) for name in CLASSES}
    assert numbers == {name: list(range(1, SMALL[name] + 1)) for name in CLASSES}
    assert len(list((small / "images").rglob("*.png"))) == sum(1 + len(masks_of(small, path)) for path in paths)
    sizes = set()
    for path in paths:
        with Image.open(small / "images" / path) as image:
            assert (image.mode, image.format) == ("RGB", "PNG")
            assert np.ptp(np.asarray(image), axis=2).max() == 0  # grey
            sizes.add(image.size)
    assert len(sizes) > 20
    assert all(112 <= side <= 171 for size in sizes for side in size)


def test_masks_fit_the_lesions(small):
    found = pictures(small)
    darker, counts = [], Counter()
    for path, picture in found.items():
        masks = [np.asarray(Image.open(p)) for p in masks_of(small, path)]
        assert all(mask.dtype == np.uint8 and mask.shape == picture.shape for mask in masks)
        assert all(set(np.unique(mask)) <= {0, 255} for mask in masks)
        name = path.split("/")[0]
        if name == "normal":
            assert len(masks) == 1 and not masks[0].any()
            continue
        counts[len(masks)] += 1
        assert np.sum([mask > 0 for mask in masks], axis=0).max() == 1  # no two lesions in one place
        for mask in masks:
            assert ndimage.label(mask)[1] == 1 and 0.005 < (mask > 0).mean() < 0.25
            near = ndimage.binary_dilation(mask, iterations=9) & ~ndimage.binary_dilation(mask, iterations=2)
            darker.append(np.median(picture[near]) - np.median(picture[mask > 0]))
    assert counts[1] > counts[2] > 0 and set(counts) == {1, 2}
    assert np.mean(np.array(darker) > 10) > 0.9 and np.median(darker) > 40


def check_twins(folder, values):
    found = pictures(folder)
    table, pairs = planted_pairs(folder)
    alike = correlations(found)
    paths = list(found)
    by_number = list(itertools.combinations(range(len(paths)), 2))
    twins = {(paths[i], paths[j]) for i, j in by_number if alike[i, j] >= 0.98}
    assert twins == pairs
    assert min(alike[i, j] for i, j in by_number if (paths[i], paths[j]) in pairs) >= 0.985
    assert max(alike[i, j] for i, j in by_number if (paths[i], paths[j]) not in pairs) < 0.93

    same = {(a, b) for a, b in itertools.combinations(paths, 2) if np.array_equal(found[a], found[b])}
    kinds = table.set_index(["first", "second"])["kind"]
    assert same == {pair for pair in pairs if kinds[pair] == "identical"}
    assert set(kinds) == {"identical", "near"}
    files = {path: (folder / "images" / path).read_bytes() for path in paths}
    assert {files[a] == files[b] for a, b in same} == {True, False}
    for a, b in same:
        masks = [[p.read_bytes() for p in masks_of(folder, path)] for path in (a, b)]
        assert masks[0] == masks[1]

    assert (table["first"] < table["second"]).all()
    crossing = table["first"].str.split("/").str[0] != table["second"].str.split("/").str[0]
    assert (table["conflict"] == crossing).all() and crossing.sum() == values.conflicts
    crossed = {path.split("/")[0] for path in table.loc[crossing, ["first", "second"]].to_numpy().ravel()}
    assert crossed == {"benign", "malignant"}

    groups = Counter(groups_of(paths, pairs))
    assert len(paths) - len(groups) == values.identical + values.near + values.conflicts
    assert sum(n * (n - 1) // 2 for n in groups.values()) == len(pairs)  # transitively closed
    assert max(groups.values()) == 3


def test_twins_are_where_they_were_planted_and_nowhere_else(small):
    check_twins(small, UltrasoundSettings(**SMALL))


@pytest.mark.slow
def test_twins_of_the_default_size(full):
    check_twins(full, UltrasoundSettings())


@pytest.mark.parametrize("seed", range(6))
def test_a_near_twin_is_the_same_frame_but_not_the_same_pixels(seed):
    rng = np.random.default_rng(seed)
    frame = draw_frame("benign", False, seed % 2 == 0, 120, rng)
    second = near_twin(frame, [], rng)
    third = near_twin(frame, [second], rng)
    for one, other in itertools.combinations((frame, second, third), 2):
        assert correlations({0: one.pixels, 1: other.pixels})[0, 1] >= 0.985
        assert not np.array_equal(one.pixels, other.pixels)
    assert all(s > 0.95 * n for s, n in zip(second.pixels.shape, frame.pixels.shape, strict=True))
    assert all(mask.shape == second.pixels.shape and mask.any() for mask in second.masks)
    assert len(second.masks) == len(frame.masks)


def test_twins_of_one_frame_are_twins_of_each_other():
    twins = [draw_ultrasound.Twin("near", "normal")] * 12
    group = draw_ultrasound.draw_group("normal", 0, twins, UltrasoundSettings())
    grabbed = {i: np.asarray(Image.open(io.BytesIO(picture.png)).convert("L")) for i, picture in enumerate(group)}
    assert len(grabbed) == 13
    for reduce in (Image.Resampling.BOX, Image.Resampling.BILINEAR, Image.Resampling.LANCZOS):
        assert correlations(grabbed, reduce).min() >= 0.985


def test_no_twins_if_none_are_wanted(tmp_path):
    folder = draw(tmp_path / "draw", normal=2, benign=2, malignant=2, identical=0, near=0, conflicts=0)
    table, _ = planted_pairs(folder)
    assert list(table.columns) == ["first", "second", "kind", "conflict"] and table.empty
    assert len(pictures(folder)) == 6


def test_the_published_split_is_every_picture_once(small):
    classes = [name.casefold() for name in ListSettings().classes]
    rows = {side: json.loads((small / "published" / f"{side}.json").read_text()) for side in ("train", "test")}
    listed = [row["image"] for side in rows.values() for row in side]
    assert sorted(listed) == sorted(path[0].upper() + path[1:] for path in pictures(small))
    assert len(rows["test"]) == round(0.2 * len(listed))
    for row in (*rows["train"], *rows["test"]):
        assert list(row) == ["image", "text", "answer", "label"]
        assert row["answer"] == row["image"].split("/")[0] == ListSettings().classes[row["label"]]
        assert row["text"] == PROMPT
    assert tuple(classes) == CLASSES


@pytest.mark.slow
def test_the_published_split_leaks(full):
    _, pairs = planted_pairs(full)
    rows = json.loads((full / "published" / "test.json").read_text())
    tested = {row["image"].lower() for row in rows}
    leaked = {one for pair in pairs for one, other in (pair, pair[::-1]) if one in tested and other not in tested}
    assert len(leaked) >= 8
    assert {row["label"] for row in rows} == {0, 1, 2}


def below_against_beside(frame):
    """Mean grey right below the lesion less that beside it at the same depth."""
    mask = frame.masks[0]
    height, width = mask.shape
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    middle, half = columns.mean(), (columns[-1] - columns[0]) / 2
    strip = frame.pixels[rows[-1] + 4 : rows[-1] + 4 + height // 5].astype(float)
    away = np.abs(np.arange(width) - middle)
    return strip[:, away < 0.5 * half].mean() - strip[:, (away > 1.6 * half) & (away < 4 * half)].mean()


def height_to_width(frame):
    rows, columns = np.flatnonzero(frame.masks[0].any(1)), np.flatnonzero(frame.masks[0].any(0))
    return (rows[-1] - rows[0] + 1) / (columns[-1] - columns[0] + 1)


def smoothness(frame):
    """Overlap (intersection over union) of the mask with the ellipse of the same second moments."""
    mask = frame.masks[0]
    away = np.argwhere(mask) - np.argwhere(mask).mean(0)
    every = np.indices(mask.shape).reshape(2, -1).T - np.argwhere(mask).mean(0)
    ellipse = np.einsum("ni,ij,nj->n", every, np.linalg.inv(np.cov(away.T)), every).reshape(mask.shape) < 4
    return (ellipse & mask).sum() / (ellipse | mask).sum()


def lesions(ambiguous, count=60):
    return {
        name: [draw_frame(name, ambiguous, False, 144, np.random.default_rng([9, i, k])) for k in range(count)]
        for i, name in enumerate(("benign", "malignant"))
    }


def separation(frames, measure):
    """AUROC of `measure` for benign against malignant."""
    values = [measure(frame) for name in frames for frame in frames[name]]
    return roc_auc_score([name == "benign" for name in frames for _ in frames[name]], values)


def test_lesions_show_the_signs_of_their_class():
    frames = lesions(ambiguous=False)
    below = {name: np.array([below_against_beside(frame) for frame in frames[name]]) for name in frames}
    assert np.median(below["benign"]) > 15 and np.median(below["malignant"]) < -30
    assert np.mean(below["benign"] > 0) > 0.7 and np.mean(below["malignant"] < 0) > 0.9
    assert np.mean(below["benign"] < 8) > 0.05  # not every benign lesion enhances
    assert separation(frames, below_against_beside) > 0.95
    assert separation(frames, lambda frame: -height_to_width(frame)) > 0.95
    assert np.mean([height_to_width(frame) < 1 for frame in frames["benign"]]) > 0.95
    assert np.mean([height_to_width(frame) > 1 for frame in frames["malignant"]]) > 0.8
    assert separation(frames, smoothness) > 0.9


def test_ambiguous_lesions_are_harder_to_tell():
    frames = lesions(ambiguous=True)
    for measure in (below_against_beside, lambda frame: -height_to_width(frame), smoothness):
        assert 0.4 < separation(frames, measure) < 0.92


@pytest.mark.slow
def test_trivial_features_do_not_tell_the_class(full):
    found = pictures(full)
    labels = [CLASSES.index(path.split("/")[0]) for path in found]
    features = image_features([full / "images" / path for path in found])
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000, class_weight="balanced"))
    groups = groups_of(list(found), planted_pairs(full)[1])
    answers = cross_val_predict(model, features, labels, groups=groups, cv=GroupKFold(5))
    assert balanced_accuracy_score(labels, answers) <= 0.45


def test_speckle_is_rayleigh_distributed_and_wider_than_deep():
    envelope = look(np.ones((400, 400), np.float32), (0.6, 1.3), 0.0, np.random.default_rng(0))
    # mean over standard deviation of a Rayleigh distribution: sqrt(pi / (4 - pi)) = 1.913
    assert envelope.mean() / envelope.std() == pytest.approx(1.913, abs=0.03)
    deviation = envelope - envelope.mean()
    deep = (deviation[2:] * deviation[:-2]).mean() / deviation.var()
    wide = (deviation[:, 2:] * deviation[:, :-2]).mean() / deviation.var()
    assert wide > deep + 0.15


def test_more_twins_than_pictures_are_refused(tmp_path):
    with pytest.raises(KilnError, match="demo.ultrasound.malignant = 5 pictures are too few"):
        draw(tmp_path / "draw", malignant=5)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_run_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("stopped")

    monkeypatch.setattr(draw_ultrasound.tables, "write_table", fail)
    with pytest.raises(RuntimeError):
        draw(tmp_path / "draw", normal=1, benign=1, malignant=1, identical=0, near=0, conflicts=0)
    assert list(tmp_path.iterdir()) == []
