"""Shards of drawn figures in BIOMEDICA's layout, a hub on this machine that serves them, and how they are read."""

import contextlib
import io
import itertools
import json
import os
import subprocess
import sys
import tarfile
import time
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
from open_clip.transform import PreprocessCfg
from torch import Tensor

from benchmarks import measure, pictures
from scripts.biomedica import planning
from scripts.biomedica.hybrid import Loader
from scripts.biomedica.reading import Reading
from scripts.biomedica.remote import Hub
from scripts.biomedica.settings import HeldOutSettings, IndexSettings, PlanSettings, RemoteSettings, TrainSettings
from scripts.biomedica.transforms import TrainTransform
from scripts.common.artefacts import read_json, write_json

DISTINCT = 64  # pictures; then come copies, each with a comment of its own
WORDS = "cells were stained with antibody and imaged by microscopy after treatment of mice scale bar shows the mean".split()
CAPTION, ABSTRACT = 40, 300  # words
HELD_OUT = HeldOutSettings(validation=1e-9, test=1e-9)  # so that all pairs are for training


def draw_shards(folder: Path, shards: int, pairs_of_shard: int, width: int, height: int) -> dict[str, Any]:
    """`shards` tars of jpg, json and txt by key; every pair's caption is its own. Returns what they hold.

    Returns: {"pairs", "bytes": of all shards, "bytes_of_a_pair": of its three files, "captions": {key: caption}}.
    """
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
    facts = {"image_panel_type": "plots", "image_panel_subtype": "bar plots", "article_abstract": " ".join(words[CAPTION:])}
    return key, f"Figure {number}. {' '.join(words[:CAPTION])}", facts


@contextlib.contextmanager
def serve(folder: Path, latency_ms: float, megabytes_per_second: float) -> Iterator[str]:
    """Address of a hub with the repos below `folder`, in a process of its own."""
    port = folder.parent / "hub.url"
    port.unlink(missing_ok=True)
    command = [
        sys.executable, "-m", "scripts.demo.serve_hub", "--folder", str(folder), "--port-file", str(port),
        "--latency-ms", str(latency_ms), "--megabytes-per-second", str(megabytes_per_second),
    ]  # fmt: skip
    server = subprocess.Popen(command, cwd=measure.ROOT)
    try:
        while not port.exists():
            if server.poll() is not None:
                sys.exit(f"the hub ended with status {server.returncode}")
            time.sleep(0.1)
        yield port.read_text().strip()
    finally:
        server.terminate()
        server.wait()
