import os
import subprocess
import sys
import warnings
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib import font_manager
from matplotlib.ft2font import FT2Font
from PIL import Image

from scripts.common import plots, sheets
from scripts.common.errors import KilnError

CHINESE = "花瓶质量分类 quality"


def _curves(path):
    plots.curves(path, {CHINESE: (range(50), np.linspace(1, 0.1, 50))}, "step", "loss", CHINESE, {"chance": 1.1})


def _confusion(path):
    plots.confusion_matrix(path, [[8, 2], [1, 9]], ["青花", "a rather long name"], CHINESE)


def _distribution(path):
    plots.distribution(path, np.arange(100) ** 2, CHINESE, "分数", {"threshold": 400})


def _funnel(path):
    plots.funnel(path, [("raw 原始", 100), ("kept", 60), ("best", 0)], CHINESE)


def _shares(path):
    plots.shares(path, {"pairs 对": {"local": 3, "streamed": 1}, CHINESE: {"none": 0}}, CHINESE)


def _sheet(path):
    tiles = [sheets.Tile(Image.new("RGB", (30, 20), "navy"), CHINESE * 9, mark) for mark in ("good", "bad", None)]
    sheets.contact_sheet(path, [("行", tiles), ("none", [sheets.Tile(None, "gone")])], CHINESE)


def _reliability(path):
    held = {"from": 0.5, "to": 1.0, "n": 7, "confidence": 0.8, "accuracy": 0.6}
    empty = {"from": 0.0, "to": 0.5, "n": 0, "confidence": None, "accuracy": None}
    plots.reliability(path, {CHINESE: ([empty, held], 0.2), "base": ([empty, held], 0.2)}, CHINESE)


def _intervals(path):
    rows = {CHINESE: (0.7, (0.6, 0.8)), "one group": (1.0, None)}
    plots.intervals(path, {CHINESE: rows, "b": rows}, "accuracy", CHINESE, {"chance": 0.5}, baselines=["one group"])


def _heat_map(path):
    plots.heat_map(path, np.arange(25).reshape(5, 5) / 24, CHINESE, "texts", "切片", ["腺癌", "腺癌", "b", "b", "b"])


FIGURES = [_curves, _confusion, _distribution, _funnel, _shares, _sheet, _reliability, _intervals, _heat_map]


@pytest.mark.parametrize("draw", FIGURES)
def test_equal_data_give_equal_bytes_and_no_warning(draw, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a missing glyph is a warning
        draw(tmp_path / "a.png")
        with matplotlib.rc_context({"font.size": 30, "savefig.bbox": "tight"}):  # somebody's own matplotlibrc
            draw(tmp_path / "b.png")
    data = (tmp_path / "a.png").read_bytes()
    assert data == (tmp_path / "b.png").read_bytes()
    assert b"Matplotlib" not in data and b"tEXt" not in data
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "b.png"]


def test_another_process_makes_the_same_bytes(tmp_path):
    here = Path(__file__).parent
    code = "import sys; from pathlib import Path; import test_plots; test_plots._curves(Path(sys.argv[1]))"
    paths = os.pathsep.join([str(here), str(here.parent)])
    environment = os.environ | {"PYTHONPATH": paths, "PYTHONHASHSEED": "7"}
    subprocess.run([sys.executable, "-c", code, tmp_path / "a.png"], check=True, env=environment)
    _curves(tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


@pytest.mark.parametrize(("draw", "size"), [(_curves, (825, 506)), (_distribution, (825, 462)), (_funnel, (902, 313))])
def test_size_in_pixels(draw, size, tmp_path):
    draw(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert image.size == pytest.approx(size, abs=1)


def test_chinese_comes_from_the_packaged_font(tmp_path, monkeypatch):
    with plots.style():
        found = font_manager.findfont(plots.CJK_FAMILY, fallback_to_default=False)
    assert Path(found) == plots.cjk_font_file()
    assert all(ord(letter) in FT2Font(found).get_charmap() for letter in CHINESE)
    monkeypatch.setattr(plots, "_families", lambda: ["DejaVu Sans"])
    with pytest.warns(UserWarning, match="missing from font"):  # so the warning would tell us
        _curves(tmp_path / "a.png")


def test_without_the_font_there_is_a_figure_and_one_warning(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(plots.importlib.util, "find_spec", lambda name: None)
    for cached in (plots.cjk_font_file, plots._families, sheets._font):
        cached.cache_clear()
    try:
        plots.funnel(tmp_path / "a.png", [("raw", 3)], "title")
        sheets.contact_sheet(tmp_path / "b.png", [("row", [sheets.Tile(None, "x")])], "title")
    finally:
        monkeypatch.undo()
        for cached in (plots.cjk_font_file, plots._families, sheets._font):
            cached.cache_clear()
    assert [r.message for r in caplog.records if "mplfonts" in r.message] == [caplog.records[0].message]


def test_settings_of_the_caller_come_back(tmp_path):
    before = dict(matplotlib.rcParams)
    _curves(tmp_path / "a.png")
    assert dict(matplotlib.rcParams) == before


def test_sheet_shows_marks_and_pictures(tmp_path):
    tiles = [sheets.Tile(Image.new("RGB", (100, 100), "navy"), "", mark) for mark in ("good", "bad", None)]
    sheets.contact_sheet(tmp_path / "a.png", [("", tiles)], "t", size=100)
    colours = Image.open(tmp_path / "a.png").convert("RGB").getcolors(100_000)
    colours = {"#{:02X}{:02X}{:02X}".format(*colour) for _, colour in colours}
    assert {plots.GOOD, plots.BAD, "#000080"} <= colours


def test_sheet_reads_files_and_breaks_long_rows(tmp_path):
    Image.new("RGB", (2000, 1000), "teal").save(tmp_path / "large.jpg")
    heights = []
    for n in (3, 9):
        tiles = [sheets.Tile(tmp_path / "large.jpg", f"{i}") for i in range(n)]
        sheets.contact_sheet(tmp_path / "a.png", [("row", tiles)], "t", columns=3, size=80)
        with Image.open(tmp_path / "a.png") as image:
            heights.append(image.height)
    assert heights[1] > heights[0] + 2 * 80


@pytest.mark.parametrize("content", [None, b"", b"no image"])
def test_sheet_with_a_bad_file_says_which(content, tmp_path):
    bad = tmp_path / "bad.png"
    if content is not None:
        bad.write_bytes(content)
    with pytest.raises(KilnError, match=r"bad\.png"):
        sheets.contact_sheet(tmp_path / "a.png", [("row", [sheets.Tile(bad)])], "t")
    assert not (tmp_path / "a.png").exists()


@given(st.text(max_size=120), st.integers(30, 200), st.integers(0, 4))
@settings(deadline=None, max_examples=60)
def test_captions_stay_in_their_box(text, width, lines):
    font = sheets._font(13)
    made = sheets._wrapped(text, font, width, lines)
    assert len(made) <= lines
    assert all(font.getlength(line) <= width + 2 for line in made)
    if made and not made[-1].endswith("…"):
        assert "".join("".join(made).split()) == "".join(text.split())


@pytest.mark.parametrize(
    "call",
    [
        lambda p: plots.curves(p, {}, "x", "y", "t"),
        lambda p: plots.curves(p, {"a": ([1, 2], [1])}, "x", "y", "t"),
        lambda p: plots.confusion_matrix(p, [[1, 2], [3, 4]], ["a"], "t"),
        lambda p: plots.distribution(p, [], "t", "x"),
        lambda p: plots.distribution(p, [1, float("nan")], "t", "x"),
        lambda p: plots.funnel(p, [], "t"),
        lambda p: plots.reliability(p, {}, "t"),
        lambda p: plots.reliability(p, {"a": ([{"n": 0}], 0.0)}, "t"),
        lambda p: plots.intervals(p, {}, "x", "t"),
        lambda p: plots.intervals(p, {"a": {}}, "x", "t"),
        lambda p: plots.heat_map(p, [[1, 2]], "t", "x", "y"),
        lambda p: plots.heat_map(p, [[1, float("nan")], [1, 2]], "t", "x", "y"),
        lambda p: plots.heat_map(p, [[1, 0], [1, 2]], "t", "x", "y", ["a"]),
        lambda p: plots.funnel(p, [("a", -1)], "t"),
        lambda p: plots.shares(p, {"a": {"b": -1}}, "t"),
        lambda p: plots.shares(p, {"a": dict.fromkeys("bcdef", 1)}, "t"),
        lambda p: sheets.contact_sheet(p, [("a", [sheets.Tile(None)] * 9000)], "t"),
    ],
)
def test_what_cannot_be_drawn_is_refused(call, tmp_path):
    with pytest.raises(KilnError):
        call(tmp_path / "a.png")


def test_odd_data_are_drawn(tmp_path):
    plots.curves(tmp_path / "a.png", {"a": ([0, 1, 2], [1, float("nan"), 3])}, "x", "y", "t")
    plots.confusion_matrix(tmp_path / "b.png", np.eye(100, dtype=int), [str(i) for i in range(100)], "many")
    plots.confusion_matrix(tmp_path / "c.png", [[0, 0, 1], [0, 0, 0]], ["a", "b"], "t", columns=["a", "b", "none"])
    plots.distribution(tmp_path / "d.png", [0.0] * 1000 + [1e9], "t", "x")
    plots.funnel(tmp_path / "e.png", [("nothing", 0), ("nothing still", 0)], "t")
    sheets.contact_sheet(tmp_path / "f.png", [], "nothing")
    plots.heat_map(tmp_path / "g.png", [[1.0]], "one", "x", "y")
    assert len(list(tmp_path.glob("*.png"))) == 7


@given(
    st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=80), st.lists(st.floats(-2, 2, width=32), max_size=2),
    st.booleans(),
)  # fmt: skip
@settings(deadline=None)
def test_no_bar_of_a_histogram_reaches_over_a_mark(values, marks, of_the_values):
    values = np.asarray(values)
    marks = [float(values[0]), *marks] if of_the_values else marks
    edges = plots._bin_edges(values, marks)
    counts = np.histogram(values, edges)[0]
    assert counts.sum() == len(values) and len(edges) <= 70
    for mark in marks:
        assert counts[edges[:-1] < mark].sum() == (values < mark).sum()


def test_a_name_has_one_colour_in_all_groups_and_a_baseline_is_hollow(tmp_path):
    def colours(path):
        return {colour for _, colour in Image.open(path).convert("RGB").getcolors(100_000)}

    groups = {"a": {"model": (0.7, (0.6, 0.8)), "chance": (0.5, None)}, "b": {"model": (0.2, None)}}
    plots.intervals(tmp_path / "a.png", groups, "x", "t", baselines=["chance"])
    plots.intervals(tmp_path / "b.png", groups, "x", "t")
    first, second, third = (tuple(bytes.fromhex(colour[1:])) for colour in plots.PALETTE[:3])
    assert {first, second} <= colours(tmp_path / "a.png") and third not in colours(tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "b.png").read_bytes()


def test_each_group_has_room_for_its_heading(tmp_path):
    rows = {str(i): (0.1 * i, None) for i in range(6)}
    for name, groups in {"one": {"": rows}, "two": {"a": rows, "b": rows}}.items():
        plots.intervals(tmp_path / f"{name}.png", groups, "x", "t")
    heights = [Image.open(tmp_path / f"{name}.png").height for name in ("one", "two")]
    assert heights[1] > heights[0] + 0.31 * plots.DPI * (6 + 2)


def test_unknown_mark_is_refused(tmp_path):
    with pytest.raises(ValueError, match="mark"):
        sheets.contact_sheet(tmp_path / "a.png", [("row", [sheets.Tile(None, "", "ugly")])], "t")
