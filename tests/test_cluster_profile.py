"""`snakemake --profile slurm` from a fresh checkout: the same bytes as a local run, in fewer jobs than rules."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import cluster
import pytest
import workflow
import yaml
from test_biomedica_workflow import SETTINGS as BIOMEDICA

pytestmark = [pytest.mark.cluster, pytest.mark.slow(minutes=6)]
SMALL = "demo.draw.vases=40 demo.clip.epochs=2 vase.classifier.epochs=2 vase.images_per_shard=2000"
STREAMED = "results/biomedica/train_clip/hybrid-0/model.safetensors"
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


def both(
    base: Path, target: str, arguments: Sequence[str] = (), settings: dict | None = None
) -> tuple[Path, Path, str]:
    """Build a target locally, then from a fresh checkout on the cluster; the two folders and what the latter said."""
    place, local = cluster.checkout(base / "checkout"), base / "local"
    for folder in (place, local):
        (folder / "config").mkdir(parents=True, exist_ok=True)
        (folder / "config/config.yaml").write_text(yaml.safe_dump(settings or {}))
    workflow.run(place, local, target, *arguments)
    workflow.edit(
        place / "rules/vase.smk", '"{params.step} scripts.vase.select_views"',
        f'"{FAILS_ONCE}{{params.step}} scripts.vase.select_views"',
    )  # fmt: skip
    return place, local, cluster.run(place, target, *arguments).stdout


def test_vase_images_in_few_jobs_one_of_which_fails_once(tmp_path, root):
    """The group's failing member has all of it run again, with more memory; nothing is missing at the end."""
    arguments = ("--configfile", str(root / "config/demo.yaml"), "--config", f"set={SMALL}")
    place, local, said = both(tmp_path, "vase_images", arguments)
    made = hashes(place / "results")
    assert made == hashes(local / "results") and len(made) >= 15
    jobs, rules = submitted(place), sum(workflow.finished(said).values()) - 1  # but for the target
    assert [state for state, _ in jobs].count("COMPLETED") == len(jobs) - 1 < rules / 2
    first, again = (memory for _, memory in jobs[-2:])
    assert jobs[-2][0] == "FAILED" and again > 1.5 * first
    assert (place / "failed").exists() and not (local / "failed").exists()
    assert len(re.findall(r"Submitted batch job|SLURM jobid", said)) >= len(jobs)


def test_a_training_streams_from_the_hub_that_is_served_beside_it(tmp_path):
    place, local, _ = both(tmp_path, STREAMED, settings=BIOMEDICA)
    made = hashes(place / "results")
    assert made == hashes(local / "results")
    assert json.loads((place / STREAMED).with_name("meta.json").read_text())["reading"]["bytes"] > 0
    assert {state for state, _ in submitted(place)} == {"COMPLETED"}
