"""`snakemake --profile slurm` from a fresh checkout: the same bytes as a local run, in fewer jobs than rules."""

import json
import shutil
from pathlib import Path

import cluster
import pytest
import workflow
import yaml
from test_biomedica_workflow import SETTINGS as BIOMEDICA
from test_vase_workflow import SETTINGS as VASE
from vase_fixtures import draw

pytestmark = [pytest.mark.cluster, pytest.mark.slow(minutes=4)]
SPLITS = "results/vase/split/splits.parquet"
STREAMED = "results/biomedica/train_clip/main/hybrid-0/model.safetensors"
FAILS_ONCE = "test -e failed || {{ touch failed; exit 3; }}; "


def hashes(results: Path) -> dict[str, dict[str, str]]:
    """{record: {output: sha256}} of all that a run made."""
    records = {str(path.relative_to(results)): json.loads(path.read_text()) for path in results.rglob("*meta.json")}
    return {path: {name: one["sha256"] for name, one in record["outputs"].items()} for path, record in records.items()}


def submitted(place: Path) -> list[tuple[str, int]]:
    """(state, MB of memory) of each job that was submitted from `place`."""
    fields = ("sacct", "-X", "--noheader", "--parsable2", "--units", "M", "--format", "WorkDir,State,ReqMem")
    rows = (line.split("|") for line in cluster.ask(*fields).splitlines())
    return [(state, int(memory.rstrip("M"))) for folder, state, memory in rows if Path(folder) == place]


def both(base: Path, target: str, settings: dict) -> tuple[Path, Path, str]:
    """Build a target locally, then by the profile from a fresh checkout; the two folders, and what the latter said.

    On the cluster `vase_split` fails when it is run for the first time.
    """
    place, local = cluster.checkout(base / "checkout"), base / "local"
    for folder in (place, local):
        (folder / "config").mkdir(parents=True, exist_ok=True)
        (folder / "config/config.yaml").write_text(yaml.safe_dump(settings))
        if (base / "data").exists():
            shutil.copytree(base / "data", folder / "data", copy_function=shutil.copy2)
    workflow.run(place, local, target)
    step = "{params.step} scripts.vase.split "
    workflow.edit(place / "rules/vase.smk", f'"{step.strip()}"', f'"{FAILS_ONCE}{step.strip()}"')
    return place, local, cluster.run(place, target).stdout


def test_short_rules_are_few_jobs_one_of_which_fails_once(tmp_path):
    """The group of the member that fails runs again, with more memory; nothing is missing at the end."""
    drawn = draw(tmp_path / "drawn")
    for name in ("images", "labelled"):
        shutil.copytree(drawn / name, tmp_path / "data/vase" / name)
    shutil.copy(drawn / "truth.parquet", tmp_path / "data/truth.parquet")
    place, local, said = both(tmp_path, SPLITS, VASE)
    made = hashes(place / "results")
    assert made == hashes(local / "results")
    shards = len(list((place / "results/vase/inspect_images").glob("*.parquet")))
    rules = {"vase_inspect_images", "vase_list_images", "vase_split", "vase_list_labelled", "vase_split_labelled"}
    assert set(workflow.finished(said)) == rules
    jobs = submitted(place)
    assert [state for state, _ in jobs] == ["COMPLETED"] * (shards + 1) + ["FAILED", "COMPLETED"], said
    assert jobs[-1][1] > 1.5 * jobs[-2][1]
    assert (place / "failed").exists() and not (local / "failed").exists()


def test_a_training_streams_from_the_hub_that_is_served_beside_it(tmp_path):
    place, local, said = both(tmp_path, STREAMED, BIOMEDICA)
    made, wanted = hashes(place / "results"), hashes(local / "results")
    for records in (made, wanted):
        del records["biomedica/index_local/meta.json"]["shards.parquet"]  # has the times of the drawn files
    assert made == wanted
    assert json.loads((place / STREAMED).with_name("meta.json").read_text())["reading"]["bytes"] > 0
    # Hub and training are one job; the hub of the local rule is served where Snakemake runs.
    assert workflow.finished(said)["demo_serve_hub"] == 2
    assert [state for state, _ in submitted(place)] == ["COMPLETED"] * 4
