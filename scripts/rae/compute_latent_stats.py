"""Mean and variance of an encoder's clean latents over the train split: exact, whatever the number of processes.

Rule `rae_compute_latent_stats`. Moments are kept by part of the split in float64 and merged in the order of parts.
Killed at any moment, the same command carries on from whole parts and, on a CPU, ends with the same bytes. Under
torchrun each process takes every n-th part.
"""

import argparse
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from scripts.common import devices, model_folders, parts, step
from scripts.common.fingerprint import fingerprint
from scripts.common.settings import Settings, of_kind
from scripts.rae import arrow, latent_stats, pictures
from scripts.rae.encoder import Encoder
from scripts.rae.grid import decoder_patch
from scripts.rae.settings import EncoderSettings, LatentStatsSettings


class ComputeLatentStatsSettings(Settings):
    """Settings of this step."""

    image_size: int = 256
    encoder: EncoderSettings
    latent_stats: LatentStatsSettings = LatentStatsSettings()


@torch.inference_mode()
def moments_of(images: Iterator[torch.Tensor], encoder: Encoder, flip: bool, accelerator) -> latent_stats.Moments:
    """Moments of the latents of `images`, batches uint8 [B,3,S,S], and, with `flip`, of their mirror images."""
    moments = latent_stats.Moments((encoder.dim, encoder.grid, encoder.grid))
    for batch in images:
        batch = batch.to(accelerator.device).float() / 255
        for one in (batch, batch.flip(-1)) if flip else (batch,):
            with accelerator.autocast():
                latents = encoder(one)
            moments.add(latents)
    return moments


def main(argv: Sequence[str] | None = None) -> None:
    made = step.parser(__doc__, ComputeLatentStatsSettings)
    step.add_device(made)
    made.add_argument("--dataset", type=Path, required=True, help="dataset/ of rule rae_build_arrow")
    made.add_argument("--encoder", type=Path, required=True, help="folder of the encoder")
    made.add_argument("--state-folder", type=Path, required=True, help="where finished parts lie meanwhile")
    made.add_argument("--output", type=Path, required=True, help="stat.pt: {mean, var}, [C,H,W] float32")
    run(made.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    """Compute the statistics that `args` name."""
    values = step.read_settings(args)
    own = values.latent_stats
    accelerator = devices.make_accelerator(args.device, own.precision, step.threads(args))
    first = accelerator.is_main_process
    if not first:
        step.log.setLevel(logging.WARNING)
    inputs = {"dataset": args.dataset / "files.json", **model_folders.identity(args.encoder)}
    record = step.record(args, "scripts.rae.compute_latent_stats", values, inputs)
    dataset = arrow.open_split(args.dataset, "train")
    crops = arrow.Pictures(dataset, pictures.CentreCrop(values.image_size))
    encoder = Encoder(args.encoder, values.encoder.input_size).to(accelerator.device)
    decoder_patch(values.image_size, encoder.grid)  # now, and not after hours, when a decoder is to be built
    hashes = {name: one["sha256"] for name, one in record.inputs.items()}
    key = fingerprint(of_kind(values, "numerics"), hashes, record.code)

    def read(rows: list[range]) -> Iterator[Iterator[torch.Tensor]]:
        return pictures.batches_of_parts(crops, rows, own.batch_size, own.workers)

    def build(_: range, images: Iterator[torch.Tensor], file: Path) -> None:
        moments_of(images, encoder, own.flip, accelerator).save(file)

    with parts.built(
        args.state_folder, key, len(dataset), own.images_per_part, read, build, accelerator, "latent statistics"
    ) as files:
        if first:
            total = latent_stats.merge([latent_stats.Moments.load(file) for file in files])
            latent_stats.write_statistics(args.output, total.mean, total.variance())
            step.log.info(
                "%d latents of %s: mean of means %.4g, root of the mean variance %.4g",
                total.count, list(total.mean.shape), total.mean.mean(), total.variance().mean().sqrt(),
            )  # fmt: skip
            record.write(args.meta, [args.output], items=total.count)


if __name__ == "__main__":
    step.run(main)
