"""What may happen to results between two runs: another user, an edit, a clock, a copy, a Python, a pin.

All on one short run of busi, from pictures to the split, in two environments: `tables` and `vision`.
"""

import getpass
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import venv
from pathlib import Path

import pytest
import rerun_cases
import workflow
import yaml

from scripts.common import edited, env_key, file_times, locks
from scripts.common.artefacts import Record, sha256_file, write_listing
from scripts.common.errors import KilnError
from scripts.demo import draw_ultrasound

DRAWN = {"normal": 8, "benign": 8, "malignant": 8, "identical": 2, "near": 2, "conflicts": 0, "image_size": 48}
SPLIT = "results/busi/split/splits.csv"
PAIRS = "results/busi/find_duplicates/pairs.parquet"
MANIFEST = "results/busi/list_images/manifest.parquet"
ALL = {"busi_list_images": 1, "busi_find_duplicates": 1, "busi_split": 1}
CONDA = """#!/bin/sh
case "$1" in
    info) echo '{"conda_prefix": "/nowhere", "platform": "linux-64"}' ;;
    config) echo '{"get": {"channel_priority": "strict"}}' ;;
    *) echo conda 25.0.0 ;;
esac
"""
BY_TIME = ("--max-checksum-file-size", "0")  # as for large files, whose content Snakemake does not compare
SETTINGS = {
    "device": "cpu",
    "resources": {name: {"threads": 1, "mem_mb": 1000} for name in ("light", "cpu", "gpu_single")},
    "busi": {"images": "data/images", "split": {"train": 0.5, "validation": 0.2, "test": 0.3}},
}


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory) -> tuple[Path, Path]:
    """A checkout and a run folder in which the pictures are split."""
    base = tmp_path_factory.mktemp("faults")
    checkout, run = workflow.copy_checkout(base / "checkout"), base / "run one"
    run.mkdir()
    options = ["--output-folder", str(run / "data"), "--meta", str(base / "drawn.json"), "--threads", "1"]
    draw_ultrasound.main([*options, "--settings", json.dumps(DRAWN)])
    (run / "config").mkdir()
    (run / "config/config.yaml").write_text(yaml.safe_dump(SETTINGS))
    workflow.run(checkout, run, SPLIT)
    return checkout, run


@pytest.fixture
def copied(finished_run, tmp_path) -> tuple[Path, Path]:
    """A copy of both, to be changed."""
    return workflow.copies(finished_run, tmp_path)


def said(done: subprocess.CompletedProcess) -> str:
    return done.stdout + done.stderr


def test_nothing_changed_reruns_nothing(finished_run):
    assert workflow.planned(*finished_run, SPLIT) == {}


# --- two users in one results folder --------------------------------------------------------------------------------


def test_a_second_run_in_one_results_folder_stops_and_names_the_first(copied, tmp_path):
    """From two working directories, of which Snakemake's own lock knows nothing; until the first is killed."""
    checkout, run = copied
    results, other = tmp_path / "shared", tmp_path / "other"
    (run / "config/config.yaml").write_text(yaml.safe_dump(SETTINGS | {"results": str(results)}))
    shutil.copytree(run, other, ignore=shutil.ignore_patterns("results", ".snakemake"))
    workflow.edit(
        checkout / "scripts/busi/list_images.py", "def main(", "import time\n\ntime.sleep(600)\n\n\ndef main("
    )
    target = [f"{results}/busi/list_images/manifest.parquet"]
    first = subprocess.Popen(
        workflow.command(checkout, run, *target), start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not (results / "writer.lock").exists() or not locks.is_taken(results):
        assert time.monotonic() < deadline and first.poll() is None, "the first run never held the results"
        time.sleep(0.05)
    second = workflow.run(checkout, other, *target, check=False)
    planned = workflow.planned(checkout, other, *target)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    assert second.returncode and not workflow.finished(said(second))
    expected = f"{results}: another process writes here: snakemake, pid {first.pid} of {getpass.getuser()} on "
    assert expected in said(second) and "Hint: " in said(second), said(second)
    assert planned == {"busi_list_images": 1}, "a dry run looks and does not write"
    assert not locks.is_taken(results)


# --- edited by hand -------------------------------------------------------------------------------------------------


def flip_a_byte(path: Path) -> None:
    """Same length, other content."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
def test_a_manifest_edited_by_hand_is_not_used(copied, dry):
    checkout, run = copied
    recorded = sha256_file(run / MANIFEST)
    flip_a_byte(run / MANIFEST)
    done = workflow.run(checkout, run, SPLIT, *dry, check=False)
    assert done.returncode and not workflow.finished(said(done))
    assert f"{MANIFEST}: changed since it was made" in said(done)
    for text in (recorded, sha256_file(run / MANIFEST), "Hint: delete", f"rm '{MANIFEST}'"):
        assert text in said(done)


def test_once_deleted_it_is_made_anew_for_who_needs_it(copied):
    (copied[1] / MANIFEST).unlink()
    assert workflow.planned(*copied, SPLIT) == {}, "what was made of it stands"
    assert workflow.planned(*copied, SPLIT, "--forcerun", "busi_find_duplicates") == ALL


def artefact(folder: Path, content: str = "content") -> Path:
    """A result with its record beside it."""
    folder.mkdir(parents=True)
    (folder / "table.tsv").write_text(content)
    Record("scripts.a.step", {}, {}, "key").write(folder / "meta.json", [folder / "table.tsv"])
    return folder / "table.tsv"


def test_only_what_may_have_changed_is_read(tmp_path, monkeypatch):
    tables = [artefact(tmp_path / str(number)) for number in range(20)]
    newer = time.time() + 10
    os.utime(tables[3], (newer, newer))  # touched, and not changed
    tables[4].write_text("CONTENT")
    os.utime(tables[4], (newer, newer))
    tables[5].write_text("longer than before")
    os.utime(tables[5], (1, 1))
    read = []
    monkeypatch.setattr(edited, "sha256_file", lambda path: read.append(path) or sha256_file(path))
    assert [one.path for one in edited.find(tables)] == [tables[4], tables[5]]
    assert read == [tables[3], tables[4]]


def test_a_file_of_a_folder_that_is_a_result(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    (tmp_path / "model/links").symlink_to("nowhere")
    write_listing(tmp_path / "model")
    edited.refuse([tmp_path / "model/files.json"])
    (tmp_path / "model/config.json").write_text('{"layers": 3}')
    with pytest.raises(KilnError, match="model/config.json: changed since") as error:
        edited.refuse([tmp_path / "model/files.json", tmp_path / "missing"])
    assert error.value.hint.endswith(f"rm '{tmp_path}/model/files.json'")


# --- a clock that jumps back ----------------------------------------------------------------------------------------


def test_results_from_the_future_make_nothing_look_old(copied):
    checkout, run = copied
    later = time.time() + 7200
    for number, path in enumerate(sorted((run / "results/busi").rglob("*.*"))):
        if "split" not in path.parts:
            os.utime(path, (later + number, later + number))
    other = ("--config", "set=busi.split.seed=9", *BY_TIME)
    workflow.run(checkout, run, SPLIT, "--forcerun", "busi_split", *other)
    assert workflow.planned(checkout, run, SPLIT, *other) == {}


def test_a_users_file_from_the_future_is_named(tmp_path):
    theirs = tmp_path / "truth.csv"
    theirs.write_text("")
    file_times.bring_back_from_future([], [theirs, tmp_path / "missing"])
    os.utime(theirs, (time.time() + 7200,) * 2)
    with pytest.raises(KilnError, match="truth.csv: its time lies 120 minutes in the future"):
        file_times.bring_back_from_future([], [theirs])
    with pytest.raises(KilnError, match="120 minutes"):  # before a training, not after it
        Record("scripts.a.step", {}, {"truth": theirs}, "key")


def test_a_step_on_a_machine_whose_clock_is_behind_waits(tmp_path):
    upstream = artefact(tmp_path / "one")
    os.utime(upstream, (time.time() + 1.5,) * 2)
    made = Record("scripts.a.step", {}, {"table": upstream}, "key")
    (tmp_path / "made").write_text("")
    made.write(tmp_path / "meta.json", [tmp_path / "made"])
    assert (tmp_path / "meta.json").stat().st_mtime >= upstream.stat().st_mtime


# --- a copy on another machine --------------------------------------------------------------------------------------


def shuffled_copy(run: Path, place: Path, *left_out: str) -> Path:
    """A run folder as a copy without times leaves it: the results in any order, younger than everything else."""
    shutil.copytree(run, place, ignore=shutil.ignore_patterns("results", *left_out))
    shutil.copytree(run / "results", place / "results", copy_function=shutil.copyfile)
    rng, now = random.Random(4), time.time()
    for path in sorted((place / "results").rglob("*")):
        when = now - rng.random() * 1000
        os.utime(path, (when, when))
    return place


@pytest.mark.parametrize("left_out", [(), (".snakemake",)])
def test_a_copy_with_other_times_reruns_nothing_and_later_what_it_should(finished_run, tmp_path, left_out):
    checkout, run = finished_run[0], shuffled_copy(finished_run[1], tmp_path / "there", *left_out)
    before = list((run / "results/records").iterdir())
    assert workflow.planned(checkout, run, SPLIT, "--config", "set=busi.split.seed=9", *BY_TIME) == {"busi_split": 1}
    assert workflow.planned(checkout, run, SPLIT, *BY_TIME) == {}
    assert before == list((run / "results/records").iterdir())
    (run / PAIRS).touch()
    (run / "results/busi/find_duplicates/groups.parquet").touch()
    assert workflow.planned(checkout, run, SPLIT, *BY_TIME) == {"busi_split": 1}


def test_results_under_another_name_are_known_too(finished_run, tmp_path):
    checkout, run = finished_run[0], shuffled_copy(finished_run[1], tmp_path / "there", ".snakemake")
    (run / "results").rename(run / "kept")
    target, at = SPLIT.replace("results", "kept"), "set=results=kept"
    assert workflow.planned(checkout, run, target, "--config", at, *BY_TIME) == {}
    assert workflow.planned(checkout, run, target, "--config", f"{at} busi.split.seed=9") == {"busi_split": 1}


def test_a_second_users_older_records_give_way(copied, tmp_path):
    """Who ran here before someone else did has records of results that are no more."""
    checkout, run = copied
    other = Path(shutil.copytree(run / ".snakemake", tmp_path / "theirs"))
    changed = ("--config", "set=busi.split.seed=9")
    workflow.run(checkout, run, SPLIT, *changed)
    shutil.rmtree(run / ".snakemake")
    other.rename(run / ".snakemake")
    assert workflow.planned(checkout, run, SPLIT, *changed) == {}
    assert workflow.planned(checkout, run, SPLIT) == {"busi_split": 1}


@pytest.mark.parametrize("spoil", [flip_a_byte, lambda path: os.truncate(path, 10)])
def test_a_copy_that_is_not_whole_stops(finished_run, tmp_path, spoil):
    checkout, run = finished_run[0], shuffled_copy(finished_run[1], tmp_path / "there")
    spoil(run / PAIRS)
    done = workflow.run(checkout, run, SPLIT, check=False)
    assert done.returncode and f"{PAIRS}: " in said(done) and "Hint: copy again" in said(done), said(done)
    (run / PAIRS).unlink()
    assert workflow.planned(checkout, run, SPLIT) == {}, "nobody needs it again"


# --- another Python, another environment ----------------------------------------------------------------------------


def test_another_interpreter_reruns_nothing(finished_run, tmp_path):
    """Elsewhere on the disk; that its minor version changes no code key is tested with the code keys."""
    venv.create(tmp_path / "venv", symlinks=True)
    there = tmp_path / "venv/bin/python"
    site = next((tmp_path / "venv/lib").glob("python*/site-packages"))
    (site / "same.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    command = workflow.command(
        *finished_run, SPLIT, "--dry-run", "--config", "set=busi.split.seed=9", "--printshellcmds"
    )
    done = subprocess.run([str(there), *command[1:]], capture_output=True, text=True, timeout=300)
    assert workflow.count_jobs(said(done)) == {"busi_split": 1}, said(done)
    assert f"{there} -m scripts.busi.split" in said(done)


@pytest.mark.parametrize("family, jobs", rerun_cases.PINS)
def test_a_pin_reruns_the_rules_of_its_environment(copied, family, jobs):
    checkout, run = copied
    file = checkout / f"envs/{family}.yaml"
    file.write_text(re.sub(r"numpy==\S+", "numpy==2.0.0", file.read_text()))
    assert workflow.planned(checkout, run, SPLIT) == jobs


def test_conda_is_switched_on_and_nothing_reruns(copied, tmp_path, monkeypatch):
    checkout, run = copied
    conda = tmp_path / "bin/conda"
    conda.parent.mkdir()
    conda.write_text(CONDA)
    conda.chmod(0o755)
    monkeypatch.setenv("PATH", f"{conda.parent}:{os.environ['PATH']}")
    assert workflow.planned(checkout, run, SPLIT, "--sdm", "conda") == {}
    for path in (run / ".snakemake/metadata").iterdir():  # as if made with conda, and it were off now
        path.write_text(json.dumps(json.loads(path.read_text()) | {"software_stack_hash": "of an environment"}))
    assert workflow.planned(checkout, run, SPLIT) == {}


def test_the_order_of_packages_and_the_version_of_python_do_not_count(tmp_path):
    text = "dependencies: [python=3.11, pip, ffmpeg=7, {pip: [a==1, b==2]}]"
    (tmp_path / "one.yaml").write_text(text)
    (tmp_path / "same.yaml").write_text("dependencies: [{pip: [b==2, a==1]}, ffmpeg=7, python=3.12]")
    (tmp_path / "pip.yaml").write_text(text.replace("b==2", "b==3"))
    (tmp_path / "conda.yaml").write_text(text.replace("ffmpeg=7", "ffmpeg=8"))
    keys = {path.stem: env_key.env_key(path) for path in tmp_path.iterdir()}
    assert keys["one"] == keys["same"] and len(set(keys.values())) == 3


def test_the_page_shows_these_cases():
    assert not rerun_cases.stale(), f"{rerun_cases.stale()}\nHint: make config"
    for _, _, place in rerun_cases.FAULTS:
        file, _, test = place.rpartition("::")
        assert f"def {test}(" in Path(__file__).with_name(file or Path(__file__).name).read_text(encoding="utf-8")
