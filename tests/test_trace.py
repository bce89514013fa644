"""From a number back to its raw data, by the records of a small results folder."""

import pytest
import results_fixtures

from scripts.common import code_key
from scripts.common.errors import KilnError
from scripts.report import trace


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return results_fixtures.make(tmp_path / "results")


def steps(capsys, results, what: str, *options: str) -> list[str]:
    """The steps of what is printed, each above those that it read from."""
    trace.main([str(results), what, *options])
    printed = capsys.readouterr().out
    return [line.split()[0] for line in printed.splitlines() if line.endswith("meta.json)")]


def test_a_number_is_followed_to_the_list_of_its_images(results, capsys):
    assert steps(capsys, results, "vase.sft_accuracy") == ["vase.train_sft", "vase.accept_images", "vase.list_images"]
    trace.main([str(results), "vase.sft_accuracy", "--code"])
    printed = capsys.readouterr().out
    assert printed.startswith("vase.sft_accuracy: vase/train_sft/main/metrics.json\n")
    assert "  from    vase/accept_images/main/accepted/files.json\n" in printed
    assert "  lists   vase/list_images/manifest.parquet  sha256 " in printed
    assert f"code {code_key.code_key(results_fixtures.CODE)[:12]}" in printed
    assert f"  module  {results_fixtures.CODE}  " in printed and "\npackages: " in printed


def test_a_file_of_a_listed_folder_is_followed_too(results, capsys):
    found = steps(capsys, results, "vase/train_sft/main/best/model.safetensors")
    assert found == ["vase.train_sft", "vase.accept_images", "vase.list_images"]
    assert steps(capsys, results, str(results / "vase/list_images/manifest.parquet")) == ["vase.list_images"]


@pytest.mark.parametrize("what", ["vase.nothing", "busi.sft_accuracy", "vase/none.json", ""])
def test_what_is_not_there_is_told_with_what_is(results, what):
    with pytest.raises(KilnError, match="no metric of .* and no recorded file") as error:
        trace.main([str(results), what])
    assert "vase.sft_accuracy" in error.value.hint
