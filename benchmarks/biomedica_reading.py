"""Pairs per second from a hub, decoded, cropped and tokenized in batches, in each of three ways.

webdataset  webdataset over `pipe:curl -s -f -L URL`, decode("pil"), in a torch DataLoader
datasets    `datasets.load_dataset("webdataset", data_files=URLs, streaming=True)`, in a torch DataLoader
ours        the reader of rule `biomedica_train_clip`, all pairs streamed; it shuffles, the others do not

The three have the same shards, as many of them side by side as worker processes, the same crop and tokenizer. Each run
is an epoch in a process of its own, which starts its workers within the time and imports before it. All must give each
pair once, with the tokens of its caption, else the exit status is 1.
"""

import argparse
import functools
import os
import statistics
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import open_clip
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from benchmarks import biomedica_data as data
from benchmarks import measure
from scripts.biomedica.settings import TrainSettings
from scripts.biomedica.transforms import TrainTransform

WAYS = ("webdataset", "datasets", "ours")
TARGET = 1.3
REACHED = 0.95  # of the link's bandwidth, at which it counts as reached
Read = tuple[list[str], Tensor, Tensor]  # keys, images, tokens


def compare(args: argparse.Namespace, root: Path) -> dict[str, Any]:
    """Interleaved epochs of all ways; ends the program if one gives other pairs."""
    shards = data.draw_shards(root, args.shards, args.pairs, args.width, args.height)
    data.write_job(root, args)
    tokenize = open_clip.SimpleTokenizer()
    expected = marks(list(shards["captions"]), tokenize(list(shards["captions"].values())))
    made: dict[str, list[dict]] = {name: [] for name in WAYS}
    peaks: dict[str, float] = dict.fromkeys(WAYS, 0.0)
    with data.serve(root, args) as environment:

        def run(name: str) -> float:
            work = f"import json\nfrom benchmarks import biomedica_reading as one\nmade = one.{name}({str(root)!r})\n"
            done = measure.program(work + "print('\\n' + json.dumps(made))", environment, args.most_seconds)
            check(name, done.found.pop("marks"), expected)
            made[name].append(done.found)
            peaks[name] = max(peaks[name], done.peak_mb)
            return done.found["seconds"]

        seconds = measure.interleave({name: lambda name=name: run(name) for name in WAYS}, args.runs)
    pairs, link = shards["pairs"], args.bandwidth * 1e6
    rates = {name: pairs / statistics.median(values) for name, values in seconds.items()}
    shares = {name: shards["bytes"] / statistics.median(values) / link for name, values in seconds.items()}
    best = max(("webdataset", "datasets"), key=rates.__getitem__)
    found = measure.ratio(seconds[best], seconds["ours"])
    return {
        "webdataset": "WebDataset(pipe:curl -s -f -L URL, shardshuffle=False), decode('pil'), DataLoader",
        "datasets": "load_dataset('webdataset', data_files=URLs, streaming=True), DataLoader",
        "ours": f"hybrid.Loader, blocks of {args.shuffle_buffer} pairs of a lane shuffled",
        "pairs": pairs, "pixels": [args.width, args.height], "kilobytes_of_a_pair": shards["bytes_of_a_pair"] / 1e3,
        "megabytes": shards["bytes"] / 1e6, "shards": args.shards, "workers": args.workers,
        "batch_size": args.batch_size, "latency_ms": args.latency,
        "link_megabytes_per_second": args.bandwidth, "seconds": seconds, "pairs_per_second": rates,
        "share_of_link": shares,
        "cpu_seconds_of_a_pair": {
            name: statistics.median(one["cpu_seconds"] for one in runs) / pairs for name, runs in made.items()
        },
        "seconds_to_first_batch": {
            name: statistics.median(one["first_seconds"] for one in runs) for name, runs in made.items()
        },
        "peak_mb": peaks, "better_alternative": best, **found,
        "over": {name: measure.ratio(seconds[name], seconds["ours"]) for name in ("webdataset", "datasets")},
        "target_met": found["ratio"] >= TARGET or shares["ours"] >= REACHED,
    }  # fmt: skip


def check(name: str, found: list[list], expected: list[list]) -> None:
    """End the program unless a way gave each pair of the shards once; both are `marks`."""
    if sorted(found) != sorted(expected):
        sys.exit(f"{name}: other pairs than those of the shards, or not each once")


def marks(keys: list[str], tokens: Tensor) -> list[list]:
    """[key, checksum of its tokens] of each pair."""
    return [[key, zlib.crc32(row.numpy().tobytes())] for key, row in zip(keys, tokens, strict=True)]


def epoch(batches: Callable[[], Iterable[Read]]) -> dict[str, Any]:
    """Seconds to the last and to the first batch, CPU seconds of all processes, and what was read."""
    before, start = sum(os.times()[:4]), time.perf_counter()
    found, times = [], []
    for keys, images, tokens in batches():
        times.append(time.perf_counter() - start)
        if images.dtype != torch.uint8 or len(images) != len(keys):
            sys.exit(f"{images.dtype} images of shape {tuple(images.shape)} for {len(keys)} keys")
        found += marks(keys, tokens)
    spent = sum(os.times()[:4]) - before  # the workers have ended, and so count
    return {"seconds": times[-1], "first_seconds": times[0], "cpu_seconds": spent, "marks": found}


def webdataset(place: str) -> dict[str, Any]:
    """An epoch of webdataset."""
    import webdataset as wds

    commands = [f"pipe:curl -s -f -L {url}" for url in urls(place)]
    job = data.read_job(Path(place))

    def batches() -> DataLoader:
        pairs = wds.WebDataset(commands, shardshuffle=False, empty_check=False).decode("pil")
        return loader(job, pairs.to_tuple("__key__", "jpg", "txt").map(Crop(job)))

    return epoch(batches)


def datasets(place: str) -> dict[str, Any]:
    """An epoch of `datasets`; it reads the head of the first shard before the time."""
    from datasets import load_dataset

    rows = load_dataset("webdataset", data_files={"train": urls(place)}, split="train", streaming=True)
    job = data.read_job(Path(place))
    return epoch(lambda: loader(job, Rows(rows, Crop(job))))


def ours(place: str) -> dict[str, Any]:
    """An epoch of ours."""
    open_epoch = data.open_reader(Path(place))
    return epoch(lambda: ((one.keys, one.images, one.tokens) for one in open_epoch(0)))


def loader(job: dict[str, Any], pairs: IterableDataset) -> DataLoader:
    """Batches of pairs as `Crop` gives them."""
    together = functools.partial(collate, tokenize=open_clip.SimpleTokenizer())
    size, workers = job["plan"]["batch_size"], job["train"]["workers"]
    return DataLoader(pairs, batch_size=size, num_workers=workers, collate_fn=together)


class Crop:
    """(key, PIL image, caption) -> (key, uint8 [3,S,S], caption)."""

    def __init__(self, job: dict[str, Any]):
        self.transform = TrainTransform(data.preprocess_of(job["image_size"]), TrainSettings().crop_scale)

    def __call__(self, pair: tuple[str, Image.Image, str]) -> tuple[str, Tensor, str]:
        key, image, caption = pair
        return key, self.transform(image, zlib.crc32(key.encode())), caption


class Rows(IterableDataset):
    """What `datasets` streams, as `Crop` takes it; a worker's part is chosen by `datasets`."""

    def __init__(self, rows: IterableDataset, crop: Crop):
        self.rows, self.crop = rows, crop

    def __iter__(self) -> Iterator[tuple[str, Tensor, str]]:
        for row in self.rows:
            yield self.crop((row["__key__"], row["jpg"], row["txt"]))


def collate(pairs: list[tuple[str, Tensor, str]], tokenize: Callable[[list[str]], Tensor]) -> Read:
    """A batch."""
    keys, images, captions = zip(*pairs, strict=True)
    return list(keys), torch.stack(images), tokenize(list(captions))


def urls(place: str) -> list[str]:
    """Addresses of the shards."""
    endpoint = os.environ["HF_ENDPOINT"]
    return [f"{endpoint}/datasets/{data.REPO}/resolve/{data.REVISION}/{name}" for name in data.shards_of(Path(place))]
