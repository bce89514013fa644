"""Features of the validation split's own pictures, which every rFID is measured against, and of two poor copies.

Rule `rae_compute_reference_stats`. An artefact of its own, which carries the hash of the list of pictures, the
preprocessing and the extractor. The poor copies are the floor of the scores: pictures made 8 times smaller and large
again, and each picture's mean colour; the floor of PSNR and SSIM is one constant picture, the mean of all. Killed at
any moment, the same command carries on from whole parts. Under torchrun each process takes every n-th part.
"""

import argparse
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from scripts.common import artefacts, devices, parts, step
from scripts.common.fingerprint import fingerprint
from scripts.common.settings import Settings, of_kind
from scripts.rae import evaluation, fid, latent_stats, pictures, quality
from scripts.rae.extractors import Extractor, load_extractor
from scripts.rae.poor_copies import SHRINK, mean_colour, shrunk
from scripts.rae.settings import EvaluateSettings


class ReferenceStatsSettings(Settings):
    """Settings of this step."""

    image_size: int = 256
    evaluate: EvaluateSettings = EvaluateSettings()


COPIES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "reference": lambda images: images, "shrunk": shrunk, "colour": mean_colour
}  # fmt: skip


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
    hashes = {name: one["sha256"] for name, one in record.inputs.items()}
    key = fingerprint(of_kind(values, "numerics"), hashes, record.code)
    outputs = compute(split, own, extractor, accelerator, args.state_folder, key, args.output_folder)
    if first:
        record.write(args.meta, outputs, items=len(split.pictures))


def compute(
    split: evaluation.Split,
    own: EvaluateSettings,
    extractor: Extractor,
    accelerator,
    state: Path,
    key: str,
    out: Path,
) -> list[Path]:
    """The outputs in folder `out`, which the first process writes; parts lie meanwhile in `state`, below `key`."""
    groups, origin = fid.group_count(len(split.pictures)), evaluation.origin(split, extractor)
    outputs = [out / f"{kind}.safetensors" for kind in COPIES] + [out / "floor.json"]

    def read(rows: list[range]) -> Iterator[Iterator[torch.Tensor]]:
        return pictures.batches_of_parts(split.pictures, rows, own.batch_size, own.workers)

    def build(_: range, batches: Iterator[torch.Tensor], file: Path) -> None:
        found = {kind: fid.FeatureStatistics(extractor.dim, origin) for kind in COPIES}
        pixels = latent_stats.Moments((3, split.image_size, split.image_size))
        for images in batches:
            for kind, copy in COPIES.items():
                found[kind].add(extractor(copy(images)))
            pixels.add(images)
        pixels.save(_beside(file, "pixels"))
        for kind in reversed(COPIES):
            found[kind].save(_beside(file, kind))

    with parts.built(
        state, key, len(split.pictures), own.images_per_part, read, build, accelerator, "the reference", groups
    ) as files:
        if accelerator.is_main_process:
            for kind, output in zip(COPIES, outputs, strict=False):
                fid.save_groups(output, fid.merge_parts([_beside(file, kind) for file in files], groups))
            mean = latent_stats.merge(latent_stats.Moments.load(_beside(file, "pixels")) for file in files).mean
            artefacts.write_json(outputs[-1], floor(split, own, mean, accelerator.device))
            step.log.info("%d pictures in %d groups, extractor %s", len(split.pictures), groups, own.extractor)
    return outputs


def _beside(file: Path, kind: str) -> Path:
    """The file of one kind of a part; that of the reference, written last, is the part's own."""
    return file if kind == "reference" else file.with_name(f"{kind}-{file.name}")


def floor(split: evaluation.Split, own: EvaluateSettings, mean: torch.Tensor, device: torch.device) -> dict:
    """Mean PSNR and SSIM of the constant picture `mean` [3,S,S] (0-255), and of each picture's own mean colour."""
    constant = quality.to_uint8((mean / 255).float()[None]).to(device)
    found: dict[str, list] = {f"{kind}_{name}": [] for kind in ("constant", "colour") for name in ("psnr", "ssim")}
    for images in pictures.batches(split.pictures, range(len(split.pictures)), own.batch_size, own.workers):
        images = images.to(device)
        for kind, copies in (("constant", constant.expand_as(images)), ("colour", mean_colour(images))):
            found[f"{kind}_psnr"].append(quality.psnr(images, copies))
            found[f"{kind}_ssim"].append(quality.ssim(images, copies))
    every = {name: float(torch.cat(one).mean()) for name, one in found.items()}
    return every | {"n": len(split.pictures), "shrink": SHRINK}


if __name__ == "__main__":
    step.run(main)
