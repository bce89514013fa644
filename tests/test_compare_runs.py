"""What differs between two results folders, by kind, and that nothing differs between equal ones."""

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
import results_fixtures
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from results_fixtures import METRIC, edit

from scripts.common import artefacts, compare_runs, tables
from scripts.common.errors import KilnError


@pytest.fixture
def results(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return results_fixtures.make(Path("results"))


@pytest.fixture
def other(results) -> Path:
    """A copy, under the name that its own run would have given it."""
    shutil.copytree(results, "other", symlinks=True)
    settings = yaml.safe_load(Path("other/config.yaml").read_text())
    settings["results"] = "other"
    settings["vase"]["images"] = "other/demo/draw/images"
    Path("other/config.yaml").write_text(yaml.safe_dump(settings))
    return Path("other")


def compare(a: Path, b: Path, capsys) -> tuple[dict, str]:
    """The differences as JSON, and as text."""
    compare_runs.main([str(a), str(b), "--json", "found.json"])
    return json.loads(Path("found.json").read_text()), capsys.readouterr().out


def only(found: dict, section: str) -> dict:
    """What differs in a section, which must be the only one."""
    assert {name for name, one in found.items() if one} == {section}
    return found[section]


def test_equal_folders_do_not_differ_whatever_their_names(results, other, capsys):
    found, text = compare(results, other, capsys)
    assert text == f"{compare_runs.SAME}\n"
    assert not any(found.values())


def test_settings_are_told_by_their_dotted_keys(results, other, capsys):
    settings = yaml.safe_load((other / "config.yaml").read_text())
    settings["vase"]["sft"] = {"lr": 0.01, "rank": 16, "off": None}
    (other / "config.yaml").write_text(yaml.safe_dump(settings))
    found, text = compare(results, other, capsys)
    assert only(found, "settings") == {
        "vase.sft.lr": {"a": 0.001, "b": 0.01},
        "vase.sft.rank": {"b": 16},
        "vase.sft.off": {"b": None},
    }
    assert [line.split() for line in text.splitlines() if "lr" in line] == [["vase.sft.lr", "0.001", "0.01"]]
    assert "the same: code, data, packages, outputs, scores" in text


def test_settings_of_pipelines_that_took_no_part_do_not_count(results, other, capsys):
    settings = yaml.safe_load((other / "config.yaml").read_text())
    settings |= {"biomedica": {"train": {"lr": 1.0}}, "device": "cuda"}
    (other / "config.yaml").write_text(yaml.safe_dump(settings))
    found, _ = compare(results, other, capsys)
    assert set(only(found, "settings")) == {"device"}


def test_code_is_told_by_step_and_module(results, other, capsys):
    old = json.loads((results / "vase/train_sft/main/meta.json").read_text())["code"]
    edit(other / "vase/train_sft/main/meta.json", lambda meta: meta.update(code="f" * 64))
    (left,) = (other / "code").glob("*.json")
    noted = json.loads(left.read_text())
    changed = {**noted["modules"], "scripts.common.trivial": "0" * 64}
    left.with_name("then.json").write_text(json.dumps({"modules": changed, "keys": {"f" * 64: noted["keys"][old]}}))
    found, text = compare(results, other, capsys)
    assert only(found, "code") == {
        "vase.train_sft": {"a": [old], "b": ["f" * 64], "modules": ["scripts.common.trivial"]}
    }
    assert "scripts.common.trivial" in text
    left.with_name("then.json").unlink()
    assert "not noted" in compare(results, other, capsys)[1]


def test_another_commit_is_told_even_if_no_step_changed(results, other, capsys):
    for meta in other.rglob("*meta.json"):
        edit(meta, lambda one: one.update(git_commit="abc-dirty"))
    found, text = compare(results, other, capsys)
    assert only(found, "code")["git commit"]["b"] == ["abc-dirty"]
    assert "abc-dirty" in text


def test_raw_data_is_told_by_file_counts(results, other, capsys):
    rows = tables.read_table(results / "vase/list_images/manifest.parquet", ["path", "sha256", "status"])
    rows.loc[rows["path"] == "c.png", "sha256"] = "0" * 64
    more = [{"path": f"{number}.png", "sha256": "1" * 64, "status": "ok"} for number in range(3)]
    rows = pd.concat([rows[rows["path"] != "a b.png"], pd.DataFrame(more)])
    tables.write_table(other / "vase/list_images/manifest.parquet", rows, ["path"])
    found, text = compare(results, other, capsys)
    counts = {"a": 2, "b": 4, "added": 3, "removed": 1, "changed": 1}
    assert only(found, "data") == {"vase/list_images/manifest.parquet": counts}
    assert "3 added, 1 removed, 1 changed" in text


def test_an_input_from_elsewhere_is_told(results, other, capsys):
    for folder, content in ((results, "{}"), (other, "[]")):
        labels = folder.absolute().parent / "labels.json"
        labels.write_text(content)
        record = artefacts.Record("scripts.a.b", {}, {"labels": labels}, "0")
        record.write(folder / "a/b/meta.json", [])
    found, _ = compare(results, other, capsys)
    assert list(only(found, "data")) == ["a/b/meta.json: labels"]


def test_packages_are_told_by_version(results, other, capsys):
    edit(other / "summary.meta.json", lambda meta: meta["packages"].update(numpy="0.1", extra="3"))
    found, text = compare(results, other, capsys)
    assert only(found, "packages")["extra"] == {"b": ["3"]}
    assert found["packages"]["numpy"]["b"][0] == "0.1"
    assert len(found["packages"]["numpy"]["a"]) == 1
    assert "numpy" in text


@pytest.mark.parametrize(
    ("value", "interval", "overlap", "word"),
    [(0.85, [0.75, 0.95], True, "overlap"), (0.99, [0.95, 1.0], False, "apart"), (0.9, None, None, "+0.1")],
)
def test_scores_are_told_with_their_intervals(tmp_path, monkeypatch, capsys, value, interval, overlap, word):
    monkeypatch.chdir(tmp_path)
    a = results_fixtures.make(Path("a"))
    b = results_fixtures.make(Path("b"), metric=METRIC | {"value": value, "ci95": interval})
    found, text = compare(a, b, capsys)
    score = found["scores"]["vase.sft_accuracy"]
    assert (score["a"], score["b"], score["overlap"]) == (0.8, value, overlap)
    assert score["difference"] == pytest.approx(value - 0.8)
    (line,) = (line for line in text.splitlines() if "sft_accuracy" in line)
    assert word in line
    assert found["outputs"]["report.summarise"] == {"a": 1, "b": 1, "other bytes": 1}


@settings(deadline=None)
@given(st.lists(st.integers(0, 9), min_size=4, max_size=4))
def test_intervals_overlap_exactly_when_they_share_a_point(ends):
    a, b = sorted(ends[:2]), sorted(ends[2:])
    assert compare_runs._overlap(a, b) == bool(set(range(a[0], a[1] + 1)) & set(range(b[0], b[1] + 1)))


def test_a_step_that_only_one_has_is_told(results, other, capsys):
    shutil.rmtree(other / "vase/train_sft")
    found, text = compare(results, other, capsys)
    assert found["outputs"]["vase.train_sft"] == {"a": 2, "b": 0, "other bytes": 0}
    assert "b" not in found["code"]["vase.train_sft"]
    assert "none" in text


def test_long_tables_are_cut_and_say_so(results, other, capsys):
    settings = yaml.safe_load((other / "config.yaml").read_text())
    settings["many"] = {f"k{number}": number for number in range(60)}
    (other / "config.yaml").write_text(yaml.safe_dump(settings))
    found, text = compare(results, other, capsys)
    assert len(found["settings"]) == 60
    assert "and 12 more; --json FILE has all" in text


def test_a_bad_folder_is_refused(results, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    for folder in (empty, tmp_path / "none"):
        with pytest.raises(KilnError, match=str(folder)):
            compare_runs.main([str(results), str(folder)])
    (results / "summary.meta.json").write_text("{")
    with pytest.raises(KilnError, match=r"summary\.meta\.json"):
        compare_runs.main([str(results), str(results)])
