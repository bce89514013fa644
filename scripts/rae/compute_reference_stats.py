"""Features of the validation split's own pictures, which every rFID is measured against, and of two poor copies.

Rule `rae_compute_reference_stats`. An artefact of its own, which carries the hash of the list of pictures, the
preprocessing and the extractor. The poor copies are the floor of the scores: pictures made 8 times smaller and large
again, and one constant picture, the mean. Killed at any moment, the same command carries on from whole parts. Under
torchrun each process takes every n-th part.
"""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import interpolate

from scripts.common import artefacts, devices, step
from scripts.common.settings import Settings, of_kind
from scripts.common.training_state import fingerprint
from scripts.rae import evaluation, fid, latent_stats, parts, pictures, quality
from scripts.rae.extractors import load_extractor
from scripts.rae.settings import EvaluateSettings

SHRINK = 8


class ReferenceStatsSettings(Settings):
    """Settings of this step."""

    image_size: int = 256
    evaluate: EvaluateSettings = EvaluateSettings()


def shrunk(images: torch.Tensor) -> torch.Tensor:
    """uint8 [B,3,S,S], made 8 times smaller by the mean of squares and large again, bicubic: uint8."""
    side = images.shape[-1]
    small = interpolate(images.float() / 255, size=max(1, side // SHRINK), mode="area")
    return quality.to_uint8(interpolate(small, size=side, mode="bicubic", align_corners=False))


def main(argv: Sequence[str] | None = None) -> None:
    made = step.parser(__doc__, ReferenceStatsSettings)
    step.add_device(made)
    made.add_argument("--dataset", type=Path, required=True, help="dataset/ of rule rae_build_arrow")
    made.add_argument("--inception", type=Path, help="weights of torch-fidelity's Inception (.pth)")
    made.add_argument("--state-folder", type=Path, required=True, help="where finished parts lie meanwhile")
    made.add_argument("--output-folder", type=Path, required=True, help="reference.safetensors, floor.json, ...")
    run(made.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    """Compute the statistics that `args` name."""
    values = step.read_settings(args)
    own = values.evaluate
    accelerator = devices.make_accelerator(args.device, own.precision, step.threads(args))
    first = accelerator.is_main_process
    if not first:
        step.log.setLevel(logging.WARNING)
    inputs = {"dataset": args.dataset / "files.json"} | ({"inception": args.inception} if args.inception else {})
    record = step.record(args, "scripts.rae.compute_reference_stats", values, inputs)
    extractor = load_extractor(own.extractor, args.inception, accelerator.device)
    split = evaluation.open_validation(args.dataset, values.image_size, own.max_images)
    origin = evaluation.origin(split, extractor)
    hashes = {name: one["sha256"] for name, one in record.inputs.items()}
    key = fingerprint(of_kind(values, "numerics"), hashes, record.code)

    def build(part: range, file: Path) -> None:
        found = {kind: fid.FeatureStatistics(extractor.dim, origin) for kind in ("reference", "shrunk")}
        pixels = latent_stats.Moments((3, values.image_size, values.image_size))
        for images in pictures.batches(split.pictures, part, own.batch_size, own.workers):
            found["reference"].add(extractor(images))
            found["shrunk"].add(extractor(shrunk(images)))
            pixels.add(images)
        found["shrunk"].save(_beside(file, "shrunk"))
        pixels.save(_beside(file, "pixels"))
        found["reference"].save(file)

    with parts.built(
        args.state_folder, key, len(split.pictures), own.images_per_part, build, accelerator, "the reference"
    ) as files:
        if first:
            write(args, split, own, files, record)


def _beside(file: Path, kind: str) -> Path:
    return file.with_name(f"{kind}-{file.name}")


def write(args, split: evaluation.Split, own: EvaluateSettings, files: Sequence[Path], record) -> None:
    """Put the parts together and write all outputs."""
    out = args.output_folder
    outputs = [out / name for name in ("reference.safetensors", "shrunk.safetensors", "floor.json")]
    fid.merge([fid.FeatureStatistics.load(file) for file in files]).save(outputs[0])
    fid.merge([fid.FeatureStatistics.load(_beside(file, "shrunk")) for file in files]).save(outputs[1])
    mean = latent_stats.merge([latent_stats.Moments.load(_beside(file, "pixels")) for file in files]).mean
    constant = quality.to_uint8((mean / 255).float()[None])
    psnr = []
    for images in pictures.batches(split.pictures, range(len(split.pictures)), own.batch_size, own.workers):
        psnr.append(quality.psnr(images, constant.expand(len(images), -1, -1, -1)).numpy())
    every = np.concatenate(psnr)
    artefacts.write_json(outputs[2], {"constant_psnr": float(every.mean()), "n": len(every), "shrink": SHRINK})
    step.log.info("%d pictures, extractor %s", len(every), own.extractor)
    record.write(args.meta, outputs, items=len(every))


if __name__ == "__main__":
    step.run(main)
