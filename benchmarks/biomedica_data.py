"""Shards of drawn figures in BIOMEDICA's layout, a hub on this machine that serves them, and how they are read."""

import argparse
import contextlib
import io
import json
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
from open_clip.transform import PreprocessCfg

from benchmarks import measure, pictures
from scripts.biomedica import planning
from scripts.biomedica.hybrid import Loader
from scripts.biomedica.reading import Reading
from scripts.biomedica.remote import Hub
from scripts.biomedica.settings import HeldOutSettings, IndexSettings, PlanSettings, RemoteSettings, TrainSettings
from scripts.biomedica.transforms import TrainTransform
from scripts.common.artefacts import read_json, write_json

REPO, REVISION, SEED = "kiln/figures", "main", 42
DISTINCT = 64  # pictures; then come copies, each with a comment of its own
WORDS = tuple(
    [
        "cells",
        "stained",
        "with",
        "antibody",
        "and",
        "imaged",
        "by",
        "confocal",
        "microscopy",
        "after",
        "treatment",
        "of",
        "mice",
        "mean",
        "bar",
    ]
)
CAPTION, ABSTRACT = 40, 300  # words
HELD_OUT = HeldOutSettings(validation=1e-9, test=1e-9)  # so that all pairs are for training


def draw_shards(root: Path, shards: int, pairs_of_shard: int, width: int, height: int) -> dict[str, Any]:
    """`shards` tars of jpg, json and txt by key in the repo below root/hub; every pair has a caption of its own.

    Returns: {"pairs", "bytes": of all shards, "bytes_of_a_pair": of its three files, "captions": {key: caption}}.
    """
    folder = root / "hub/datasets" / REPO
    folder.mkdir(parents=True)
    count = shards * pairs_of_shard
    drawn = [pictures.draw_jpeg(number, width, height) for number in range(min(count, DISTINCT))]
    captions, content, total = {}, 0, 0
    for shard in range(shards):
        path = folder / f"{shard:06d}.tar"
        with tarfile.open(path, "w") as tar:
            for number in range(shard * pairs_of_shard, (shard + 1) * pairs_of_shard):
                key, caption, facts = describe(number)
                captions[key] = caption
                jpeg = pictures.with_note(drawn[number % len(drawn)], number)
                for ending, data in (("jpg", jpeg), ("json", json.dumps(facts).encode()), ("txt", caption.encode())):
                    member = tarfile.TarInfo(f"{key}.{ending}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
                    content += len(data)
        total += path.stat().st_size
    return {"pairs": count, "bytes": total, "bytes_of_a_pair": content / count, "captions": captions}


def describe(number: int) -> tuple[str, str, dict[str, str]]:
    """Key, caption and metadata of a pair."""
    words = np.random.default_rng([1, number]).choice(WORDS, CAPTION + ABSTRACT).tolist()
    key = f"{number // 200}-PMC{number:07d}-{number % 5}-{number:08x}"
    facts = {
        "image_panel_type": "plots",
        "image_panel_subtype": "bar plots",
        "article_abstract": " ".join(words[CAPTION:]),
    }
    return key, f"Figure {number}. {' '.join(words[:CAPTION])}", facts


@contextlib.contextmanager
def serve(root: Path, args: argparse.Namespace) -> Iterator[dict[str, str]]:
    """A hub with the repo below root/hub, in a process of its own: environment of the programs that read from it."""
    address = root / "hub.url"
    command = [
        sys.executable, "-m", "scripts.demo.serve_hub", "--folder", str(root / "hub"), "--port-file", str(address),
        "--latency-ms", str(args.latency), "--megabytes-per-second", str(args.bandwidth),
    ]  # fmt: skip
    server = subprocess.Popen(command, cwd=measure.ROOT)
    try:
        while not address.exists():
            if server.poll() is not None:
                sys.exit(f"the hub ended with status {server.returncode}")
            time.sleep(0.1)
        yield {
            "HF_ENDPOINT": address.read_text().strip(), "HF_HOME": str(root / "home"), "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": "127.0.0.1", "HF_HUB_OFFLINE": "0", "OMP_NUM_THREADS": "1",
        }  # fmt: skip
    finally:
        server.terminate()
        server.wait()
        address.unlink(missing_ok=True)


def write_job(root: Path, args: argparse.Namespace, epochs: int = 1) -> None:
    """What a program reads: settings of both sides, and the plan of ours, in root/job.json."""
    policy = PlanSettings(
        samples=args.shards * args.pairs, epochs=epochs, batch_size=args.batch_size, lanes=args.workers,
        shuffle_buffer=args.shuffle_buffer,
    )  # fmt: skip
    plan = plan_all(root, policy)
    job = {"batch_size": args.batch_size, "image_size": args.image_size, "workers": args.workers}
    write_json(root / "job.json", job | {"prefetch": args.prefetch, "plan": plan.to_json()})


def plan_all(root: Path, policy: PlanSettings) -> planning.Plan:
    """`policy.samples` pairs, all of them streamed, and as many as the shards below root/hub hold."""
    sizes = {path.name: path.stat().st_size for path in sorted((root / "hub/datasets" / REPO).glob("*.tar"))}
    mean = 0.999 * sum(sizes.values()) / policy.samples  # so that no shard counts as one pair too small
    return planning.make_plan(policy, HELD_OUT, "hybrid", 0, list(sizes.items()), mean)


def read_job(place: str) -> dict[str, Any]:
    """What `write_job` wrote below `place`."""
    return read_json(Path(place) / "job.json")


def transform_of(job: dict[str, Any]) -> TrainTransform:
    """The crop of rule `biomedica_train_clip`."""
    return TrainTransform(asdict(PreprocessCfg(size=job["image_size"])), TrainSettings().crop_scale)


def open_reader(job: dict[str, Any]) -> tuple[Reading, Hub]:
    """How rule `biomedica_train_clip` reads the pairs of a job, all of them streamed."""
    plan = planning.Plan.from_json(job["plan"])
    policy = PlanSettings(shuffle_buffer=plan.shuffle_buffer)
    reading = Reading(
        plan, SEED, IndexSettings(), HELD_OUT, policy, job["prefetch"], transform_of(job), open_clip.SimpleTokenizer()
    )
    return reading, Hub(RemoteSettings(repo=REPO), REVISION)


def epoch_of(reading: Reading, hub: Hub, epoch: int, workers: int) -> Loader:
    """The batches of an epoch."""
    return Loader(reading, None, hub, epoch % reading.plan.epochs, workers=workers)
