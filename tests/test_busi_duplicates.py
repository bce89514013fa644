"""Near-twins and equal pixels: against plain correlations, at any block size, and as tables and a sheet."""

import json
import shutil
import tracemalloc

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from vase_fixtures import picture, run, write

from scripts.busi import duplicates, find_duplicates, list_images
from scripts.common.errors import KilnError

CLASSES = ("Normal", "Benign", "Malignant")


def alike(count, seed=0, scenes=4, noise=20.0):
    """Thumbnails of a few scenes under noise: their correlations spread over 0.5 to 1."""
    rng = np.random.default_rng(seed)
    scene = rng.uniform(60, 190, (scenes, duplicates.VALUES))[rng.integers(scenes, size=count)]
    strength = rng.uniform(0, noise, (count, 1))
    return np.clip(scene + strength * rng.normal(size=scene.shape), 0, 255).astype(np.uint8)


def distinct(thumbs):
    """Pictures with these thumbnails, none with the pixels of another."""
    return duplicates.Pictures(thumbs, [f"pixels {i}" for i in range(len(thumbs))])


def correlations(thumbs):
    """Plain correlations of all pairs; of no pair twice, nor of a picture with itself."""
    return np.triu(np.corrcoef(thumbs.astype(float)), 1)


def as_set(pairs):
    return set(zip(pairs["first"].tolist(), pairs["second"].tolist(), strict=True))


# Thumbnails and pixels


def test_a_thumbnail_holds_the_mean_of_each_area(tmp_path):
    rng = np.random.default_rng(0)
    grey = rng.integers(0, 256, (256, 128), dtype=np.uint8)
    Image.fromarray(grey).save(tmp_path / "a.png")
    (made,) = duplicates.read(tmp_path, ["a.png"], 1).thumbnails
    means = grey.reshape(64, 4, 64, 2).mean(axis=(1, 3))
    assert made.dtype == np.uint8 and np.abs(made.reshape(64, 64) - means).max() <= 1


def test_any_size_and_any_colours_become_64_grey_squares(tmp_path):
    for i, (size, mode) in enumerate([((3, 5), "RGB"), ((64, 64), "L"), ((719, 190), "P"), ((40, 400), "RGBA")]):
        Image.effect_noise(size, 60).convert(mode).save(tmp_path / f"{i}.png")
    made = duplicates.read(tmp_path, [f"{i}.png" for i in range(4)], 2)
    assert made.thumbnails.shape == (4, 4096) and len(set(made.pixels)) == 4
    full = np.asarray(Image.open(tmp_path / "1.png")).reshape(-1)
    assert (made.thumbnails[1] == full).all()


def test_equal_pixels_are_known_whatever_the_file(tmp_path):
    grey = Image.open(picture(tmp_path / "a.png", seed=0, size=64)).convert("L")
    for i, (name, mode) in enumerate(
        [("a.png", "L"), ("b.png", "RGB"), ("c.bmp", "L"), ("d.tif", "RGB"), ("e.png", "RGBA")]
    ):
        grey.convert(mode).save(tmp_path / name, **({"compress_level": i} if name.endswith("png") else {}))
    other = np.array(grey)
    other[0, 0] ^= 1
    Image.fromarray(other).save(tmp_path / "f.png")
    names = ["a.png", "b.png", "c.bmp", "d.tif", "e.png", "f.png"]
    assert len({(tmp_path / name).read_bytes() for name in names}) == 6
    pixels = duplicates.read(tmp_path, names, 1).pixels
    assert len(set(pixels[:5])) == 1 and pixels[5] != pixels[0]


def test_equal_bytes_in_another_shape_are_other_pixels(tmp_path):
    for name, size in (("a.png", (20, 30)), ("b.png", (30, 20)), ("c.png", (20, 30))):
        Image.new("RGB", size, (9, 9, 9)).save(tmp_path / name)
    a, b, c = duplicates.read(tmp_path, ["a.png", "b.png", "c.png"], 1).pixels
    assert a == c != b


def test_an_image_that_is_gone_or_broken_by_now_is_named(tmp_path):
    with pytest.raises(KilnError, match="a.png: readable when it was listed, now: .*No such file"):
        duplicates.read(tmp_path, ["a.png"], 1)
    (tmp_path / "a.png").write_text("x")
    with pytest.raises(KilnError, match="a.png: readable when it was listed, now: not an image"):
        duplicates.read(tmp_path, ["a.png"], 1)


# Similar pairs


@pytest.mark.parametrize("threshold", [0.5, 0.9, 0.98])
def test_pairs_and_similarities_are_those_of_plain_correlations(threshold):
    thumbs = alike(90)
    i, j, similarity = duplicates.similar_pairs(thumbs, None, threshold, 16)
    plain = correlations(thumbs)
    assert set(zip(i, j, strict=True)) == set(zip(*np.nonzero(plain >= threshold), strict=True)) and len(i) > 10
    np.testing.assert_allclose(similarity, plain[i, j], atol=1e-12)
    assert (np.diff(i * 90 + j) > 0).all()


def test_pairs_between_two_sets_are_those_of_plain_correlations():
    thumbs = alike(90)
    i, j, similarity = duplicates.similar_pairs(thumbs[:35], thumbs[35:], 0.95, 8)
    plain = np.corrcoef(thumbs.astype(float))[:35, 35:]
    assert set(zip(i, j, strict=True)) == set(zip(*np.nonzero(plain >= 0.95), strict=True)) and len(i) > 10
    np.testing.assert_allclose(similarity, plain[i, j], atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(block=st.integers(1, 70), threshold=st.floats(0.3, 1), seed=st.integers(0, 5))
def test_no_block_size_changes_a_bit(block, threshold, seed):
    thumbs = alike(50, seed)
    whole, parts = (duplicates.similar_pairs(thumbs, None, threshold, b) for b in (4096, block))
    assert all(np.array_equal(a, b) for a, b in zip(whole, parts, strict=True))
    ends = duplicates.similar_pairs(thumbs[:20], thumbs[20:], threshold, block)
    across = (whole[0] < 20) & (whole[1] >= 20)
    assert all(np.array_equal(a[across], b) for a, b in zip(whole, (ends[0], ends[1] + 20, ends[2]), strict=True))


def test_a_pair_at_the_threshold_is_found_and_one_below_is_not():
    thumbs = alike(40)
    i, j, similarity = duplicates.similar_pairs(thumbs, None, 0.9, 4096)
    assert len(i) > 20
    for one, other, value in zip(i, j, similarity, strict=True):
        pair = thumbs[[one, other]]
        assert len(duplicates.similar_pairs(pair, None, value)[0]) == 1
        if value < 1:
            assert len(duplicates.similar_pairs(pair, None, np.nextafter(value, 2))[0]) == 0


def test_contrast_and_brightness_do_not_matter_and_inversion_does():
    rng = np.random.default_rng(0)
    base = rng.integers(0, 100, duplicates.VALUES)
    thumbs = np.stack([base, 2 * base + 40, 200 - base]).astype(np.uint8)
    i, j, similarity = duplicates.similar_pairs(thumbs, None, 1e-6)
    assert (i.tolist(), j.tolist()) == ([0], [1]) and similarity[0] == pytest.approx(1, abs=1e-15)
    assert similarity[0] <= 1


def test_the_faintest_picture_is_compared_as_well_as_others():
    """One grey level in one of 4096 places, on a bright ground: where float32 has fewest digits."""
    thumbs = np.full((3, duplicates.VALUES), 255, np.uint8)
    thumbs[:2, 17] = 254
    thumbs[2, 18] = 254
    i, j, similarity = duplicates.similar_pairs(thumbs, None, 1.0)
    assert (i.tolist(), j.tolist(), similarity.tolist()) == ([0], [1], [1.0])


def test_pictures_of_one_grey_level_are_similar_to_none():
    thumbs = np.zeros((4, duplicates.VALUES), np.uint8)
    thumbs[1], thumbs[2] = 77, alike(1)
    assert len(duplicates.similar_pairs(thumbs, None, 1e-9)[0]) == 0


def test_of_no_picture_or_one_there_are_no_pairs():
    for count in (0, 1):
        found = duplicates.find(distinct(alike(1)[:count]), 0.98)
        assert len(found.groups) == count and found.pairs.empty and found.total == 0
        none = duplicates.pairs_between(distinct(alike(1)[:count]), distinct(alike(5)[:0]), 0.9)
        assert none.empty and list(none.columns) == ["left", "right", "similarity", "identical"]


# Groups


def plain_groups(count, pairs):
    """The first member of each one's group, by walking."""
    neighbours = {i: {i} for i in range(count)}
    for a, b in pairs:
        neighbours[a].add(b)
        neighbours[b].add(a)
    first = {}
    for start in range(count):
        todo = [start]
        while todo:
            one = todo.pop()
            if one not in first:
                first[one] = start
                todo += neighbours[one]
    return [first[i] for i in range(count)]


def copied(count, seed):
    """Pictures some of which are copies of others, some of those of one grey level; with their plain pairs."""
    rng = np.random.default_rng(seed)
    thumbs, pixels = alike(count, seed), [f"pixels {i}" for i in range(count)]
    thumbs[:3] = 50
    for i in np.flatnonzero(rng.random(count) < 0.4):
        source = int(rng.integers(count))
        thumbs[i], pixels[i] = thumbs[source], pixels[source]
    with np.errstate(invalid="ignore"):
        plain = np.nan_to_num(correlations(thumbs))
    return duplicates.Pictures(thumbs, pixels), plain


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), threshold=st.sampled_from([0.9, 0.98, 0.995]), block=st.integers(1, 40))
def test_groups_are_chains_of_similar_or_equal_pictures(seed, threshold, block):
    pictures, plain = copied(30, seed)
    equal = {(i, j) for j in range(30) for i in range(j) if pictures.pixels[i] == pictures.pixels[j]}
    similar = set(zip(*(ends.tolist() for ends in np.nonzero(plain >= threshold)), strict=True))
    found = duplicates.find(pictures, threshold, block)
    assert as_set(found.pairs) == equal | similar
    assert as_set(found.pairs[found.pairs["identical"]]) == equal
    assert (found.pairs.loc[found.pairs["identical"], "similarity"] == 1).all()
    assert (found.total, found.identical) == (len(equal | similar), len(equal))
    assert found.groups.tolist() == plain_groups(30, equal | similar)
    assert (found.pairs["first"] < found.pairs["second"]).all()


def test_a_chain_is_one_group_though_its_ends_differ():
    rng = np.random.default_rng(0)
    steps = rng.normal(0, 1, (12, duplicates.VALUES)).cumsum(axis=0)  # each resembles the next most
    thumbs = np.clip(128 + 12 * (steps + 4 * rng.normal(size=duplicates.VALUES)), 0, 255).astype(np.uint8)
    plain = correlations(thumbs)
    threshold = np.diag(plain, 1).min() - 1e-9
    assert plain[0, -1] < threshold
    assert set(duplicates.find(distinct(thumbs), threshold, block=2).groups) == {0}


@pytest.mark.parametrize("block", [7, 512])
def test_where_pairs_are_too_many_the_most_similar_are_listed_and_the_rest_counted(block):
    pictures, plain = copied(40, 1)
    whole = duplicates.find(pictures, 0.5)
    some = duplicates.find(pictures, 0.5, block, most=60)
    assert whole.total > 60
    assert (some.total, some.identical) == (whole.total, whole.identical)
    assert (some.groups == whole.groups).all()
    first = pd.Series(range(40)).groupby(pictures.pixels).transform("min")
    stars = {(first[i], i) for i in range(40) if first[i] != i}
    standing = whole.pairs[~whole.pairs["identical"] & (first[whole.pairs["first"]].to_numpy() == whole.pairs["first"])]
    standing = standing[first[standing["second"]].to_numpy() == standing["second"]]
    best = standing.sort_values(["similarity", "first", "second"], ascending=[False, True, True])
    assert as_set(some.pairs) == stars | as_set(best.head(60 - len(stars))) and len(some.pairs) == 60


def test_a_hundred_thousand_equal_pictures_cost_next_to_nothing():
    count = 100_000
    pictures = duplicates.Pictures(np.broadcast_to(alike(1), (count, 4096)), ["same"] * count)
    found = duplicates.find(pictures, 0.98)
    assert found.total == found.identical == count * (count - 1) // 2
    assert (found.groups == 0).all() and len(found.pairs) == count - 1
    assert set(found.pairs["first"]) == {0} and found.pairs["identical"].all()


def test_memory_is_that_of_the_thumbnails_and_of_two_blocks():
    count, block = 5000, 256
    pictures = distinct(np.random.default_rng(0).integers(0, 256, (count, 4096), dtype=np.uint8))
    tracemalloc.start()
    try:
        found = duplicates.find(pictures, 0.98, block)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found.total == 0
    assert peak < count * 4096 + 6 * block * 4096 * 4 + 8 * block**2 < 4 * count**2 / 2  # half an n x n matrix


def test_pairs_between_sets_include_equal_pixels_once():
    pictures, plain = copied(40, 2)
    left, right = (duplicates.Pictures(pictures.thumbnails[s], pictures.pixels[s]) for s in (slice(15), slice(15, 40)))
    found = duplicates.pairs_between(left, right, 0.97, block=6)
    equal = {(i, j) for i in range(15) for j in range(25) if left.pixels[i] == right.pixels[j]}
    similar = set(zip(*(ends.tolist() for ends in np.nonzero(plain[:15, 15:] >= 0.97)), strict=True))
    listed = list(zip(found["left"], found["right"], strict=True))
    assert listed == sorted(equal | similar) and equal and similar - equal
    identical = found["identical"].to_numpy()
    assert {pair for pair, same in zip(listed, identical, strict=True) if same} == equal
    assert (found.loc[identical, "similarity"] == 1).all() and (found["similarity"] >= 0.97).all()


# The step


class Folder:
    """Class folders with planted twins, listed and searched."""

    def __init__(self, place):
        self.images, self.work = place / "images", place / "work"

    def scene(self, path, seed, noise=0.0, shape=(90, 120)):
        """A smooth picture of its own, under a little noise."""
        rng = np.random.default_rng(seed)
        coarse = Image.fromarray(rng.integers(0, 256, (9, 12), dtype=np.uint8)).resize(
            shape[::-1], Image.Resampling.BICUBIC
        )
        grey = np.asarray(coarse, float) + noise * np.random.default_rng(seed + 1).normal(size=shape)
        (self.images / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.clip(grey, 0, 255).astype(np.uint8)).save(self.images / path)
        return self.images / path

    def search(self, classes=CLASSES, threads=1, **settings):
        listed, out = self.work / "list", self.work / "found"
        run(list_images.main, "--images", self.images, "--output-folder", listed, "--meta", listed / "meta.json")
        run(
            find_duplicates.main, "--images", self.images, "--manifest", listed / "manifest.parquet",
            "--classes", *classes, "--output-folder", out, "--meta", out / "meta.json",
            settings=settings, threads=threads,
        )  # fmt: skip
        groups, pairs = (pd.read_parquet(out / f"{name}.parquet") for name in ("groups", "pairs"))
        return groups, pairs, json.loads((out / "summary.json").read_text())

    def captions(self, monkeypatch):
        """What the sheet is asked to show, once `search` has run."""
        shown = {}

        def keep(path, rows, title, **_):
            shown.update(rows=[(label, [t.caption for t in tiles], {t.mark for t in tiles}) for label, tiles in rows])
            shown.update(title=title)
            path.write_bytes(b"")

        monkeypatch.setattr(find_duplicates.sheets, "contact_sheet", keep)
        return shown


@pytest.fixture
def folder(tmp_path):
    """Three pictures of a class each; nothing alike."""
    made = Folder(tmp_path)
    for label, name in enumerate(("normal", "Benign", "malignant")):
        for i in (1, 2, 3):
            made.scene(f"{name}/{name} ({i}).png", seed=100 * label + 10 * i)
    return made


def plant(folder):
    """A near-twin, a pair of equal pixels in other bytes, and a chain over two classes."""
    folder.scene("Benign/twin.png", seed=110, noise=4)
    Image.open(folder.images / "normal/normal (2).png").save(folder.images / "normal/saved anew.bmp")
    folder.scene("malignant/torn.png", seed=130, noise=5)
    shutil.copy(folder.images / "malignant/torn.png", folder.images / "malignant/torn copy.png")
    return {
        ("Benign/Benign (1).png", "Benign/twin.png"): (False, 1, 1),
        ("normal/normal (2).png", "normal/saved anew.bmp"): (True, 0, 0),
        ("Benign/Benign (3).png", "malignant/torn copy.png"): (False, 1, 2),
        ("Benign/Benign (3).png", "malignant/torn.png"): (False, 1, 2),
        ("malignant/torn copy.png", "malignant/torn.png"): (True, 2, 2),
    }


def test_every_planted_pair_is_found_and_no_other(folder):
    planted = plant(folder)
    (folder.images / "normal/broken.png").write_text("no image")
    groups, pairs, summary = folder.search()
    facts = pairs.set_index(["first", "second"])
    assert {k: tuple(v) for k, v in facts[["identical", "first_label", "second_label"]].iterrows()} == planted
    assert (facts["similarity"][facts["identical"]] == 1).all()
    assert facts["similarity"][~facts["identical"]].between(0.98, 1, inclusive="left").all()
    groups = groups.set_index("path")
    assert len(groups) == 13 and "normal/broken.png" not in groups.index
    several = groups[groups["group"].duplicated(keep=False)]
    assert several["group"].to_dict() == {
        "Benign/Benign (1).png": "Benign/Benign (1).png",
        "Benign/twin.png": "Benign/Benign (1).png",
        "Benign/Benign (3).png": "Benign/Benign (3).png",
        "malignant/torn copy.png": "Benign/Benign (3).png",
        "malignant/torn.png": "Benign/Benign (3).png",
        "normal/normal (2).png": "normal/normal (2).png",
        "normal/saved anew.bmp": "normal/normal (2).png",
    }
    assert set(groups.index[groups["conflict"]]) == {
        "Benign/Benign (3).png", "malignant/torn copy.png", "malignant/torn.png",
    }  # fmt: skip
    singles = groups[~groups.index.isin(several.index)]
    assert (singles["group"] == singles.index).all()
    manifest = pd.read_parquet(folder.work / "list/manifest.parquet").set_index("path")
    assert groups["sha256"].equals(manifest.loc[groups.index, "sha256"])
    assert groups["label"].equals(manifest.loc[groups.index, "label"])
    assert summary == {
        "images": 13, "threshold": 0.98, "groups": 9, "groups_of_several": 3, "images_in_groups_of_several": 7,
        "largest_group": 3, "pairs": 5, "pairs_listed": 5, "identical_pairs": 2, "cross_class_pairs_listed": 2,
        "conflict_groups": 1, "images_in_conflict_groups": 3,
    }  # fmt: skip
    assert pairs["similarity"].dtype == np.float64 and pairs["first_label"].dtype == np.int64
    assert pairs["identical"].dtype == groups["conflict"].dtype == bool


def test_blocks_and_threads_change_no_byte_and_are_not_recorded(folder):
    plant(folder)
    folder.search()
    names = ("groups.parquet", "pairs.parquet", "conflicts.png", "summary.json")
    before = {name: (folder.work / "found" / name).read_bytes() for name in names}
    folder.search(block=3, threads=4)
    assert before == {name: (folder.work / "found" / name).read_bytes() for name in names}
    meta = json.loads((folder.work / "found/meta.json").read_text())
    assert meta["settings"] == {"threshold": 0.98} and set(meta["outputs"]) == set(names)


def test_the_threshold_is_a_setting(folder):
    plant(folder)
    _, pairs, _ = folder.search(threshold=1)
    assert pairs["identical"].all() and len(pairs) == 2


def test_masks_take_no_part(folder):
    for i in (1, 2):
        Image.new("L", (30, 30)).save(folder.images / f"normal/normal ({i})_mask.png")
    groups, pairs, summary = folder.search()
    assert pairs.empty and summary["images"] == len(groups) == 9


def test_the_sheet_shows_conflicts_then_the_closest_pairs(folder, monkeypatch):
    plant(folder)
    shown = folder.captions(monkeypatch)
    _, pairs, _ = folder.search()
    similarity = pairs.set_index(["first", "second"])["similarity"]
    torn = [("Benign/Benign (3).png", f"malignant/torn{copy}.png") for copy in (" copy", "")]
    twin = ("Benign/Benign (1).png", "Benign/twin.png")
    conflicts = [
        f"{similarity[pair]:.4f} {name}: {file}"
        for pair in torn
        for name, file in zip(("Benign", "Malignant"), pair, strict=True)
    ]
    equal = [f"{similarity[twin]:.4f} Benign: {file}" for file in twin]
    equal += [f"equal pixels, Malignant: malignant/torn{copy}.png" for copy in (" copy", "")]
    equal += [f"equal pixels, Normal: normal/{file}" for file in ("normal (2).png", "saved anew.bmp")]
    assert shown["rows"] == [("different labels", conflicts, {"bad"}), ("equal labels", equal, {None})]
    assert shown["title"] == (
        "5 pairs of near-twins at similarity 0.98 or above; 2 with different labels; 3 with equal labels"
    )


def test_the_sheet_says_what_it_leaves_out(folder, monkeypatch):
    for i in range(8):  # 28 pairs of one class, 8 x 3 conflicts
        folder.scene(f"Benign/same {i}.png", seed=500, noise=1 + i / 10)
    for i in range(3):
        folder.scene(f"normal/same {i}.png", seed=500, noise=3 + i / 10)
    shown = folder.captions(monkeypatch)
    folder.search()
    assert [(len(captions), marks) for _, captions, marks in shown["rows"]] == [(2 * 12, {"bad"}), (2 * 6, {None})]
    for _, captions, _ in shown["rows"]:
        alike = [float(one.split()[0]) for one in captions]
        assert alike == sorted(alike, reverse=True) and alike[::2] == alike[1::2]
    assert shown["title"].endswith(
        "; 24 with different labels (the closest 12 shown, 12 left out)"
        "; 31 with equal labels (the closest 6 shown, 25 left out)"
    )


@pytest.mark.parametrize("kind", ["none", "equal", "conflicts"])
def test_the_sheet_is_drawn_whatever_there_is(folder, kind):
    if kind == "equal":
        folder.scene("Benign/twin.png", seed=110, noise=4)
    if kind == "conflicts":
        folder.scene("normal/twin.png", seed=110, noise=4)
    *_, summary = folder.search()
    with Image.open(folder.work / "found/conflicts.png") as sheet:
        pixels = np.asarray(sheet.convert("L"))
    assert summary["pairs"] == (kind != "none") and summary["conflict_groups"] == (kind == "conflicts")
    assert pixels.shape[1] >= 480 and (pixels < 128).sum() > 500  # at least the title's letters
    assert (pixels.shape[0] > 200) == (kind != "none")


def test_a_label_without_a_name_is_refused(folder):
    with pytest.raises(KilnError, match=r"malignant \(1\).png has label 2, but --classes names 2: Normal, Benign"):
        folder.search(classes=CLASSES[:2])
    assert not (folder.work / "found").exists()


def test_an_image_that_went_since_the_listing_ends_the_step(folder):
    rows = [{"path": "Benign/gone.png", "sha256": "0" * 64, "status": "ok", "label": 1}]
    manifest, out = write(folder.work / "manifest.parquet", rows), folder.work / "found"
    with pytest.raises(KilnError, match="gone.png: readable when it was listed"):
        run(
            find_duplicates.main, "--images", folder.images, "--manifest", manifest, "--classes", *CLASSES,
            "--output-folder", out, "--meta", out / "meta.json",
        )  # fmt: skip
    assert not out.exists()


def test_a_missing_manifest_is_named(folder):
    out = folder.work / "found"
    with pytest.raises(KilnError, match="none.parquet: no such file"):
        run(
            find_duplicates.main, "--images", folder.images, "--manifest", folder.work / "none.parquet",
            "--classes", *CLASSES, "--output-folder", out, "--meta", out / "meta.json",
        )  # fmt: skip
