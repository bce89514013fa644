"""Train a decoder on a frozen encoder's noisy latents: stage 1 of a representation autoencoder.

Rule `rae_train_autoencoder`. Killed at any moment, the same command carries on and, on a CPU, ends with the same
bytes. Under torchrun each process takes its slice of every global batch.
"""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from scripts.common import artefacts, devices, disk, model_folders, step, trackers
from scripts.common.errors import KilnError
from scripts.common.fingerprint import fingerprint
from scripts.common.settings import Settings, of_kind
from scripts.common.training_state import KEEP, TrainingState
from scripts.rae import arrow, checkpoints, latent_stats, losses, pictures, published
from scripts.rae.autoencoder_training import (
    Fit,
    TrainingPictures,
    build_autoencoder,
    build_discriminator,
    decoder_size,
)
from scripts.rae.encoder import Encoder
from scripts.rae.extractors import INCEPTION, RANDOM
from scripts.rae.monitor import Monitor
from scripts.rae.perceptual import Lpips
from scripts.rae.settings import (
    AutoencoderSettings,
    DecoderSettings,
    DiscriminatorSettings,
    EncoderSettings,
    PerceptualSettings,
)

FLAT = 256  # pictures by which the trivial L1 is measured


class TrainAutoencoderSettings(Settings):
    """Settings of this step."""

    image_size: int = 256
    encoder: EncoderSettings
    decoder: DecoderSettings = DecoderSettings()
    perceptual: PerceptualSettings = PerceptualSettings()
    discriminator: DiscriminatorSettings = DiscriminatorSettings()
    autoencoder: AutoencoderSettings = AutoencoderSettings()


def check_batches(values: AutoencoderSettings, images: int, processes: int) -> None:
    """Refuse a batch that processes and passes cannot share evenly, or that the train split cannot fill.

    Raises:
        KilnError: says so.
    """
    values.check_share(processes)
    if images < values.batch_size:
        raise KilnError(
            f"{images} training images, fewer than rae.autoencoder.batch_size {values.batch_size}",
            f"set it to {images} or less, or give more images",
        )


def check_room(fit: Fit, state_folder: Path) -> None:
    """Stop now if the disk lacks room for the training states."""
    decoder = sum(p.numel() for p in fit.autoencoder.decoder.parameters())
    heads = sum(p.numel() for p in fit.bare_discriminator.heads.parameters())
    one_state = 4 * (4 * decoder + 3 * heads)  # float32: weights, Adam's two moments, the decoder's average
    disk.require_disk(state_folder, (KEEP + 1) * one_state, "the training states")


def start_from(fit: Fit, path: Path, encoder_folder: Path) -> None:
    """Take the decoder, and its average, from an earlier checkpoint or, by any other ending, a published model.pt.

    Raises:
        KilnError: of another encoder or shape.
    """
    if path.suffix == ".safetensors":
        facts, tensors = checkpoints.read(path)
        found = checkpoints.identity(encoder_folder)
        if found != facts.encoder_sha256:
            raise KilnError(
                f"{path}: trained on encoder {facts.encoder} ({facts.encoder_sha256[:12]}), but {encoder_folder} holds "
                f"another ({found[:12]})",
                "give a checkpoint of this encoder; a decoder in the published layout (model.pt) names no encoder and "
                "is not asked for it",
            )
        state = {k.removeprefix("decoder."): v for k, v in tensors.items() if k.startswith("decoder.")}
    else:
        own = fit.autoencoder.decoder
        heads, side = own.decoder_layers[0].heads, own.grid * own.patch
        state = published.read_decoder(path, fit.autoencoder.encoder, side, heads)[0].state_dict()
    try:
        fit.autoencoder.decoder.load_state_dict(state)
        fit.ema.load_state_dict(state)
    except RuntimeError as error:
        raise KilnError(f"{path}: another decoder: {error}", "check rae.decoder and the encoder") from None


def train(fit: Fit, state: TrainingState, track: Path, monitor: Monitor) -> None:
    """Train to the end; resumes from `state`, logs to a tracker in `track`, by optimiser steps."""
    saved = state.load()
    if saved is not None:
        fit.load_state(saved)
    main = fit.accelerator.is_main_process
    writer = trackers.tracker(track, fit.values.tracker if main else "none", first_step=fit.at.step + 1)

    def after_step(fit: Fit) -> None:
        # before the save: a run that carries on from it has seen this step
        monitor(fit, writer, state.supervision.pause)
        at = fit.at
        l1 = at.sums["l1"] / at.counts["l1"] if at.batch else at.history[-1]["l1"]  # a mean over the epoch so far
        state.checkpoint(at.step, fit.state, l1)

    def after_epoch(fit: Fit) -> None:
        row = fit.at.history[-1]
        for name, value in row.items():
            writer.scalar(name, value, fit.at.step)
        line = ", ".join(f"{name} {value:.4g}" for name, value in row.items())
        if main:
            step.log.info("epoch %d/%d, step %d: %s", fit.at.epoch, fit.values.epochs, fit.at.step, line)

    try:
        with state.running(fit.values.epochs * fit.steps_per_epoch):
            fit.run(after_step, after_epoch)
    finally:
        writer.close()


def main(argv: Sequence[str] | None = None) -> None:
    made = step.parser(__doc__, TrainAutoencoderSettings)
    step.add_device(made)
    made.add_argument("--dataset", type=Path, required=True, help="dataset/ of rule rae_build_arrow")
    made.add_argument("--name", required=True, help="the encoder's name in the configuration")
    made.add_argument("--encoder", type=Path, required=True, help="folder of the encoder")
    made.add_argument("--statistics", type=Path, required=True, help="stat.pt of rule rae_compute_latent_stats")
    made.add_argument("--vgg", type=Path, help="VGG16 weights of LPIPS (.pth)")
    made.add_argument("--dino", type=Path, help="DINO weights of the discriminator (.pth)")
    made.add_argument(
        "--extractor", choices=(INCEPTION, RANDOM), default=INCEPTION, help="of rFID while training; decides no weight"
    )
    made.add_argument("--inception", type=Path, help="weights of torch-fidelity's Inception (.pth), for that rFID")
    made.add_argument("--init-from", type=Path, help="checkpoint to start from (default: setting init_from)")
    made.add_argument("--state-folder", type=Path, required=True, help="where the resumable state lies")
    made.add_argument("--tracker-folder", type=Path, required=True, help="TensorBoard or W&B files, and sheets")
    made.add_argument("--output-folder", type=Path, required=True, help="autoencoder.safetensors, metrics.json, ...")
    run(made.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    """Train and write what `args` name."""
    values = step.read_settings(args)
    own = values.autoencoder
    accelerator = devices.make_accelerator(args.device, own.precision, step.threads(args), own.deterministic)
    if not accelerator.is_main_process:
        step.log.setLevel(logging.WARNING)
    inputs = {"dataset": args.dataset / "files.json", "statistics": args.statistics}
    inputs |= model_folders.identity(args.encoder)
    inputs |= {name: path for name, path in (("vgg", args.vgg), ("dino", args.dino)) if path}
    init_from = args.init_from or (Path(own.init_from) if own.init_from else None)
    inputs |= {"init_from": init_from} if init_from else {}
    record = step.record(args, "scripts.rae.train_autoencoder", values, inputs)
    data = TrainingPictures(arrow.open_split(args.dataset, "train"), values.image_size, own.seed)
    check_batches(own, len(data), accelerator.num_processes)
    mean, var = latent_stats.read_statistics(args.statistics)
    encoder = Encoder(args.encoder, values.encoder.input_size)
    fit = Fit(
        build_autoencoder(encoder, values.decoder, values.image_size, own, mean, var),
        build_discriminator(values.discriminator, args.dino, own.seed),
        Lpips(args.vgg, values.perceptual.backbone), data, own, values.discriminator, accelerator, own.workers,
    )  # fmt: skip
    if init_from:
        start_from(fit, init_from, args.encoder)
    check_room(fit, args.state_folder)
    monitor = Monitor(fit, args.dataset, values.image_size, args.extractor, args.inception, args.tracker_folder)
    hashes = {name: one["sha256"] for name, one in record.inputs.items()}
    state = TrainingState(
        args.state_folder, fingerprint(of_kind(values, "numerics"), hashes, record.code),
        accelerator.process_index, accelerator.num_processes, accelerator.wait_for_everyone,
        own.save_minutes, own.budget_minutes, own.stall_minutes,
    )  # fmt: skip
    record.carries_on(state.folder)
    try:
        train(fit, state, args.tracker_folder, monitor)
        if accelerator.is_main_process:
            write(args, values, fit, mean, var, record)
        state.remove(args.meta)
    finally:
        state.close()


def flat_l1(dataset: Path, image_size: int) -> float:
    """Mean |x - mean colour of x| of centre crops in [0,1] of `FLAT` pictures to train on: L1 of who knows no more."""
    rows, found = arrow.open_split(dataset, "train"), []
    chosen = np.linspace(0, len(rows) - 1, min(FLAT, len(rows))).astype(int).tolist()
    for images in pictures.batches(arrow.Pictures(rows, pictures.CentreCrop(image_size)), chosen, 32, 0):
        x = images.double() / 255
        found += (x - x.mean((2, 3), keepdim=True)).abs().mean((1, 2, 3)).tolist()
    return sum(found) / len(found)


def write(args, values: TrainAutoencoderSettings, fit: Fit, mean: torch.Tensor, var: torch.Tensor, record) -> None:
    """Write all outputs; the weights last but for the record."""
    folder, history = args.output_folder, fit.at.history
    folder.mkdir(parents=True, exist_ok=True)
    metrics, weights = folder / "metrics.json", folder / "autoencoder.safetensors"
    floors = {"l1": flat_l1(args.dataset, values.image_size)}
    if any("discriminator" in row for row in history):
        undecided = torch.zeros(1)
        floors["discriminator"] = float(losses.discriminator_loss(undecided, undecided))
    artefacts.write_json(metrics, {
        "steps": fit.at.step, "random_features": values.perceptual.backbone is not None, "floors": floors,
        "history": history,
    })  # fmt: skip
    facts = checkpoints.Facts(
        args.name, checkpoints.identity(args.encoder), values.encoder.input_size, values.image_size,
        tuple(decoder_size(values.decoder)), values.autoencoder.tau, fit.at.step,
    )  # fmt: skip
    checkpoints.save(weights, fit.ema, mean, var, facts)
    record.write(args.meta, [weights, metrics], items=fit.at.step * values.autoencoder.batch_size)


if __name__ == "__main__":
    step.run(main)
