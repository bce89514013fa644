"""Rule `rae_reconstruct` against writing PNGs and giving their folders to torch-fidelity.

alternative  the same model; a PNG of each reconstruction and of each picture; then
             torch_fidelity.calculate_metrics(fid=True) on the two folders
ours         rule `rae_reconstruct`: from the decoder straight into the statistics; PSNR, SSIM and LPIPS by a small
             stack come on top, which the alternative does without

Both read the same Arrow split and quantise alike, so the scores must agree. Clocks start after the imports and stop
before the Fréchet distance, which both take from the same function and whose time does not grow with the pictures.
Our reference features are an artefact of their own, made once for all models; the alternative's figure is given
without its work on the reference, too, as its cache would have it from a second model on. The autoencoder is small, so
that reading, writing and features weigh as they do beside a fast GPU.
"""

import argparse
import json
import shutil
import statistics
import sys
import time
import unittest.mock
from pathlib import Path

import numpy as np
import torch
import torch_fidelity
from PIL import Image
from torch_fidelity import metric_fid

from benchmarks import measure, rae_data
from scripts.common import devices
from scripts.rae import (
    checkpoints,
    compute_reference_stats,
    evaluation,
    extractors,
    fid,
    pictures,
    quality,
    reconstruct,
)
from scripts.rae.decoder import Size
from scripts.rae.perceptual import Lpips

TARGET, TOLERANCE = 1.5, 1e-3
LPIPS = (4,)
INPUT, PATCH, WIDTH, LAYERS = 224, 14, 64, 2  # of the encoder; the decoder is as wide and deep
LAYER = {extractors.INCEPTION: "2048", extractors.RANDOM: "64"}


def prepare(root: Path, args: argparse.Namespace) -> None:
    """The models, below `root`, which holds dataset/."""
    rae_data.write_encoder(
        root / "encoder", hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=4, patch_size=PATCH
    )
    size = Size(LAYERS, WIDTH, 4 * WIDTH, 4)
    rae_data.write_checkpoint(root / "autoencoder.safetensors", root / "encoder", INPUT, args.image_size, size)
    if args.extractor == extractors.INCEPTION:
        rae_data.write_inception(root / "inception.pth")


def _options(place: dict, count: int, out: str, **settings) -> list[str]:
    """Options of our steps, for the first `count` pictures."""
    own = {"extractor": place["extractor"], "inception": None, "max_images": count, "workers": place["workers"]}
    values = {**settings, "evaluate": own | {"batch_size": place["batch_size"]}}
    root = Path(place["root"])
    given = ["--inception", str(root / "inception.pth")] if place["extractor"] == extractors.INCEPTION else []
    return [
        "--dataset", str(root / "dataset"), *given, "--state-folder", str(root / "state"), "--output-folder", out,
        "--meta", f"{out}/meta.json", "--device", place["device"], "--threads", str(place["threads"]),
        "--settings", json.dumps(values),
    ]  # fmt: skip


def reference(place: dict, count: int) -> dict:
    """Our reference statistics; seconds."""
    options = _options(place, count, f"{place['root']}/reference", image_size=place["image_size"])
    return {"seconds": measure.seconds_of(lambda: compute_reference_stats.main(options), torch.device(place["device"]))}


def ours(place: dict, count: int) -> dict:
    """Rule `rae_reconstruct`; seconds."""
    root = place["root"]
    options = _options(place, count, f"{root}/ours", perceptual={"weights": None, "backbone": LPIPS})
    options += ["--checkpoint", f"{root}/autoencoder.safetensors", "--encoder", f"{root}/encoder"]
    return {"seconds": measure.seconds_of(lambda: reconstruct.main(options), torch.device(place["device"]))}


def alternative(place: dict, count: int) -> dict:
    """PNGs and torch-fidelity; the score, seconds without the distance, seconds of the reference's part, PNG sizes."""
    root, clock, marks = Path(place["root"]), time.perf_counter, {"distance": 0.0, "reference": 0.0}
    folders = {name: root / "pngs" / name for name in ("made", "given")}
    for folder in folders.values():
        folder.mkdir(parents=True)

    def timed(name: str, work, when=lambda *_: True):
        def call(*args, **kwargs):
            start = clock()
            found = work(*args, **kwargs)
            marks[name] += clock() - start if when(*args) else 0
            return found

        return call

    start = clock()
    device = torch.device(place["device"])
    torch.set_num_threads(place["threads"])
    model, facts = checkpoints.load(root / "autoencoder.safetensors", root / "encoder")
    model.to(device)
    split = evaluation.open_validation(root / "dataset", facts.image_size, count)

    def write(folder: Path, images: torch.Tensor, first: int) -> None:
        for number, one in enumerate(images.permute(0, 2, 3, 1).numpy(), start=first):
            Image.fromarray(one).save(folder / f"{number:08d}.png")

    write_given, number = timed("reference", write), 0
    for images in pictures.batches(split.pictures, range(count), place["batch_size"], place["workers"]):
        with torch.inference_mode():
            made = quality.to_uint8(model(images.to(device).float() / 255)).cpu()
        write(folders["made"], made, number)
        write_given(folders["given"], images, number)
        number += len(images)
    statistic = metric_fid.fid_input_id_to_statistics_cached
    second = timed("reference", statistic, lambda which, *_: which == 2)
    distance = timed("distance", metric_fid.fid_statistics_to_metric)
    weights = str(root / "inception.pth") if place["extractor"] == extractors.INCEPTION else None
    with (
        unittest.mock.patch.object(metric_fid, "fid_input_id_to_statistics_cached", second),
        unittest.mock.patch.object(metric_fid, "fid_statistics_to_metric", distance),
    ):
        found = torch_fidelity.calculate_metrics(
            input1=str(folders["made"]), input2=str(folders["given"]), fid=True, cache=False, verbose=False,
            cuda=device.type == "cuda", batch_size=place["batch_size"],
            feature_extractor=place["extractor"], feature_layer_fid=LAYER[place["extractor"]],
            feature_extractor_weights_path=weights,
        )  # fmt: skip
    seconds = clock() - start - marks["distance"]
    sizes = {name: statistics.mean(one.stat().st_size for one in f.iterdir()) / 1e3 for name, f in folders.items()}
    shutil.rmtree(root / "pngs")
    return {
        "rfid": found[metric_fid.KEY_METRIC_FID], "seconds": seconds, "distance_seconds": marks["distance"],
        "without_reference_seconds": seconds - marks["reference"], "png_kilobytes": sizes,
    }  # fmt: skip


def profile(place: dict, count: int) -> dict[str, float]:
    """Milliseconds per picture of each part of our side, in this process, after one of each."""
    root, device = Path(place["root"]), torch.device(place["device"])
    accelerator = devices.make_accelerator(place["device"], "fp32", place["threads"])
    model, facts = checkpoints.load(root / "autoencoder.safetensors", root / "encoder")
    weights = root / "inception.pth" if place["extractor"] == extractors.INCEPTION else None
    extractor, lpips = extractors.load_extractor(place["extractor"], weights, device), Lpips(None, LPIPS).to(device)
    split, model = evaluation.open_validation(root / "dataset", facts.image_size, count), model.to(device)
    images = next(pictures.batches(split.pictures, range(count), min(count, place["batch_size"]), 0))
    there, total = images.to(device), fid.FeatureStatistics(extractor.dim, evaluation.origin(split, extractor))
    features = extractor(there)
    buffer = root / "one.png"

    @torch.inference_mode()
    def forward():
        with accelerator.autocast():
            return model(there.float() / 255)

    small = there.float() / 127.5 - 1
    parts = {
        "read, decode and crop": lambda: [split.pictures[i] for i in range(len(images))],
        "encoder and decoder": forward,
        "features": lambda: extractor(there),
        "statistics": lambda: total.add(features),
        "PSNR": lambda: quality.psnr(there, there),
        "SSIM": lambda: quality.ssim(there, there),
        "LPIPS, small stack": lambda: lpips(small, small),
        "alternative: write a PNG": lambda: [
            Image.fromarray(np.ascontiguousarray(one)).save(buffer) for one in images.permute(0, 2, 3, 1).numpy()
        ],
    }
    found = {}
    for name, part in parts.items():
        part()
        times = [measure.seconds_of(part, device) for _ in range(3)]
        found[name] = statistics.median(times) * 1000 / len(images)
    return found


def memory_counts(args: argparse.Namespace) -> list[int]:
    """Numbers of pictures that fill one batch of each group, and twice as many."""
    return [fid.GROUPS * args.batch_size, 2 * fid.GROUPS * args.batch_size]


def compare(args: argparse.Namespace, root: Path) -> dict:
    """Interleaved runs of both; ends the program if the scores differ."""
    prepare(root, args)
    place = {name: getattr(args, name) for name in ("extractor", "workers", "batch_size", "device", "threads")}
    place |= {"root": str(root), "image_size": args.image_size}
    made: dict[str, list[dict]] = {"alternative": [], "ours": []}
    peaks = dict.fromkeys(made, 0.0)

    def call(name: str, count: int = args.evaluated) -> measure.Done:
        work = f"import json\nfrom benchmarks import rae_evaluation as one\nmade = one.{name}({place!r}, {count})\n"
        return measure.program(work + "print('\\n' + json.dumps(made))")

    def run(name: str) -> float:
        done = call(name)
        peaks[name] = max(peaks[name], done.peak_mb)
        made[name].append(done.found)
        return done.found["seconds"]

    first = call("reference").found
    for name in () if args.smallest else made:  # a warm-up
        call(name, max(4, args.evaluated // 4))
    seconds = measure.interleave({name: lambda name=name: run(name) for name in made}, args.runs)
    theirs = made["alternative"][0]["rfid"]
    paths = (root / "reference/reference.safetensors", root / "ours/features.safetensors")
    mine = fid.frechet_distance(*(fid.merge(fid.load_groups(path)) for path in paths))
    if abs(mine - theirs) > TOLERANCE * abs(theirs):
        sys.exit(f"rFID of ours {mine}, of the alternative {theirs}")
    median = {name: statistics.median(values) for name, values in seconds.items()}
    cached = [one["without_reference_seconds"] for one in made["alternative"]]
    found = measure.ratio(seconds["alternative"], seconds["ours"])
    growth = {count: call("ours", count).peak_mb for count in memory_counts(args)}
    return {
        "alternative": "a PNG of each reconstruction and picture; torch_fidelity.calculate_metrics(fid=True, "
        f"feature_extractor={args.extractor!r}), which reads with 4 processes",
        "model": f"DINOv2 with registers, width {WIDTH}, {LAYERS} layers, input {INPUT}; decoder alike; random weights",
        "extractor": f"{args.extractor}, random weights",
        "images": args.evaluated, "image_size": args.image_size, "batch_size": args.batch_size, "dtype": "fp32",
        "threads": args.threads, "workers": args.workers,
        "rfid": {"ours": mine, "alternative": theirs}, "png_kilobytes": made["alternative"][0]["png_kilobytes"],
        "seconds": seconds, "images_per_second": {name: args.evaluated / value for name, value in median.items()},
        **found, "target": TARGET, "target_met": found["ratio"] >= TARGET,
        "alternative_with_cached_reference": measure.ratio(cached, seconds["ours"]),
        "our_reference_seconds": first["seconds"],
        "distance_seconds": statistics.median(one["distance_seconds"] for one in made["alternative"]),
        "peak_mb": peaks, "our_peak_mb_by_images": growth,
        "milliseconds_per_image": call("profile", min(args.evaluated, 2 * args.batch_size)).found,
    }  # fmt: skip
