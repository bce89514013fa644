"""The RO-Crate of a results folder: it loads, everything in it is there, and it says what the records say."""

import datetime
import json
import shutil
import warnings
from pathlib import Path
from urllib.parse import unquote

import pytest
import results_fixtures
import workflow
from results_fixtures import edit
from rocrate.rocrate import ROCrate

from scripts.common.errors import KilnError
from scripts.report import describe_run

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def results(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return results_fixtures.make(Path("results"))


def describe(results: Path, *options: str) -> dict[str, dict]:
    """{@id: entity} of the crate that the step writes."""
    crate, folder = results / "ro-crate-metadata.json", results / "report/describe_run"
    places = ["--output", str(crate), "--workflow-folder", str(folder), "--config", str(results / "config.yaml")]
    meta = ["--meta", str(results / "ro-crate-metadata.meta.json")]
    describe_run.main(["--results", str(results), *places, *meta, *options])
    return {one["@id"]: one for one in json.loads(crate.read_text())["@graph"]}


def ids(value) -> list[str]:
    """The @ids that a property points to."""
    return [one["@id"] for one in (value if isinstance(value, list) else [value])]


def references(value):
    if isinstance(value, dict) and list(value) == ["@id"]:
        yield value["@id"]
    elif isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from references(one)


def test_the_crate_loads_and_all_that_it_names_is_there(results):
    (results / "report.html").write_text("<p>")
    described = describe(results)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*data entity.*")  # that the root does not list
        crate = ROCrate(results)
    assert len(crate.data_entities) > 20
    for entity in crate.data_entities:
        place = results / unquote(entity.id)
        assert place.is_dir() if entity.type == "Dataset" else place.is_file(), entity.id
    named = {one for entity in described.values() for one in references(list(entity.values()))}
    assert named - {"https://w3id.org/ro/crate/1.1"} <= described.keys()
    assert crate.mainEntity.id == "report/describe_run/Snakefile"
    assert crate.mainEntity["programmingLanguage"]["name"] == "Snakemake"
    assert {"report.html", "report/describe_run/config.yaml", "code/now.json"} <= described.keys()
    assert (results / "report/describe_run/Snakefile").read_text() == (ROOT / "Snakefile").read_text()


def test_each_artefact_is_an_action_that_says_what_its_record_says(results):
    described = describe(results)
    action = described["#vase/train_sft/main/meta.json"]
    meta = json.loads((results / "vase/train_sft/main/meta.json").read_text())
    assert action["@type"] == "CreateAction"
    assert ids(action["object"]) == ["vase/accept_images/main/accepted/files.json"]
    assert set(ids(action["result"])) == {
        "vase/train_sft/main/best/",
        "vase/train_sft/main/last/",
        "vase/train_sft/main/metrics.json",
        "vase/train_sft/main/last/files.json",
    }
    assert ids(described["vase/train_sft/main/best/"]["hasPart"]) == ["vase/train_sft/main/best/files.json"]
    assert "agent" not in action
    assert action["startTime"][:23] == meta["started"][:23]
    assert action["startTime"] <= action["endTime"]
    (program,) = (described[one] for one in ids(action["instrument"]))
    assert program["name"] == "scripts.vase.train_sft"
    assert meta["code"] in program["identifier"]
    versions = {
        described[one]["name"]: described[one]["softwareVersion"] for one in ids(program["softwareRequirements"])
    }
    assert versions == meta["packages"]
    facts = described["vase/train_sft/main/metrics.json"]
    assert facts["sha256"] == meta["outputs"]["metrics.json"]["sha256"]
    assert facts["contentSize"] == str(meta["outputs"]["metrics.json"]["bytes"])
    assert "environment key" in described["report/describe_run/envs/tables.yaml"]["identifier"]


def test_it_names_artefacts_and_not_their_items(results):
    assert not any(unquote(one).endswith((".safetensors", "/c.png", "/a b.png")) for one in describe(results))


def test_equal_records_give_equal_bytes(results):
    describe(results)
    crate = results / "ro-crate-metadata.json"
    first = crate.read_bytes()
    describe(results)
    assert crate.read_bytes() == first


def test_an_input_that_is_no_longer_what_was_read_is_named_by_its_hash_alone(results):
    def change(meta):
        meta["inputs"]["files"]["sha256"] = "1" * 64

    edit(results / "vase/train_sft/main/meta.json", change)
    described = describe(results)
    (given,) = ids(described["#vase/train_sft/main/meta.json"]["object"])
    assert described[given]["sha256"] == "1" * 64
    assert described[given]["@type"] == "CreativeWork"


def test_variants_that_are_not_of_the_run_are_left_out(results):
    shutil.copytree(results / "vase/train_sft/main", results / "vase/train_sft/old")
    (results / "state").mkdir()
    (results / "state/variants.json").write_text('["vase/train_sft", "vase/accept_images"]')
    assert "#vase/train_sft/old/meta.json" in describe(results)
    described = describe(results, "--runs", "vase=main,low")
    assert "#vase/train_sft/old/meta.json" not in described
    assert {"#vase/train_sft/main/meta.json", "#vase/list_images/meta.json"} <= described.keys()


def test_the_seconds_of_earlier_attempts_do_not_move_the_end(results):
    meta = results / "vase/train_sft/main/meta.json"
    edit(meta, lambda one: one.update(wall_seconds=1e6))
    described = describe(results)
    assert described["#vase/train_sft/main/meta.json"]["endTime"] <= described["./"]["datePublished"]
    end = datetime.datetime.fromisoformat(described["#vase/train_sft/main/meta.json"]["endTime"])
    assert abs(end.timestamp() - meta.stat().st_mtime) < 1


@pytest.mark.parametrize("fault", ["truncated", "no settings", "runs"])
def test_bad_input_leaves_nothing(results, fault):
    options = []
    if fault == "truncated":
        (results / "summary.meta.json").write_text('{"step": ')
    elif fault == "no settings":
        (results / "config.yaml").unlink()
    else:
        options = ["--runs", "main"]
    with pytest.raises(KilnError) as caught:
        describe(results, *options)
    wanted = {"truncated": "summary.meta.json", "no settings": "config.yaml", "runs": "PIPELINE=NAME"}
    assert wanted[fault] in caught.value.message
    assert not (results / "ro-crate-metadata.json").exists()
    assert not (results / "report/describe_run").exists()


def test_the_workflow_verifies_though_results_were_edited(tmp_path, monkeypatch):
    """No guard of reruns stands in its way; it runs each time, and its own log does not count."""
    monkeypatch.chdir(tmp_path)
    results_fixtures.make(Path("results/demo"))
    config = ["--configfile", str(ROOT / "config/demo.yaml"), "--", "verify"]
    for _ in range(2):
        done = workflow.run(ROOT, tmp_path, *config)
        assert "all as recorded" in done.stdout + done.stderr
    Path("results/demo/summary.json").write_text("{}")
    done = workflow.run(ROOT, tmp_path, *config, check=False)
    assert done.returncode == 1
    assert "summary.json" in Path("results/demo/logs/report/verify_results.log").read_text()


def test_all_asks_for_the_crate(tmp_path):
    plan = workflow.planned(ROOT, tmp_path, "--configfile", str(ROOT / "config/demo.yaml"))
    assert plan["report_describe_run"] == 1
    assert "verify" not in plan
