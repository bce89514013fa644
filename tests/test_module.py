"""Kiln through workflow/Snakefile, and as a module of another workflow, as docs/modules.md shows it."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import workflow
import yaml
from test_disk import on_a_small_disk, pictures

from scripts.common import locks

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[1]
TARGET = "results/busi/list_images/manifest.parquet"
SETTINGS = {
    "device": "cpu",
    "demo": {"ultrasound": {"normal": 6, "benign": 8, "malignant": 6, "identical": 1, "near": 1, "conflicts": 0,
                            "image_size": 48}},
    "busi": {"images": "results/demo/draw_ultrasound/images"},
}  # fmt: skip


def documented(checkout: Path) -> str:
    """The Snakefile of docs/modules.md, with its path to Kiln set."""
    (text,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/modules.md").read_text(encoding="utf-8"), re.S)
    assert text.count('"kiln/workflow/Snakefile"') == 1
    return text.replace('"kiln/workflow/Snakefile"', f'"{checkout}/workflow/Snakefile"')


def outer(place: Path, text: str) -> Path:
    """A folder with another workflow and Kiln's settings."""
    place.mkdir()
    (place / "Snakefile").write_text(text)
    (place / "kiln.yaml").write_text(yaml.safe_dump(SETTINGS))
    return place


def snakemake(place: Path, *arguments: str, snakefile: Path | None = None) -> subprocess.CompletedProcess:
    """Snakemake in a folder, with that folder's Snakefile or another."""
    command = [sys.executable, "-m", "snakemake", "--cores", "2", "--configfile", "kiln.yaml"]
    command += ["--snakefile", str(snakefile)] if snakefile else []
    return subprocess.run([*command, *arguments], cwd=place, capture_output=True, text=True, timeout=300)


def said(done: subprocess.CompletedProcess, status: int = 0) -> str:
    """What it said, if it ended with that status."""
    text = done.stdout + done.stderr
    assert done.returncode == status, text[-6000:]
    return text


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The documented outer workflow, run from the data that Kiln draws to the outer rule."""
    place = outer(tmp_path_factory.mktemp("module") / "a study", documented(ROOT))
    planned = workflow.count_jobs(said(snakemake(place, "--dry-run")))
    assert planned == {"kiln_demo_draw_ultrasound": 1, "kiln_busi_list_images": 1, "count_images": 1}
    said(snakemake(place))
    return place


def test_an_outer_rule_uses_what_kiln_makes(finished):
    summary = json.loads((finished / "results/busi/list_images/summary.json").read_text())
    assert int((finished / "count.txt").read_text()) == summary["in"] > 20
    assert "Nothing to be done" in said(snakemake(finished, "--dry-run"))


@pytest.mark.parametrize("snakefile", ["Snakefile", "workflow/Snakefile"])
def test_kiln_itself_finds_nothing_to_do_through_either_snakefile(finished, snakefile):
    """The same params, code keys and environments: results move freely between the three ways to call Kiln."""
    text = said(snakemake(finished, "--dry-run", "--", TARGET, snakefile=ROOT / snakefile))
    assert "Nothing to be done" in text


def test_what_a_run_leaves_with_its_results_is_there(finished):
    """Snakemake leaves the hooks of a module out; the report needs the configuration that one of them writes."""
    config = yaml.safe_load((finished / "results/config.yaml").read_text())
    assert config["busi"]["images"] == SETTINGS["busi"]["images"]
    assert list((finished / "results/code").glob("*.json"))


def test_every_rule_is_there_under_its_new_name(finished):
    demo = ("--configfile", str(ROOT / "config/demo.yaml"), "--dry-run", "kiln_all")
    text = said(snakemake(finished, *demo))
    named = workflow.count_jobs(text)
    itself = workflow.planned(ROOT, finished, "--configfile", str(ROOT / "config/demo.yaml"), "--", "all")
    assert named.pop("kiln_all") == 1
    assert named == {f"kiln_{rule}": jobs for rule, jobs in itself.items()}
    assert "localrules directive" not in text


def test_of_two_runs_one_alone_writes(finished):
    with locks.writer_lock(finished / "results", "probe", mode=0o666):
        done = snakemake(finished, "--forcerun", "kiln_busi_list_images")
    assert "another process writes here: probe" in said(done, 1)


def test_the_plan_is_looked_at(finished):
    text = said(snakemake(finished, "--dry-run", "--config", "allow_retrain=no_such"), 1)
    assert "allow_retrain: no_such is no training" in text


def test_the_disk_is_looked_at_under_new_names(tmp_path):
    """Which rules write much is known by their names."""
    place = outer(tmp_path / "study", documented(ROOT))
    settings = {"device": "cpu", "rae": {"images": "data/images", "dataset": {"processes": 1}}}
    (place / "kiln.yaml").write_text(yaml.safe_dump(settings))
    pictures(place / "data/images/train/a", 8, side=360)
    pictures(place / "data/images/val/a", 4, side=64, seed=1)
    command = [sys.executable, "-m", "snakemake", "--cores", "1", "--configfile", "kiln.yaml"]
    inner = " ".join(f"'{part}'" for part in [*command, "--", "kiln_rae_build_arrow"])
    text = on_a_small_disk(place / "results", 2, f"cd '{place}'; {inner}")
    assert "too little room" in text and "rae_build_arrow" in text and "Finished jobid" not in text, text[-3000:]


@pytest.mark.parametrize("line", ['prefix:\n        "below"', 'replace_prefix:\n        {"results": "other"}'])
def test_a_prefix_is_refused_with_what_to_do(tmp_path, line):
    text = documented(ROOT).replace("    config:\n", f"    {line}\n    config:\n")
    refused = said(snakemake(outer(tmp_path / "study", text), "--dry-run"), 1)
    assert "Kiln as a module has no `prefix`" in refused and "Hint: leave `prefix` out" in refused


@pytest.mark.parametrize("snakefile", ["Snakefile", "workflow/Snakefile"])
def test_a_module_by_its_url_is_refused_with_what_to_do(tmp_path, snakefile):
    """It would bring the rules without the steps that they call."""
    served = tmp_path / "served"
    for name in ("Snakefile", "workflow/Snakefile"):
        (served / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, served / name)
    named = ("-c", "user.name=t", "-c", "user.email=t@host")
    for command in (("init", "-q", "-b", "main"), ("add", "."), (*named, "commit", "-qm", "rules")):
        subprocess.run(["git", "-C", str(served), *command], check=True)
    text = documented(ROOT).replace(f'"{ROOT}/workflow/Snakefile"', f'"git+file://{served}/{snakefile}@main"')
    refused = said(snakemake(outer(tmp_path / "study", text), "--dry-run"), 1)
    assert "a module by its URL brings the rules alone" in refused and "Hint: clone Kiln" in refused
