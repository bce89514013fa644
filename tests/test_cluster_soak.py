"""The demo on a cluster that keeps killing its jobs: what comes out at the end is what comes out undisturbed."""

import functools
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import cluster
import pandas as pd
import pytest
import workflow

ROOT = Path(__file__).resolve().parents[1]
KILLS = 8
TARGETS = ("vase_images", "rae", "biomedica")
# The jobs of the demo, each of them shorter, so that two cores can be done in time.
SHORT = (
    "demo.draw.vases=40 demo.draw.labelled_vases=40 demo.draw.shared_vases=8 demo.draw.clip_vases=40 "
    "demo.clip.epochs=4 demo.digits.pictures=400 demo.figures.figures=800 vase.classifier.epochs=2 "
    "rae.use=[dinov2] rae.dataset.images_per_shard=150 "
    "rae.autoencoder.epochs=2 rae.autoencoder.discriminator_start=1 rae.autoencoder.gan_start=1 "
    "biomedica.plan.samples=320 biomedica.plan.epochs=2 biomedica.train.warmup_steps=4 biomedica.compare_seeds=[0]"
)
OFTEN = "vase.classifier.save_minutes=0.02 rae.autoencoder.save_minutes=0.02 biomedica.train.save_minutes=0.02"


class Kill(NamedTuple):
    """What was done to a job: how, when (seconds since the start), and to which (its comment: rule and wildcards)."""

    way: str
    seconds: float
    job: str
    rule: str


def without_seconds(path: Path) -> str:
    """A report's text, but for how long it took."""
    return re.sub(r'"processing_time_(seconds|minutes)": [\d.]+', "", path.read_text())


# Files that tell of times, as those of the original project do, or of when the demo drew a file.
TIMELESS = {
    "filtering_report.json": without_seconds,
    "best_views_report.json": without_seconds,
    "filtering_stats.json": without_seconds,
    "shards.parquet": lambda path: pd.read_parquet(path).drop(columns="mtime_ns", errors="ignore").to_json(),
}


def demo(folder: Path) -> Path:
    """A checkout with the demo's configuration."""
    place = cluster.checkout(folder)
    shutil.copy(ROOT / "config/demo.yaml", place / "config")
    return place


def artefacts(place: Path) -> dict[str, str]:
    """{meta.json, name in it: sha256, or what is timeless} of every artefact; each is on the disk with its bytes."""
    results = place / "results/demo"
    digest = functools.cache(lambda path: hashlib.sha256(path.read_bytes()).hexdigest())
    found = {}
    for meta in [*results.rglob("meta.json"), *results.rglob("*.meta.json")]:
        for name, record in json.loads(meta.read_text())["outputs"].items():
            there = [path for path in meta.parent.rglob(name) if path.stat().st_size == record["bytes"]]
            assert record["sha256"] in map(digest, there), f"{meta}: {name}"
            timeless = TIMELESS.get(name)
            found[f"{meta.relative_to(results)}: {name}"] = timeless(there[0]) if timeless else record["sha256"]
    return found


def payload(job: str) -> Iterator[int]:
    """The processes of a job that run a step itself, not what starts or watches it."""
    for entry in Path("/proc").iterdir():
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
            environment = (entry / "environ").read_bytes().split(b"\0")
        except OSError:  # it is no process, or has just ended
            continue
        module = words[words.index(b"-m") + 1] if b"-m" in words[:-1] else b""
        is_step = module.startswith(b"scripts.") and module != b"scripts.common.launch"
        if is_step and f"SLURM_JOB_ID={job}".encode() in environment:
            yield int(entry.name)


def kill(job: cluster.Job, way: str) -> bool:
    """Do it; False if the job got away."""
    if way == "sigkill":
        pids = list(payload(job.id))
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        return bool(pids)
    command = ["scancel", job.id] if way == "scancel" else ["scontrol", "requeue", job.id]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def disturb(place: Path, snakemake: subprocess.Popen, kills: int, seed: int, pause: tuple[float, float]) -> list[Kill]:
    """Kill running jobs, each at most once, at seeded moments and in seeded ways, until `kills` are done."""
    chance, done, start = random.Random(seed), [], time.monotonic()
    while len(done) < kills and snakemake.poll() is None:
        time.sleep(chance.uniform(*pause))
        spared = {one.rule for one in done}
        running = [job for job in cluster.jobs(place) if job.state == "RUNNING" and job.comment not in spared]
        if running:
            job, way = chance.choice(running), chance.choice(["scancel", "sigkill", "requeue"])
            if kill(job, way):
                done.append(Kill(way, round(time.monotonic() - start, 1), job.id, job.comment))
    return done


def soak(folder: Path, targets: tuple[str, ...], settings: str, kills: int, seed: int, pause: tuple[float, float],
         minutes: float) -> None:  # fmt: skip
    """Make the targets undisturbed on this machine and disturbed on the cluster, and compare."""
    arguments = [*targets, "--configfile", "config/demo.yaml", "--config", f"set={settings} {OFTEN}".strip()]
    alone, place = demo(folder / "alone"), demo(folder / "place")
    command = [*workflow.command(alone, alone), *arguments]
    done = subprocess.run(command, cwd=alone, capture_output=True, text=True, timeout=60 * minutes)
    assert done.returncode == 0, done.stderr[-6000:]
    start = time.monotonic()
    snakemake = cluster.start(place, *arguments)
    log = place / "snakemake.log"
    try:
        killed = disturb(place, snakemake, kills, seed, pause)
        print(*killed, sep="\n")
        status = snakemake.wait(60 * minutes)
    except subprocess.TimeoutExpired:
        pytest.fail(f"not done {minutes} min after the last kill: {cluster.jobs(place)}\n{log.read_text()[-8000:]}")
    finally:
        snakemake.kill()
        for job in cluster.jobs(place):
            subprocess.run(["scancel", job.id], check=False)
    seconds = time.monotonic() - start
    text = log.read_text()
    print(f"{seconds:.0f} s, {sum(workflow.finished(text).values())} jobs, {text.count('Trying to restart')} retries")
    assert status == 0, text[-8000:]
    assert len(killed) == kills == len({one.rule for one in killed})
    expected = artefacts(alone)
    assert len(expected) > 30
    assert artefacts(place) == expected
    assert not list((place / "results/demo").rglob("*.partial")) + list((place / "results/demo").rglob(".*.tmp"))


@pytest.mark.cluster
@pytest.mark.slow(minutes=8)
def test_images_autoencoder_and_clip_under_kills(tmp_path):
    soak(tmp_path, TARGETS, SHORT, KILLS, seed=0, pause=(8, 30), minutes=25)


@pytest.mark.cluster
@pytest.mark.slow(minutes=60)
def test_the_whole_demo_under_kills(tmp_path):
    soak(tmp_path, ("all",), "", 24, seed=1, pause=(10, 60), minutes=90)
