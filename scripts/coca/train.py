"""Train a CoCa model on slides and their texts, with a slide encoder of its own or on a frozen one's latents.

Rule `coca_train`. Killed at any moment, the same command carries on and, on a CPU, ends with the same bytes. Under
torchrun each process takes its share of every global batch.
"""

import argparse
import logging
import math
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from scripts.coca import checkpoints, loss_plugin, losses, sides, slide_model, texts
from scripts.coca.pairs import Images, Pairs, StoredLatents, TileDraws
from scripts.coca.settings import EncoderSettings, ModelSettings, TrainSettings
from scripts.coca.slide_model import SlideModel
from scripts.coca.training import KS, Fit, check_batches
from scripts.common import artefacts, devices, disk, retrieval, step, trackers
from scripts.common.errors import KilnError
from scripts.common.fingerprint import fingerprint
from scripts.common.settings import Settings, of_kind
from scripts.common.training_state import KEEP, TrainingState

SIDES = ("train", "validation")


class TrainStepSettings(Settings):
    """Settings of this step."""

    encoder: EncoderSettings = EncoderSettings()
    model: ModelSettings = ModelSettings()
    train: TrainSettings = TrainSettings()


def check_images(args: argparse.Namespace, encoder: EncoderSettings) -> None:
    """A frozen slide encoder goes with latents, one that is trained with tiles.

    Raises:
        KilnError: they do not fit.
    """
    if encoder.is_frozen and args.latents is None:
        raise KilnError(
            "the slide encoder is frozen, and --slides gives tiles",
            "give --latents of rule coca_encode_slides, or set coca.encoder.frozen to false",
        )
    if not encoder.is_frozen and args.slides is None:
        raise KilnError(
            "the slide encoder is trained, and --latents gives what another one made of the tiles",
            "give --slides, or set coca.encoder.weights",
        )


def open_images(args: argparse.Namespace, values: TrainStepSettings, table: pd.DataFrame) -> Images:
    """What gives the image tokens of `table`."""
    if args.latents is not None:
        return StoredLatents(args.latents, table, values.encoder.dim)
    return TileDraws(args.slides, table, values.train.tiles_per_slide, values.train.seed)


def input_files(args: argparse.Namespace, values: TrainStepSettings) -> dict[str, Path]:
    """{name: file} of what decides the weights beside settings and code; of the slides the manifest tells."""
    files = {"manifest": args.manifest, "splits": args.splits, **texts.identity(args.tokenizer)}
    if args.latents:
        files |= {f"latents {name}": args.latents / name for name in ("index.parquet", "summary.json")}
    if args.encoder_weights and not values.encoder.is_frozen:
        files["encoder"] = args.encoder_weights
    if args.init_from:
        files["init_from"] = args.init_from
    if values.train.loss_plugin:
        files["loss plugin"] = Path(values.train.loss_plugin)
    return files


def open_pairs(
    args: argparse.Namespace, values: TrainStepSettings, tokens: texts.Texts
) -> tuple[dict[str, Pairs], int]:
    """The pairs of each of `SIDES`, and the width of the slides' tiles."""
    slides = sides.read(args.manifest, args.splits, ("path", "tiles", "dim", "key"))
    pairs, longest = {}, values.train.max_seq_len
    for side in SIDES:
        table = sides.only(slides, side)
        pairs[side] = Pairs(open_images(args, values, table), table, tokens, longest)
        if pairs[side].cut:
            step.log.warning("%d of %d %s texts are cut to %d tokens", pairs[side].cut, len(table), side, longest)
    return pairs, int(slides["dim"].iloc[0])


def start_from(model: SlideModel, path: Path, facts: checkpoints.Facts, tokenizer: Path) -> None:
    """Take the weights of an earlier checkpoint.

    Raises:
        KilnError: of another tokenizer, frozen slide encoder, or shape.
    """
    found, tensors = checkpoints.read(path)
    checkpoints.check_tokenizer(path, found, tokenizer)
    if found.encoder_sha256 and facts.encoder_sha256 and found.encoder_sha256 != facts.encoder_sha256:
        raise KilnError(
            f"{path}: trained on latents of slide encoder {found.encoder_sha256[:12]}, these are of "
            f"{facts.encoder_sha256[:12]}",
            "give a checkpoint of this slide encoder, or encode the slides with that one",
        )
    try:
        model.load_state_dict({**tensors, checkpoints.TIED: tensors["coca.token_emb.weight"]})
    except (KeyError, RuntimeError) as error:
        raise KilnError(f"{path}: another model: {error}", "check coca.model and coca.encoder") from None


def check_room(fit: Fit, state_folder: Path) -> None:
    """Stop now if the disk lacks room for the training states and the checkpoints that are kept."""
    weights = 4 * sum(p.numel() for p in fit.model.parameters())
    kept = fit.values.epochs // fit.values.save_every if fit.values.save_every else 0
    states = (KEEP + 1) * 4 * weights  # weights, the best ones, and Adam's two moments
    disk.require_disk(state_folder, states + kept * weights, "the training states")


def train(fit: Fit, state: TrainingState, track: Path, keep) -> None:
    """Train to the end; resumes from `state`, logs to a tracker in `track`, by optimiser steps.

    Args:
        keep: writes the weights as they are: (path, steps, epochs).
    """
    saved = state.load()
    if saved is not None:
        fit.load_state(saved)
    main, values = fit.accelerator.is_main_process, fit.values
    writer = trackers.tracker(track, values.tracker if main else "none", first_step=fit.at.step + 1)

    def after_step(fit: Fit) -> None:
        at = fit.at
        sums, count = (at.sums, at.batch) if at.batch else (at.history[-1], 1)  # means over the epoch so far
        loss = sum(sums.get(name, 0.0) for name in ("caption", "contrastive")) / count
        state.checkpoint(at.step, fit.state, loss)

    def after_epoch(fit: Fit) -> None:
        row = fit.at.history[-1]
        for name, value in row.items():
            writer.scalar(name, value, fit.at.step)
        line = ", ".join(f"{name} {value:.4g}" for name, value in row.items())
        if main:
            step.log.info("epoch %d/%d, step %d: %s", fit.at.epoch, values.epochs, fit.at.step, line)
        if main and values.save_every and fit.at.epoch % values.save_every == 0:
            keep(state.folder / "epochs" / f"epoch-{fit.at.epoch:04d}.safetensors", fit.at.step, fit.at.epoch)

    fit.validate = state.paused(fit.validate)
    try:
        with state.running(values.epochs * fit.steps_per_epoch):
            fit.run(after_step, after_epoch)
    finally:
        writer.close()


def main(argv: Sequence[str] | None = None) -> None:
    made = step.parser(__doc__, TrainStepSettings)
    step.add_device(made)
    made.add_argument("--manifest", type=Path, required=True, help="manifest.parquet of rule coca_list_slides")
    made.add_argument("--splits", type=Path, required=True, help="splits.csv of rule coca_split")
    made.add_argument("--tokenizer", type=Path, required=True, help="folder of rule coca_train_tokenizer")
    images = made.add_mutually_exclusive_group(required=True)
    images.add_argument("--slides", type=Path, help="folder of slides, where the slide encoder is trained")
    images.add_argument("--latents", type=Path, help="folder of rule coca_encode_slides, where it is frozen")
    made.add_argument("--encoder-weights", type=Path, help="of the slide encoder (default: setting encoder.weights)")
    made.add_argument("--init-from", type=Path, help="checkpoint to start from (default: setting init_from)")
    made.add_argument("--state-folder", type=Path, required=True, help="where the resumable state lies")
    made.add_argument("--tracker-folder", type=Path, required=True, help="TensorBoard or W&B files")
    made.add_argument("--output-folder", type=Path, required=True, help="model.safetensors, metrics.json, ...")
    run(made.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    """Train and write what `args` name."""
    values = step.read_settings(args)
    own = values.train
    check_images(args, values.encoder)
    accelerator = devices.make_accelerator(args.device, own.precision, step.threads(args), own.deterministic)
    if not accelerator.is_main_process:
        step.log.setLevel(logging.WARNING)
    args.encoder_weights = args.encoder_weights or (Path(values.encoder.weights) if values.encoder.weights else None)
    args.init_from = args.init_from or (Path(own.init_from) if own.init_from else None)
    record = step.record(args, "scripts.coca.train", values, input_files(args, values))
    tokens = texts.Texts.load(args.tokenizer)
    pairs, tile_dim = open_pairs(args, values, tokens)
    check_batches(pairs["train"], pairs["validation"], own, accelerator.num_processes)
    frozen_sha256 = pairs["train"].images.latents.encoder_sha256 if args.latents else None
    facts = checkpoints.Facts(
        tile_dim, slide_model.encoder_shape(values.encoder), values.model.model_dump(), tokens.size, tokens.pad_id,
        checkpoints.identity(args.tokenizer), frozen_sha256, 0, 0,
    )  # fmt: skip
    model = slide_model.build(
        values.model, values.encoder, tile_dim, tokens.size, tokens.pad_id, own.seed, own.temperature,
        args.encoder_weights,
    )  # fmt: skip
    if args.init_from:
        start_from(model, args.init_from, facts, args.tokenizer)
    loss = loss_plugin.load(Path(own.loss_plugin)) if own.loss_plugin else losses.loss_terms
    fit = Fit(model, pairs["train"], pairs["validation"], own, accelerator, own.workers, loss)
    check_room(fit, args.state_folder)

    def keep(path: Path, steps: int, epochs: int) -> None:
        checkpoints.save(path, model, facts._replace(step=steps, epoch=epochs))

    hashes = {name: one["sha256"] for name, one in record.inputs.items()}
    state = TrainingState(
        args.state_folder, fingerprint(of_kind(values, "numerics"), hashes, record.code),
        accelerator.process_index, accelerator.num_processes, accelerator.wait_for_everyone,
        own.save_minutes, own.budget_minutes, own.stall_minutes,
    )  # fmt: skip
    record.carries_on(state.folder)
    try:
        train(fit, state, args.tracker_folder, keep)
        if accelerator.is_main_process:
            write(args.output_folder, fit, keep, state.folder / "epochs", args.meta, record)
        state.remove(args.meta)
    finally:
        state.close()


def write(folder: Path, fit: Fit, keep, epochs: Path, meta: Path, record) -> None:
    """Write all outputs; the weights last but for the record."""
    at = fit.at
    folder.mkdir(parents=True, exist_ok=True)
    metrics, last, best = (folder / name for name in ("metrics.json", "last.safetensors", "model.safetensors"))
    counts = {side: {"pairs": len(pairs), "cut_texts": pairs.cut, "distinct_texts": len(np.unique(pairs.codes))}
              for side, pairs in (("train", fit.train), ("validation", fit.validation))}  # fmt: skip
    chosen = {"epoch": at.best_epoch + 1, **at.history[at.best_epoch]}
    guessed = fit.values.contrastive_weight * math.log(len(fit.train) / fit.steps_per_epoch)
    artefacts.write_json(metrics, {
        "steps": at.step, "chosen": chosen, "sides": counts,
        "guess_losses": {"contrastive": guessed} if "contrastive" in at.history[0] else {},
        "chance_recalls": {k: retrieval.chance_recall(fit.validation.codes, k)
                           for k in KS if f"val_r{k}" in at.history[0]},
        "history": at.history,
    })  # fmt: skip
    with artefacts.atomic_folder(folder / "epochs") as temporary:
        for path in sorted(epochs.glob("*.safetensors")):
            shutil.copyfile(path, temporary / path.name)
        names = [path.name for path in artefacts.write_listing(temporary)]
    keep(last, at.step, at.epoch)
    fit.model.load_state_dict(at.best)
    keep(best, (at.best_epoch + 1) * fit.steps_per_epoch, at.best_epoch + 1)
    kept = [folder / "epochs" / name for name in [*names, "files.json"]]
    record.write(meta, [best, last, metrics, *kept], items=at.step * fit.values.batch_size)


if __name__ == "__main__":
    step.run(main)
