"""The groups of short rules in the Slurm profile, planned on folders of empty files at the published sizes."""

import re
import subprocess
from pathlib import Path

import pytest
import workflow
import yaml

SHORT = ("light", "cpu")
FILES = (
    "busi/normal/a.png", "busi/benign/b.png", "busi/malignant/c.png", "imagenet/a/a.jpg", "imagenet/b/b.jpg",
    "slides/labels.json", "slides/a.h5", "biomedica/0.tar",
    "vase/images/a_1_ac001001.jpg", "vase/labelled/0/a.jpg", "vase/labelled/1/b.jpg", "vase/truth.parquet",
    "vase/captions.json", "vase/questions.json",
)  # fmt: skip
SETTINGS = (
    "vase.truth=data/vase/truth.parquet vase.dataset.captions=data/vase/captions.json"
    " vase.dataset.questions=data/vase/questions.json biomedica.compare_seeds=[0,1]"
)


def groups(root: Path) -> dict[str, str]:
    """{rule: group} of the profile."""
    return yaml.safe_load((root / "slurm/config.yaml").read_text())["groups"]


def classes(root: Path) -> dict[str, str]:
    """{rule: resource class as written in it}; rules without one are left out."""
    found = {}
    for path in root.glob("rules/*.smk"):
        for block in re.split(r"^(?=rule |checkpoint |use )", path.read_text(), flags=re.MULTILINE)[1:]:
            if written := re.search(r"\*\*class_resources\((.+)\),", block):
                found[re.split(r"[ :]", block)[1]] = written[1].strip('"')
    return found


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A run folder with one empty file of each kind."""
    folder = tmp_path_factory.mktemp("profile")
    for name in FILES:
        path = folder / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return folder


def plan(root: Path, data: Path, given: dict[str, str], more: str = "") -> subprocess.CompletedProcess:
    """A dry run of all pipelines with these groups and more settings."""
    pairs = [f"{rule}={group}" for rule, group in given.items()]
    return workflow.run(
        root, data, "report", "vase", "--dry-run", "--config", f"set={SETTINGS} {more}", "--groups", *pairs, check=False
    )


def test_groups_are_of_short_rules_alone(root):
    written = classes(root)
    assert len(written) > 50 and written["rae_train_autoencoder"] == "CONFIG.rae.resources"
    strange = {rule: written.get(rule) for rule in groups(root) if written.get(rule) not in SHORT}
    assert strange == {}


def test_each_group_can_be_submitted(root, data):
    """No group waits for what waits for it, which Snakemake finds out only when it plans."""
    given = groups(root)
    done = plan(root, data, given)
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(re.findall(r"Group job (\w+) ", done.stdout + done.stderr)) == set(given.values())
    # Between the two lies the classifier's training.
    wrong = plan(root, data, given | dict.fromkeys(("vase_split_labelled", "vase_split"), "vase_choose"))
    assert wrong.returncode and "This is not allowed" in wrong.stdout + wrong.stderr


def test_variants_do_not_wait_for_each_other(root, data):
    """What a variant of the classifier chooses is a job beside that of `main`, and not one with it."""
    done = plan(root, data, groups(root), "vase.variants.low.classifier.lr=1e-4")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (done.stdout + done.stderr).count("Group job vase_choose ") == 2


def test_a_group_is_no_larger_than_one_of_its_rules(root):
    """So many as are packed together are named, and each of those is light."""
    profile = yaml.safe_load((root / "slurm/config.yaml").read_text())
    written = classes(root)
    for group in profile["group-components"]:
        assert {written[rule] for rule, name in profile["groups"].items() if name == group} == {"light"}


def test_nothing_in_the_profile_makes_array_jobs_or_asks_sacct(root):
    profile = yaml.safe_load((root / "slurm/config.yaml").read_text())
    assert profile["slurm-status-command"] == "squeue"
    assert not any("array" in key for key in profile)
