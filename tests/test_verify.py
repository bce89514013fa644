"""What `snakemake verify` says of results that are as recorded, and of each way in which they are not."""

import os
import shutil
from pathlib import Path

import pandas as pd
import pytest
import results_fixtures
import yaml
from results_fixtures import edit

from scripts.common.errors import KilnError
from scripts.report import describe_run, verify_results

WEIGHTS = "vase/train_sft/main/best/model.safetensors"


@pytest.fixture
def results(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return results_fixtures.make(Path("results"))


def describe(results: Path) -> None:
    crate, folder = results / "ro-crate-metadata.json", results / "report/describe_run"
    places = ["--output", str(crate), "--workflow-folder", str(folder), "--config", str(results / "config.yaml")]
    describe_run.main(["--results", str(results), *places, "--meta", str(results / "ro-crate-metadata.meta.json")])


def verify(results: Path, *options: str) -> list[tuple[str, str]]:
    """(what, file) of all that is off, by the table that the command leaves."""
    table = results.parent / "findings.tsv"
    try:
        verify_results.main([str(results), "--output", str(table), "--threads", "2", *options])
        off = False
    except KilnError as error:
        off = True
        assert error.hint
    found = pd.read_csv(table, sep="\t")
    assert off == bool(len(found))
    return list(zip(found["what"], found["file"], strict=True))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("described", [False, True])
def test_what_is_as_recorded_passes(results, described, capsys):
    if described:
        describe(results)
    assert verify(results, "--raw") == []
    assert "all as recorded" in capsys.readouterr().out


def test_results_within_are_of_another_run(results):
    """The demo's, for one, lie in the default folder: neither its files nor its damage are this folder's."""
    inner = results / "demo"
    (inner / "logs").mkdir(parents=True)
    (inner / "no record names it.txt").write_text("x")
    assert verify(results) == [("no record", "demo/no record names it.txt")]
    (inner / "writer.lock").write_text("")
    assert verify(results) == []
    describe(results)
    assert "no record names it" not in (results / "ro-crate-metadata.json").read_text()


@pytest.mark.parametrize(
    "file",
    [
        WEIGHTS,
        "vase/train_sft/main/last/model.safetensors",
        "vase/train_sft/main/metrics.json",
        "vase/list_images/manifest.parquet",
        "summary.json",
    ],
)
def test_a_flipped_byte_is_found_though_size_and_time_are_kept(results, file, capsys):
    before = (results / file).stat()
    flip(results / file)
    os.utime(results / file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert verify(results) == [("changed", file)]
    assert file in capsys.readouterr().out


@pytest.mark.parametrize("side", ["best", "last"])
def test_of_two_listings_of_one_name_either_is_looked_after(results, side):
    """A record holds the hash of one of them; the crate those of both."""
    describe(results)
    listing = f"vase/train_sft/main/{side}/files.json"
    text = (results / listing).read_text()
    (results / listing).write_text(text.replace('"bytes"', ' "bytes"'))
    assert ("changed", listing) in verify(results)


def test_a_flipped_raw_image_is_found_by_its_list_and_by_the_links_to_it(results):
    flip(results / "demo/draw/images/c.png")
    assert {("changed", f"{place}/c.png") for place in ("demo/draw/images", "vase/accept_images/main/accepted")} == set(
        verify(results)
    )


def test_a_missing_output_is_found(results):
    (results / WEIGHTS).unlink()
    (results / "summary.json").unlink()
    assert verify(results) == [("missing", "summary.json"), ("missing", WEIGHTS)]


def test_a_file_without_a_record_is_found(results):
    (results / "vase/notes.txt").write_text("mine")
    (results / "vase/train_sft/main/best/more.bin").write_text("mine")
    assert verify(results) == [
        ("no record", "vase/notes.txt"),
        ("not listed", "vase/train_sft/main/best/more.bin"),
    ]


def test_what_runs_leave_around_the_results_is_not_theirs(results):
    for name in ("README.md", "writer.lock", "state/vase/shards.parquet", "benchmarks/a.tsv", "vase/.a.json.99.tmp"):
        (results / name).parent.mkdir(parents=True, exist_ok=True)
        (results / name).write_text("x")
    assert verify(results) == []


def test_an_entry_that_was_taken_from_a_listing_is_found(results):
    edit(results / "vase/train_sft/main/last/files.json", lambda listing: listing.pop("model.safetensors"))
    found = verify(results)
    assert ("not listed", "vase/train_sft/main/last/model.safetensors") in found
    assert any(what == "changed" for what, _ in found)


def test_an_edited_hash_in_a_record_is_found_at_the_output_and_at_what_was_made_from_it(results):
    def forge(meta):
        meta["outputs"]["metrics.json"]["sha256"] = "0" * 64

    edit(results / "vase/train_sft/main/meta.json", forge)
    assert verify(results) == [("older input", "summary.meta.json"), ("changed", "vase/train_sft/main/metrics.json")]


def test_edited_settings_in_a_record_are_found_by_the_crate(results):
    describe(results)
    edit(results / "vase/train_sft/main/meta.json", lambda meta: meta["settings"].update(lr=7))
    assert verify(results) == [("changed", "vase/train_sft/main/meta.json")]


def test_a_step_that_ran_after_the_crate_is_not_held_against_it(results):
    describe(results)
    made = results_fixtures.record(results, "report.summarise", "summary.meta.json", ["summary.json"], [WEIGHTS])
    edit(made, lambda meta: meta.update(started="2999-01-01T00:00:00+00:00"))
    assert verify(results) == []


def test_an_upstream_result_that_was_made_anew_is_told_unless_that_was_accepted(results):
    metrics = results / "vase/train_sft/main/metrics.json"
    metrics.write_text("{}")
    listings = [f"vase/train_sft/main/{name}/files.json" for name in ("best", "last")]
    outputs = [*listings, "vase/train_sft/main/metrics.json"]
    results_fixtures.record(results, "vase.train_sft", "vase/train_sft/main/meta.json", outputs)
    assert verify(results) == [("older input", "summary.meta.json")]
    digest = results_fixtures.artefacts.sha256_file(metrics)
    accepted = [{"when": "2999-01-01T00:00:00+00:00", "inputs": {str(metrics): digest}}]
    edit(results / "summary.meta.json", lambda meta: meta.update(accepted=accepted))
    assert verify(results) == []


@pytest.mark.parametrize("file", ["vase/train_sft/main/meta.json", "demo/draw/files.json", "ro-crate-metadata.json"])
def test_a_truncated_record_is_named(results, file):
    describe(results)
    text = (results / file).read_text()
    (results / file).write_text(text[: len(text) // 2])
    with pytest.raises(KilnError, match=file) as caught:
        verify_results.main([str(results)])
    assert "not JSON" in caught.value.message


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda meta: meta.pop("outputs"), "'outputs' is missing"),
        (lambda meta: meta.update(inputs=[]), "'inputs' is missing or no dict"),
        (lambda meta: meta["outputs"].update({"metrics.json": {}}), "no sha256"),
    ],
)
def test_a_record_of_another_form_is_named(results, change, says):
    meta = results / "vase/train_sft/main/meta.json"
    edit(meta, change)
    with pytest.raises(KilnError, match=says) as caught:
        verify_results.main([str(results)])
    assert str(meta) in caught.value.message


def test_a_folder_without_records_is_refused(tmp_path):
    with pytest.raises(KilnError, match="no such folder"):
        verify_results.main([str(tmp_path / "none")])
    with pytest.raises(KilnError, match="no record"):
        verify_results.main([str(tmp_path)])


def test_raw_data_elsewhere_is_read_only_on_request(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    results = results_fixtures.make(Path("results"))
    shutil.copytree(results / "demo/draw/images", "raw")
    settings = yaml.safe_load((results / "config.yaml").read_text())
    settings["vase"]["images"] = "raw"
    (results / "config.yaml").write_text(yaml.safe_dump(settings))
    Path("labels.json").write_text("{}")
    given = results.absolute().parent / "labels.json"
    record = results_fixtures.artefacts.Record("scripts.a.b", {}, {"labels": given}, "0")
    record.write(results / "a/b/meta.json", [])
    assert verify(results, "--raw") == []
    flip(Path("raw/c.png"))
    Path("raw/a b.png").unlink()
    given.write_text("[]")
    assert verify(results) == []
    assert set(verify(results, "--raw")) == {
        ("changed", "raw/c.png"),
        ("missing", "raw/a b.png"),
        ("changed", str(given)),
    }


def test_a_copy_under_another_name_is_verified_as_it_is(results):
    shutil.copytree(results, "elsewhere/copy", symlinks=True)
    shutil.rmtree(results)
    assert verify(Path("elsewhere/copy")) == []
    flip(Path("elsewhere/copy", WEIGHTS))
    assert verify(Path("elsewhere/copy")) == [("changed", WEIGHTS)]


def test_a_folder_that_got_another_name_still_knows_what_was_made_from_what(results):
    shutil.move(results, "other")
    settings = yaml.safe_load(Path("other/config.yaml").read_text())
    Path("other/config.yaml").write_text(yaml.safe_dump(settings | {"results": "other"}))
    assert verify(Path("other")) == []
    manifest = "vase/list_images/manifest.parquet"
    flip(Path("other", manifest))
    results_fixtures.record(Path("other"), "vase.list_images", "vase/list_images/meta.json", [manifest])
    assert verify(Path("other")) == [("older input", "vase/accept_images/main/meta.json")]


def test_the_report_is_compared_with_the_crate(results):
    (results / "report.html").write_text("<p>")
    assert verify(results) == []
    describe(results)
    flip(results / "report.html")
    assert verify(results) == [("changed", "report.html")]
