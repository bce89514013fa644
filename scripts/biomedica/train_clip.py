"""Train a CLIP model on figures and their captions, from local shards and, for the rest of each batch, from a repo.

Rule `biomedica_train_clip`. Killed at any moment, the same command carries on and, on a CPU, ends with the same bytes.
Under torchrun each process takes its share of every global batch. HF_TOKEN is read only where the plan streams and the
hub refuses a request without it.
"""

import argparse
import logging
import math
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import pyarrow as pa
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from scripts.biomedica import checkpoints, held_out, hybrid, model, planning, transforms
from scripts.biomedica.local import LocalPairs
from scripts.biomedica.planning import Plan
from scripts.biomedica.reading import Reading
from scripts.biomedica.remote import Hub, Unreachable
from scripts.biomedica.reports import COUNTS
from scripts.biomedica.settings import (
    HeldOutSettings,
    IndexSettings,
    ModelSettings,
    PlanSettings,
    RemoteSettings,
    TrainSettings,
)
from scripts.biomedica.training import KS, Fit, Loader, Validation
from scripts.common import artefacts, devices, disk, retrieval, step, tables, trackers
from scripts.common.errors import KilnError
from scripts.common.fingerprint import fingerprint
from scripts.common.settings import Settings, of_kind
from scripts.common.training_state import KEEP, TrainingState

INDEX = pa.schema([("name", pa.string()), *((name, pa.int64()) for name in ("bytes", *COUNTS))])
NO_NETWORK = (
    "where compute nodes have no network, give the class resources.network nodes that have one, by its `constraint`,"
    " or set biomedica.plan.samples to what is on disk"
)
REJECTED = ["shard", "key", "status", "reason"]


class TrainStepSettings(Settings):
    """Settings of this step."""

    index: IndexSettings = IndexSettings()
    remote: RemoteSettings = RemoteSettings()
    held_out: HeldOutSettings = HeldOutSettings()
    plan: PlanSettings = PlanSettings()
    model: ModelSettings = ModelSettings()
    train: TrainSettings = TrainSettings()


def input_files(args: argparse.Namespace) -> dict[str, Path]:
    """{name: file} of what decides the weights beside settings and code; of the local shards the index tells."""
    files = {
        "plan": args.plan, "index": args.index / "index.parquet", "shards": args.index / "shards.parquet",
        "remote": args.remote / "shards.parquet", "listing": args.remote / "summary.json",
        "validation": args.held_out / "validation.parquet",
    }  # fmt: skip
    if args.weights:
        files |= {f"weights {path.name}": path for path in model.weight_files(args.weights)}
    return files


def open_hub(args: argparse.Namespace, remote: RemoteSettings, plan: Plan, accelerator: Accelerator) -> Hub | None:
    """The repo, after one request for the first shard; None, and no request, if nothing is streamed.

    Raises:
        KilnError: the repo cannot be read, or must not be.
    """
    if not plan.streamed_per_epoch:
        return None
    if os.environ.get("HF_HUB_OFFLINE", "").strip().upper() in ("1", "ON", "YES", "TRUE"):
        raise KilnError(
            f"{plan.streamed_per_epoch} of {plan.samples} pairs of an epoch are streamed, and HF_HUB_OFFLINE is set",
            "unset it where this rule runs, or set biomedica.plan.samples to what is on disk",
        )
    hub = Hub(remote, artefacts.read_json(args.remote / "summary.json")["revision"])
    if accelerator.is_main_process:
        try:
            hub.check_access(planning.epoch_shards(plan, 0, {})[0][0])
        except Unreachable as error:
            raise KilnError(error.message, f"{error.hint}; {NO_NETWORK}") from None
    (hub.authorised,) = broadcast_object_list([hub.authorised])
    return hub


def open_validation(path: Path, clip: model.Clip) -> Validation:
    """The pairs of validation.parquet, as the model sees them but for normalisation.

    Raises:
        KilnError: no such file, fewer than two pairs, or a figure that is damaged.
    """
    table = held_out.read(path)
    if len(table) < 2:
        raise KilnError(f"{path}: one pair, and retrieval needs two", "set biomedica.held_out.validation higher")
    transform, keys, images = transforms.evaluation_transform(clip.preprocess_cfg), iter(table["key"]), []
    for files in held_out.batches(path, 64):
        images += map(transform, held_out.decoded(files, [next(keys) for _ in files]))
    return Validation(torch.stack(images), clip.tokenizer(list(table["caption"])), table["caption_id"].to_numpy())


def make_loader(
    args: argparse.Namespace, values: TrainStepSettings, plan: Plan, clip: model.Clip,
    hub: Hub | None, accelerator: Accelerator,
) -> Loader:  # fmt: skip
    """What opens this process's part of an epoch."""
    own = values.train
    local = LocalPairs(args.index, args.shards) if plan.local_per_epoch else None
    crop = transforms.TrainTransform(clip.preprocess_cfg, own.crop_scale)
    listed = tables.read_table(args.remote / "shards.parquet", ["name", "sha256"])
    hashes = {name: sha256 for name, sha256 in listed.itertuples(index=False) if isinstance(sha256, str)}
    sharp = 2 * max(crop.size)  # decoding larger JPEGs at a half or less takes a quarter of the time
    reading = Reading(
        plan, own.seed, values.index, values.held_out, values.plan, own.prefetch, crop, clip.tokenizer, sharp, hashes
    )

    def loader(epoch: int, start: int, lanes: dict, counts: dict, versions: dict) -> hybrid.Loader:
        if hub is not None:
            hub.versions.update(versions)
        return hybrid.Loader(
            reading, local, hub, epoch, accelerator.process_index, accelerator.num_processes, own.workers, start,
            lanes, counts,
        )  # fmt: skip

    return loader


def check_room(fit: Fit, state_folder: Path) -> None:
    """Stop now if the disk lacks room for the training states and the checkpoints."""
    weights = sum(p.numel() * p.element_size() for p in fit.model.parameters())
    states = (KEEP + 1) * 4 * weights  # weights, the best ones, and Adam's two moments
    disk.require_disk(state_folder, states + 2 * weights, "the training states and the checkpoints")


def train(fit: Fit, state: TrainingState, track: Path) -> None:
    """Train to the end; resumes from `state`, logs to a tracker in `track`, by optimiser steps."""
    saved = state.load()
    if saved is not None:
        fit.load_state(saved)
    main = fit.accelerator.is_main_process
    writer = trackers.tracker(track, fit.values.tracker if main else "none", first_step=fit.at.step + 1)
    before = dict(fit.at.totals)

    def after_step(fit: Fit) -> None:
        grown = {name: value - before.get(name, 0.0) for name, value in fit.at.totals.items()}
        before.update(fit.at.totals)
        shown = {name: fit.at.totals[name] for name in ("samples_local", "samples_streamed", "retries", "reread_pairs")}
        shown |= {"megabytes": fit.at.totals["bytes"] / 1e6}
        if grown["seconds"]:  # else the step is told already
            shown |= {"waited_share": grown["waited"] / grown["seconds"]}
            for name, value in (fit.now | shown).items():
                writer.scalar(name, value, fit.at.step)
        state.checkpoint(fit.at.step, fit.state, fit.now.get("loss"))

    def after_epoch(fit: Fit) -> None:
        row, totals = fit.at.history[-1], fit.at.totals
        for name, value in row.items():
            if name.startswith("val_"):
                writer.scalar(name, value, fit.at.step)
        if not main:
            return
        line = ", ".join(f"{name} {value:.4g}" for name, value in row.items())
        step.log.info("epoch %d/%d, step %d: %s", fit.at.epoch, fit.plan.epochs, fit.at.step, line)
        step.log.info(
            "so far %d local and %d streamed pairs, %.1f MB, %d retries, %d pairs read again, %.1f %% of the time "
            "waiting for data",
            totals["samples_local"], totals["samples_streamed"], totals["bytes"] / 1e6, totals["retries"],
            totals["reread_pairs"], 100 * totals["waited"] / totals["seconds"],
        )  # fmt: skip
        if row["batches"] < row["batches_planned"]:
            step.log.warning(
                "epoch %d ends after %d of %d batches: its shards hold fewer pairs than planned",
                fit.at.epoch, row["batches"], row["batches_planned"],
            )  # fmt: skip
        for name, (reason, pairs) in fit.at.unreachable.items():
            step.log.warning("shard %s was given up after %d pairs, others make up for it: %s", name, pairs, reason)

    fit.validate = state.paused(fit.validate)
    try:
        with state.running(fit.plan.steps, readers=("scripts.biomedica.hybrid",)):
            fit.run(after_step, after_epoch)
    finally:
        writer.close()


def refuse_token(text: str) -> str:
    """No token comes by the command line, which every process list shows."""
    raise KilnError("a token is no flag: every process list shows it", "export it as HF_TOKEN, and drop the flag")


def main(argv: Sequence[str] | None = None) -> None:
    made = step.parser(__doc__, TrainStepSettings)
    step.add_device(made)
    made.add_argument("--plan", type=Path, required=True, help="plan.json of rule biomedica_plan")
    made.add_argument("--index", type=Path, required=True, help="folder of rule biomedica_index_local")
    made.add_argument("--shards", type=Path, help="folder of local shards; without it all pairs are streamed")
    made.add_argument("--remote", type=Path, required=True, help="folder of rule biomedica_list_remote")
    made.add_argument("--held-out", type=Path, required=True, help="folder of rule biomedica_hold_out")
    made.add_argument("--weights", type=Path, help="folder of a model to start from (default: setting model.weights)")
    made.add_argument("--seed", type=int, help="of weights, order and crops (default: setting train.seed)")
    made.add_argument("--state-folder", type=Path, required=True, help="where the resumable state lies")
    made.add_argument("--tracker-folder", type=Path, required=True, help="TensorBoard or W&B files")
    made.add_argument("--output-folder", type=Path, required=True, help="model.safetensors, metrics.json, ...")
    made.add_argument("--hf-token", "--token", type=refuse_token, nargs="?", const="", help=argparse.SUPPRESS)
    run(made.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    """Train and write what `args` name."""
    values = step.read_settings(args)
    if args.seed is not None:
        values = values.model_copy(update={"train": values.train.model_copy(update={"seed": args.seed})})
    own = values.train
    accelerator = devices.make_accelerator(args.device, own.precision, step.threads(args), own.deterministic)
    if not accelerator.is_main_process:
        step.log.setLevel(logging.WARNING)
    args.weights = args.weights or (Path(values.model.weights) if values.model.weights else None)
    record = step.record(args, "scripts.biomedica.train_clip", values, input_files(args))
    plan = Plan.read(args.plan)
    hub = open_hub(args, values.remote, plan, accelerator)
    clip = model.build(values.model, own.seed, args.weights)
    validation = open_validation(args.held_out / "validation.parquet", clip)
    loader = make_loader(args, values, plan, clip, hub, accelerator)
    fit = Fit(clip, plan, loader, validation, own, accelerator)
    check_room(fit, args.state_folder)
    hashes = {name: one["sha256"] for name, one in record.inputs.items()}
    state = TrainingState(
        args.state_folder, fingerprint(of_kind(values, "numerics"), hashes, record.code),
        accelerator.process_index, accelerator.num_processes, accelerator.wait_for_everyone,
        own.save_minutes, own.budget_minutes, own.stall_minutes,
    )  # fmt: skip
    record.carries_on(state.folder)
    try:
        train(fit, state, args.tracker_folder)
        if accelerator.is_main_process:
            write(args.output_folder, fit, clip, args.meta, record)
        state.remove(args.meta)
    finally:
        state.close()


def write(folder: Path, fit: Fit, clip: model.Clip, meta: Path, record) -> None:
    """Write all outputs; the weights last but for the record, which alone has what depends on time or network."""
    at, plan, history = fit.at, fit.plan, fit.at.history
    folder.mkdir(parents=True, exist_ok=True)

    def keep(path: Path, epoch: int) -> None:
        row = history[epoch - 1]
        steps = sum(one["batches"] for one in history[:epoch])
        facts = checkpoints.Facts(
            clip.model_cfg, clip.preprocess_cfg, clip.name, fit.values.seed, plan.arm, steps, epoch,
            row["samples_local"], row["samples_streamed"],
        )  # fmt: skip
        checkpoints.save(path, fit.model, facts)

    metrics, last, best = (folder / name for name in ("metrics.json", "last.safetensors", "model.safetensors"))
    remote, rejected = folder / "remote_index.parquet", folder / "remote_rejected.tsv"
    seen = {name: history[-1][name] for name in ("samples_local", "samples_streamed")}
    planned = sum(one["batches_planned"] for one in history) * plan.batch_size
    artefacts.write_json(metrics, {
        "arm": plan.arm, "seed": fit.values.seed, "steps": at.step, "batch_size": plan.batch_size,
        "guess_loss": math.log(plan.batch_size), "validation_pairs": len(fit.validation.images),
        "chance_recalls": {k: retrieval.chance_recall(fit.validation.caption_ids, k)
                           for k in KS if k <= len(fit.validation.images)},
        "chosen": {"epoch": at.best_epoch + 1, **history[at.best_epoch]},
        "samples": {"planned": planned, "seen": sum(seen.values()), **seen},
        "streamed_without_a_pair": dict(sorted(Counter(status for status, _ in at.rejected.values()).items())),
        "unreachable": sorted(at.unreachable), "history": history,
    })  # fmt: skip
    rows = [{"name": name, "bytes": plan.shards[name]["bytes"], **one} for name, one in at.counts.items()]
    tables.write_table(remote, pd.DataFrame(rows, columns=INDEX.names), ["name"], INDEX)
    write_rejected(rejected, at.rejected)
    keep(last, len(history))
    fit.model.load_state_dict(at.best)
    keep(best, at.best_epoch + 1)
    record.facts["reading"] = {
        "bytes": int(at.totals["bytes"]), "retries": int(at.totals["retries"]),
        "reread_pairs": int(at.totals["reread_pairs"]), "reread_bytes": int(at.totals["reread_bytes"]),
        "waited_share": round(at.totals["waited"] / at.totals["seconds"], 4),
        "unreachable": {name: {"reason": why, "pairs": pairs} for name, (why, pairs) in sorted(at.unreachable.items())},
    }  # fmt: skip
    record.write(meta, [best, last, metrics, remote, rejected], items=at.step * plan.batch_size)


def write_rejected(path: Path, rejected: dict[tuple[str, str], tuple[str, str]]) -> None:
    """Streamed pairs that were passed over, with the reason, sorted."""
    rows = [(*place, *why) for place, why in sorted(rejected.items())]
    with artefacts.atomic_path(path) as temporary:
        pd.DataFrame(rows, columns=REJECTED).to_csv(temporary, sep="\t", index=False)


if __name__ == "__main__":
    step.run(main)
