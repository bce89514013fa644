"""Reconstruct the validation split, and keep what the scores need: features, PSNR, SSIM, LPIPS, and a few pictures.

Rule `rae_reconstruct`. Reconstructions go from the decoder straight into the statistics; none is written but those of
the sheet. Killed at any moment, the same command carries on from whole parts and, on a CPU, ends with the same bytes.
Under torchrun each process takes every n-th part.
"""

import argparse
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from scripts.common import devices, model_folders, parts, step, tables
from scripts.common.fingerprint import fingerprint
from scripts.common.settings import Settings, of_kind
from scripts.rae import checkpoints, evaluation, fid, pictures, quality
from scripts.rae.extractors import Extractor, load_extractor
from scripts.rae.perceptual import Lpips
from scripts.rae.poor_copies import shrunk
from scripts.rae.quality import SCORED
from scripts.rae.settings import EvaluateSettings, PerceptualSettings


class ReconstructSettings(Settings):
    """Settings of this step."""

    perceptual: PerceptualSettings = PerceptualSettings()
    evaluate: EvaluateSettings = EvaluateSettings()


def reconstruct(images: torch.Tensor, autoencoder: torch.nn.Module, accelerator) -> torch.Tensor:
    """Reconstructions uint8 [B,3,S,S] on the device, of uint8 images [B,3,S,S]."""
    with torch.inference_mode(), accelerator.autocast():
        made = autoencoder(images.to(accelerator.device).float() / 255)
    return quality.to_uint8(made.float())


@torch.inference_mode()
def score(images: torch.Tensor, made: torch.Tensor, lpips: Callable) -> dict[str, torch.Tensor]:
    """{column: [B] float64 on the CPU} of uint8 images [B,3,S,S] and their reconstructions.

    `shrunk_lpips` is the LPIPS of poor copies in their place: what a blur without a model reaches.
    """
    images = images.to(made.device)
    scores = {"psnr": quality.psnr(images, made), "ssim": quality.ssim(images, made)}
    for name, copies in (("lpips", made), ("shrunk_lpips", shrunk(images))):
        scores[name] = lpips(copies.float() / 127.5 - 1, images.float() / 127.5 - 1).double()
    return {name: values.cpu() for name, values in scores.items()}


def main(argv: Sequence[str] | None = None) -> None:
    made = step.parser(__doc__, ReconstructSettings)
    step.add_device(made)
    made.add_argument("--dataset", type=Path, required=True, help="dataset/ of rule rae_build_arrow")
    made.add_argument("--checkpoint", type=Path, required=True, help="autoencoder.safetensors")
    made.add_argument("--encoder", type=Path, required=True, help="folder of its encoder")
    made.add_argument("--vgg", type=Path, help="VGG16 weights of LPIPS (.pth)")
    made.add_argument("--inception", type=Path, help="weights of torch-fidelity's Inception (.pth)")
    made.add_argument("--state-folder", type=Path, required=True, help="where finished parts lie meanwhile")
    made.add_argument("--output-folder", type=Path, required=True, help="features.safetensors, images.parquet, ...")
    run(made.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    """Reconstruct what `args` name."""
    values = step.read_settings(args)
    own = values.evaluate
    accelerator = devices.make_accelerator(args.device, own.precision, step.threads(args))
    first = accelerator.is_main_process
    if not first:
        step.log.setLevel(logging.WARNING)
    inputs = {"dataset": args.dataset / "files.json", "checkpoint": args.checkpoint}
    inputs |= model_folders.identity(args.encoder)
    inputs |= {name: path for name, path in (("vgg", args.vgg), ("inception", args.inception)) if path}
    record = step.record(args, "scripts.rae.reconstruct", values, inputs)
    autoencoder, facts = checkpoints.load(args.checkpoint, args.encoder)
    autoencoder.to(accelerator.device)
    lpips = Lpips(args.vgg, values.perceptual.backbone).to(accelerator.device)
    extractor = load_extractor(own.extractor, args.inception, accelerator.device)
    split = evaluation.open_validation(args.dataset, facts.image_size, own.max_images)
    hashes = {name: one["sha256"] for name, one in record.inputs.items()}
    key = fingerprint(of_kind(values, "numerics"), hashes, record.code)
    outputs = compute(
        split, own, autoencoder, lpips, extractor, accelerator, args.state_folder, key, args.output_folder
    )  # fmt: skip
    if first:
        record.write(args.meta, outputs, items=len(split.pictures))


def compute(
    split: evaluation.Split,
    own: EvaluateSettings,
    autoencoder: torch.nn.Module,
    lpips: Callable,
    extractor: Extractor,
    accelerator,
    state: Path,
    key: str,
    out: Path,
) -> list[Path]:
    """The outputs in folder `out`, which the first process writes; parts lie meanwhile in `state`, below `key`."""
    groups, origin = fid.group_count(len(split.pictures)), evaluation.origin(split, extractor)
    outputs = [out / name for name in ("features.safetensors", "images.parquet", "reconstructions.png")]

    def read(rows: list[range]) -> Iterator[Iterator[torch.Tensor]]:
        return pictures.batches_of_parts(split.pictures, rows, own.batch_size, own.workers)

    def build(rows: range, batches: Iterator[torch.Tensor], file: Path) -> None:
        statistics = fid.FeatureStatistics(extractor.dim, origin)
        found: dict[str, list] = {name: [] for name in SCORED}
        for images in batches:
            made = reconstruct(images, autoencoder, accelerator)
            scores = score(images, made, lpips)
            statistics.add(extractor(made))
            for name in SCORED:
                found[name].append(scores[name].numpy())
        table = pd.DataFrame({"row": list(rows), **{name: np.concatenate(one) for name, one in found.items()}})
        tables.write_table(file.with_suffix(".parquet"), table, ["row"])
        statistics.save(file)

    with parts.built(
        state, key, len(split.pictures), own.images_per_part, read, build, accelerator, "reconstructions", groups
    ) as files:
        if accelerator.is_main_process:
            fid.save_groups(outputs[0], fid.merge_parts(files, groups))
            found = [tables.read_table(file.with_suffix(".parquet"), ["row", *SCORED]) for file in files]
            table = pd.concat(found).sort_values("row")
            named = table.assign(
                path=[split.names[r] for r in table["row"]], label=[split.labels[r] for r in table["row"]]
            )
            tables.write_table(outputs[1], named[["row", "path", "label", *SCORED]], ["row"])
            draw(outputs[2], split, own, autoencoder, accelerator)
            means = {name: round(float(table[name].mean()), 4) for name in SCORED}
            step.log.info("%d reconstructions: %s", len(table), means)
    return outputs


def draw(path: Path, split: evaluation.Split, own: EvaluateSettings, autoencoder, accelerator) -> None:
    """The sheet: some pictures, evenly spread over the split, above their reconstructions."""
    shown = np.linspace(0, len(split.pictures) - 1, min(own.sheet, len(split.pictures))).astype(int)
    images = torch.stack([split.pictures[int(row)][0] for row in shown])
    made = reconstruct(images, autoencoder, accelerator)
    title = f"Reconstructions of {len(split.pictures)} {split.name} pictures: {len(shown)} of them"
    pictures.draw_pairs(path, images, made.cpu(), [split.names[row] for row in shown], title)


if __name__ == "__main__":
    step.run(main)
