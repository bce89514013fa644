"""What the plan says before any job: GPUs that are not there, where settings come from, an account not yet set."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import workflow
import yaml

from scripts.common import cluster_guard, locks

ROOT = Path(__file__).resolve().parents[1]
NO_GPU = "no GPU is seen on this machine: "
ASKING = "busi_train_lora, busi_merge, busi_predict ask for one, and would "


def snakemake(folder: Path, *arguments: str, checkout: Path = ROOT, **variables: str) -> str:
    """All that Snakemake says in a folder, on a machine that shows no GPU."""
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(checkout / "Snakefile"), *arguments]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""} | variables
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    return done.stdout + done.stderr


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder with an empty picture in each class of busi."""
    for name in ("normal", "benign", "malignant"):
        (tmp_path / "data/busi" / name).mkdir(parents=True)
        (tmp_path / f"data/busi/{name}/a.png").touch()
    return tmp_path


def given(base: str = "qwen2.5-vl-3b-instruct", more: str = "") -> tuple[str, str]:
    return "--config", f"set=busi.images=data/busi busi.base.model={base} busi.base.family=qwen {more}"


@pytest.mark.parametrize(("device", "would"), [("auto", "run on its CPU"), ("cuda", "fail, for device = cuda")])
def test_jobs_that_ask_for_a_gpu_are_named_where_there_is_none(folder, device, would):
    said = snakemake(folder, "busi", "-n", "--cores", "1", *given(more=f"device={device}"))
    (line,) = [one for one in said.splitlines() if one.startswith(NO_GPU)]
    assert line.startswith(f"{NO_GPU}{ASKING}{would}")
    assert said.index(NO_GPU) > said.index("This was a dry-run"), "below the list of jobs, which is long"
    assert "Hint: run where GPUs are" in said and "device=cpu" in said


def test_a_run_says_it_before_any_job(folder):
    with locks.writer_lock(folder / "results", "probe", mode=0o666):
        said = snakemake(folder, "busi", "--cores", "1", *given())
    assert f"{NO_GPU}{ASKING}" in said
    assert said.index(NO_GPU) < said.index("another process writes here: probe")
    assert not (folder / "results/logs").exists()


def test_nothing_is_said_of_gpus_where_none_is_asked_for(folder):
    assert NO_GPU not in snakemake(folder, "busi", "-n", "--cores", "1", *given(more="device=cpu"))
    listed = snakemake(folder, "busi_list_images", "-n", "--cores", "1", *given())
    assert NO_GPU not in listed and "busi_list_images" in listed
    demo = snakemake(folder, "-n", "--cores", "1", "--configfile", str(ROOT / "config/demo.yaml"))
    assert NO_GPU not in demo and "busi_train_lora" in demo


def test_a_wrong_key_is_told_with_its_file_and_default(folder):
    (folder / "config").mkdir()
    (folder / "config/config.yaml").write_text("vase: {classifier: {epochs: many}}")
    (folder / "mine.yaml").write_text("busi: {train: {lr: fast}}")
    said = snakemake(folder, "-n", "--configfile", "mine.yaml", "--config", "device=gpu", "set=rae.autoencoder.lrr=1")
    for source, key in (
        ("config/config.yaml", "vase.classifier.epochs = 'many'"),
        ("mine.yaml", "busi.train.lr = 'fast'"),
        ("--config", "device = 'gpu'"),
        ("--config set=...", "unknown key 'rae.autoencoder.lrr'"),
    ):
        assert f"settings from {source}: {key}" in said
    assert "vase.classifier.epochs: whole number, > 0; default 200" in said


def test_the_users_file_is_among_the_files_that_snakemake_names(folder):
    mine = folder / "mine.yaml"
    mine.write_text("{}")
    (folder / "config").mkdir()
    own = folder / "config/config.yaml"
    own.write_text(yaml.safe_dump({"busi": {"images": "data/busi"}, "device": "cpu"}))
    for files in ([mine], [mine, own]):
        said = snakemake(folder, "busi_list_images", "-n", "--cores", "1", "--configfile", *map(str, files))
        (line,) = [one for one in said.splitlines() if one.strip().startswith("Config file(s): ")]
        assert line.count(str(own)) == 1 and line.count(str(mine)) == 1


COUNTS = "config/config.yaml counts beneath mine.yaml, by what it alone sets: "


@pytest.fixture
def two_files(folder) -> Path:
    """A folder with the user's own file, of which mine.yaml leaves one value as it is."""
    (folder / "config").mkdir()
    own = {"busi": {"images": "data/busi", "list": {"classes": ["normal", "benign", "malignant"]}}, "device": "cpu"}
    (folder / "config/config.yaml").write_text(yaml.safe_dump(own))
    (folder / "mine.yaml").write_text(yaml.safe_dump({"busi": {"images": "data/busi"}, "device": "cpu"}))
    return folder


def test_what_the_users_file_sets_beneath_another_is_said_by_its_keys(two_files):
    said = snakemake(two_files, "busi_list_images", "-n", "--configfile", "mine.yaml")
    assert f"{COUNTS}busi.list.classes\n" in said
    with locks.writer_lock(two_files / "results", "probe", mode=0o666):
        said = snakemake(two_files, "busi_list_images", "--cores", "1", "--configfile", "mine.yaml")
    assert said.index(COUNTS) < said.index("another process writes here: probe")


@pytest.mark.parametrize("arguments", [
    [],
    ["--configfile", "mine.yaml", "config/config.yaml"],
    ["--configfile", "mine.yaml", "--config", "set=busi.list.classes=[normal,benign,malignant]"],
])  # fmt: skip
def test_nothing_is_said_of_a_users_file_that_sets_nothing_alone_or_was_asked_for(two_files, arguments):
    said = snakemake(two_files, "busi_list_images", "-n", *arguments)
    assert "This was a dry-run" in said and "config.yaml counts" not in said


@pytest.mark.parametrize("arguments", [["bus"], ["busi", "--forcerun", "bus"], ["--until", "bus"]])
def test_a_misspelt_target_is_told_at_once_with_the_nearest_names(tmp_path, arguments):
    said = snakemake(tmp_path, "-n", *arguments)
    assert "Error: bus: no rule has this name\nHint: did you mean busi? " in said and "MissingRule" not in said


def test_a_misspelt_rule_to_accept_is_told_before_missing_data(tmp_path):
    for target in ("busi", "busy"):  # where `make accept` takes it from the rule
        said = snakemake(tmp_path, target, "-n", "--quiet", KILN_ACCEPT="busi_trian_lora")
        assert "Error: busi_trian_lora: no rule has this name\nHint: did you mean busi_train_lora? " in said
        assert "no such folder" not in said


def test_a_dry_run_without_conda_plans_and_says_that_a_run_would_stop(folder):
    path = "/usr/bin:/bin"
    if shutil.which("conda", path=path):
        pytest.skip("this machine has conda for all")
    arguments = ("busi_list_images", *given(more="device=cpu"), "--cores", "1", "--sdm", "conda")
    said = snakemake(folder, "-n", *arguments, PATH=path)
    no_conda = "environments of rules are made by conda, and there is no command `conda`\nHint: "
    assert said.index("This was a dry-run") < said.index(no_conda)
    said = snakemake(folder, *arguments, PATH=path)
    assert no_conda in said and not (folder / "results").exists()


@pytest.fixture
def cluster(folder, tmp_path_factory):
    """A dry run by the Slurm profile, where `sacctmgr` knows some accounts."""
    checkout = workflow.copy_checkout(tmp_path_factory.mktemp("checkout"))
    workflow.edit(checkout / "slurm/config.yaml", "software-deployment-method: conda\n", "")
    commands = tmp_path_factory.mktemp("commands")

    def plan(accounts: str) -> str:
        for name, text in (("sacctmgr", accounts), ("sbatch", "")):
            (commands / name).write_text(f"#!/bin/sh\nprintf '{text}'\n")
            (commands / name).chmod(0o755)
        path = f"{commands}:{os.environ['PATH']}"
        profile = ("--profile", str(checkout / "slurm"))
        return snakemake(folder, "busi", "-n", *profile, *given(), checkout=checkout, PATH=path)

    return plan


def test_a_dry_run_for_slurm_is_as_calm_as_one_for_this_machine(cluster):
    said = cluster("ml\\n")
    assert "This was a dry-run" in said and "Reason: Missing output files" in said
    for noise in ("-m scripts.", "Shell command", "never awaited", NO_GPU, "slurm_account = "):
        assert noise not in said


def test_a_dry_run_for_slurm_says_that_the_account_is_not_set(cluster):
    said = cluster("physics\\n")
    assert "slurm_account = ml: Slurm knows no such account of yours" in said and "your accounts: physics" in said
    assert said.index("slurm_account = ml") > said.index("This was a dry-run")
    unknown = cluster("")
    assert unknown.count("slurm_account = ml is the example of slurm/config.yaml") == 1


def test_the_example_is_the_account_of_the_profile(root):
    profile = yaml.safe_load((root / "slurm/config.yaml").read_text())
    assert profile["default-resources"]["slurm_account"] == cluster_guard.EXAMPLE_ACCOUNT
