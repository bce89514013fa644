"""Shards of drawn figures in BIOMEDICA's layout, a hub on this machine that serves them, and how they are read."""

import argparse
import contextlib
import io
import json
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pandas as pd
from accelerate import Accelerator
from open_clip.transform import PreprocessCfg

from benchmarks import measure, pictures
from scripts.biomedica import planning, train_clip
from scripts.biomedica.hybrid import Batch
from scripts.biomedica.model import Clip
from scripts.biomedica.remote import Hub
from scripts.biomedica.settings import HeldOutSettings, PlanSettings, RemoteSettings, TrainSettings
from scripts.biomedica.training import Loader
from scripts.common import devices, tables
from scripts.common.artefacts import read_json, sha256_file, write_json

REPO, REVISION = "kiln/figures", "main"
DISTINCT = 64  # pictures; then come copies, each with a comment of its own
WORDS = ("cells", "stained", "imaged", "microscopy", "treatment", "mice", "antibody", "mean", "confocal", "bar")
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
    """What a program reads: settings of both sides in root/job.json, and the plan of ours."""
    policy = PlanSettings(
        samples=args.shards * args.pairs, epochs=epochs, batch_size=args.batch_size, lanes=args.workers,
        shuffle_buffer=args.shuffle_buffer,
    )  # fmt: skip
    own = {"workers": args.workers, "prefetch": args.prefetch}
    job = {"plan": policy.model_dump(), "train": own, "image_size": args.image_size}
    write_json(root / "job.json", job)


def read_job(root: Path) -> dict[str, Any]:
    """What `write_job` wrote."""
    return read_json(root / "job.json")


def shards_of(root: Path) -> dict[str, Path]:
    """{name: path} of the shards in the repo below root/hub."""
    return {path.name: path for path in sorted((root / "hub/datasets" / REPO).glob("*.tar"))}


def preprocess_of(image_size: int) -> dict[str, Any]:
    """open_clip's own, for square images of so many pixels."""
    return asdict(PreprocessCfg(size=(image_size, image_size)))


def open_plan(root: Path, policy: PlanSettings) -> planning.Plan:
    """`policy.samples` pairs, all of them streamed, which are those that the shards below root/hub hold."""
    sizes = {name: path.stat().st_size for name, path in shards_of(root).items()}
    mean = 0.999 * sum(sizes.values()) / policy.samples  # so that no shard counts as one pair too small
    return planning.make_plan(policy, HELD_OUT, "hybrid", 0, list(sizes.items()), mean)


def open_loader(
    root: Path, plan: planning.Plan, policy: PlanSettings, own: TrainSettings, clip: Clip, accelerator: Accelerator
) -> Loader:
    """What opens an epoch in rule `biomedica_train_clip`."""
    listed = pd.DataFrame(
        [(name, sha256_file(path)) for name, path in shards_of(root).items()], columns=["name", "sha256"]
    )
    tables.write_table(root / "remote/shards.parquet", listed, ["name"])
    values = train_clip.TrainStepSettings(held_out=HELD_OUT, plan=policy, train=own)
    folders = argparse.Namespace(index=None, shards=None, remote=root / "remote")
    return train_clip.make_loader(folders, values, plan, clip, Hub(RemoteSettings(repo=REPO), REVISION), accelerator)


def open_reader(root: Path) -> Callable[[int], Iterable[Batch]]:
    """What gives the batches of an epoch of a job, without a model."""
    job = read_job(root)
    policy, own = PlanSettings(**job["plan"]), TrainSettings(**job["train"])
    plan = open_plan(root, policy)
    clip = Clip(None, open_clip.SimpleTokenizer(), "", {}, preprocess_of(job["image_size"]))
    loader = open_loader(root, plan, policy, own, clip, devices.make_accelerator("cpu", "fp32", 1))
    return lambda epoch: loader(epoch % plan.epochs, 0, {}, {}, {})
