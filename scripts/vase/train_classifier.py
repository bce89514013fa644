"""Train the image-quality classifier on the train side, choose it on validation, score it on test.

Rule `vase_train_classifier`. Killed at any moment, the same command carries on and ends with the
same bytes. Under torchrun each process takes its slice of every global batch.
"""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from scripts.common import (
    artefacts,
    classification,
    devices,
    disk,
    preflight,
    statistics,
    step,
    tables,
    trackers,
    trivial,
)
from scripts.common.errors import KilnError
from scripts.common.fingerprint import fingerprint
from scripts.common.settings import of_kind
from scripts.common.training_state import KEEP, TrainingState
from scripts.vase import classifier
from scripts.vase.classifier_training import Fit, LabelledImages, build_model, predict
from scripts.vase.settings import ClassifierSettings

ROLES = {"train": "fit", "validation": "choose", "test": "score"}


def check_room(model: torch.nn.Module, values: ClassifierSettings, state_folder: Path, accelerator) -> None:
    """State what training needs, and stop now if memory or disk lack it."""
    parameters = sum(p.numel() for p in model.parameters())
    shape = (values.batch_size // accelerator.num_processes, 3, values.image_size, values.image_size)
    kept = preflight.activation_bytes(model, shape)
    needed = preflight.estimate_training_memory(parameters, parameters, activation_bytes=kept)
    settings = ("vase.classifier.batch_size", "vase.classifier.image_size", "vase.classifier.arch")
    on_cpu = accelerator.device.type == "cpu"  # of several processes, cpu:0
    preflight.require_vram(needed, "cpu" if on_cpu else str(accelerator.device), settings)
    one_state = 4 * 4 * parameters  # float32 weights, best weights and Adam's two moments
    disk.require_disk(state_folder, (KEEP + 1) * one_state, "the training states")


def train(
    values: ClassifierSettings, sides: dict, weights: Path | None, accelerator, state: TrainingState, track: Path
):
    """Train to the end and return the `Fit`; resumes from `state`, logs to a tracker in `track`."""
    if weights is None and not values.init_from:
        step.log.warning("no initial weights: training from scratch")
    model = build_model(values, weights)
    check_room(model, values, state.folder, accelerator)
    fit = Fit(model, sides["train"], sides["validation"], values, accelerator, values.workers)
    saved = state.load()
    if saved is not None:
        fit.load_state(saved)
    main = accelerator.is_main_process
    writer = trackers.tracker(track, values.tracker if main else "none", first_step=fit.at.epoch)

    def after_step(fit: Fit) -> None:
        at = fit.at
        loss = at.loss_sum / at.seen if at.seen else at.history[-1]["train_loss"]  # a mean over the epoch so far
        state.checkpoint(at.step, fit.state, loss)

    def after_epoch(fit: Fit) -> None:
        row = fit.at.history[-1]
        for name, value in row.items():
            writer.scalar(name, value, fit.at.epoch - 1)
        line = ", ".join(f"{name} {value:.4g}" for name, value in row.items())
        if main:
            step.log.info("epoch %d/%d: %s", fit.at.epoch, values.epochs, line)
        if not np.isfinite(row["train_loss"]):
            raise KilnError(f"loss is {row['train_loss']} in epoch {fit.at.epoch}", "lower vase.classifier.lr")

    fit.evaluate = state.paused(fit.evaluate)
    steps = values.epochs * max(1, len(fit.data) // values.batch_size)
    try:
        with state.running(steps):
            fit.run(after_step, after_epoch)
    finally:
        writer.close()
    return fit


def score(fit: Fit, values: ClassifierSettings, table: pd.DataFrame, folder: Path, accelerator) -> dict:
    """The report on the test side, with what trivial features reach and the majority answer."""
    parts = dict(list(table.groupby("side")))
    test = parts["test"]
    paths = {side: [folder / p for p in part["path"]] for side, part in parts.items()}
    data = LabelledImages(paths["test"], test["label"].to_numpy(), values, augment=False)
    logits, labels = predict(fit.model, data, values, accelerator, values.workers)
    report = classification.classification_report(
        labels.numpy(), logits.double().softmax(1).numpy(), groups=test["vase"].to_numpy(), seed=values.seed,
        classes=classifier.CLASSES,
    )  # fmt: skip
    majority = int(parts["train"]["label"].mode()[0])
    accuracy = report["accuracy"]
    report["accuracy"] = statistics.metric(
        accuracy["value"], accuracy["n"], accuracy["ci95"],
        baseline=float((test["label"] == majority).mean()), baseline_kind="majority",
        groups=report["n_groups"], grouped_by="vase",
        trivial=classification.trivial_baseline(
            trivial.image_features(paths["train"]), parts["train"]["label"].to_numpy(),
            trivial.image_features(paths["test"]), test["label"].to_numpy(),
        ),
    )  # fmt: skip
    return report


def main(argv: Sequence[str] | None = None) -> None:
    made = step.parser(__doc__, ClassifierSettings)
    step.add_device(made)
    made.add_argument("--images", type=Path, required=True, help="folder with the labelled images")
    made.add_argument("--labelled", type=Path, required=True, help="labelled.parquet of rule vase_split_labelled")
    made.add_argument("--weights", type=Path, help="initial backbone (.pth or .safetensors)")
    made.add_argument("--state-folder", type=Path, required=True, help="where the resumable state lies")
    made.add_argument("--tracker-folder", type=Path, required=True, help="TensorBoard or W&B files")
    made.add_argument("--output-folder", type=Path, required=True, help="classifier.safetensors, metrics.json, ...")
    run(made.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    """Train, score and write what `args` name."""
    values = step.read_settings(args)
    accelerator = devices.make_accelerator(args.device, values.precision, step.threads(args), values.deterministic)
    if not accelerator.is_main_process:
        step.log.setLevel(logging.WARNING)
    if values.batch_size % accelerator.num_processes:
        raise KilnError(
            f"{accelerator.num_processes} processes do not divide vase.classifier.batch_size {values.batch_size}",
            "use a number of GPUs that divides it",
        )
    inputs = {"labelled": args.labelled} | ({"weights": args.weights} if args.weights else {})
    if values.init_from:
        inputs["init_from"] = Path(values.init_from)
    record = step.record(args, "scripts.vase.train_classifier", values, inputs)
    table = tables.read_table(args.labelled, ["path", "vase", "label", "side"])
    sides = {side: ([args.images / p for p in part["path"]], part["label"].to_numpy())
             for side, part in table.groupby("side")}  # fmt: skip
    hashes = {name: one["sha256"] for name, one in record.inputs.items()}
    state = TrainingState(
        args.state_folder, fingerprint(of_kind(values, "numerics"), hashes, record.code),
        accelerator.process_index, accelerator.num_processes, accelerator.wait_for_everyone,
        values.save_minutes, values.budget_minutes, values.stall_minutes,
    )  # fmt: skip
    record.carries_on(state.folder)
    try:
        fit = train(values, sides, args.weights, accelerator, state, args.tracker_folder)
        accelerator.unwrap_model(fit.model).load_state_dict(fit.at.best)
        if accelerator.is_main_process:
            report = score(fit, values, table, args.images, accelerator)
            write(args, values, fit, report, table, record, accelerator)
        state.remove(args.meta)
    finally:
        state.close()


def write(args, values, fit: Fit, report: dict, table: pd.DataFrame, record, accelerator) -> None:
    """Write all outputs; the weights last but for the record."""
    folder = args.output_folder
    folder.mkdir(parents=True, exist_ok=True)
    metrics, used, weights = (folder / n for n in ("metrics.json", "used.parquet", "classifier.safetensors"))
    best = {"best_epoch": fit.at.best_epoch + 1, **fit.at.history[fit.at.best_epoch]}
    summary = {"classifier_accuracy": report["accuracy"]}
    artefacts.write_json(metrics, {"summary": summary, "test": report, "chosen": best, "history": fit.at.history})
    roles = table.assign(role=table["side"].map(ROLES))[["path", "vase", "side", "role"]]
    tables.write_table(used, roles, ["path"])
    with artefacts.atomic_path(weights) as temporary:
        classifier.save(accelerator.unwrap_model(fit.model), values, temporary)
    accuracy = report["accuracy"]
    step.log.info("test accuracy %.3f [%.3f, %.3f], n = %d", accuracy["value"], *accuracy["ci95"], accuracy["n"])
    record.write(args.meta, [weights, metrics, used], items=fit.at.step * values.batch_size)


if __name__ == "__main__":
    step.run(main)
