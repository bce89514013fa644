"""Predict the quality class of every readable image of one shard, batch by batch.

Rule `vase_classify_images`; one job per shard, in which an image whose content was classified before is not read
again (`--state-folder`).
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from scripts.common import devices, image_batches, reuse, step, tables
from scripts.common.settings import of_kind
from scripts.vase import classifier
from scripts.vase.settings import ClassifySettings

PACKAGES = ("torch", "torchvision", "pillow", "numpy")  # what decides a prediction


@torch.inference_mode()
def classify(
    model,
    values,
    paths: Sequence[Path],
    batch_size: int,
    workers: int,
    accelerator,
    hashes: Sequence[str] | None = None,
) -> np.ndarray:
    """Probability of class 1 (high quality) per path: [N] float32 in [0, 1]."""
    model = model.to(accelerator.device, memory_format=torch.channels_last)
    transform, at_least = classifier.evaluation_transform(values.image_size), classifier.decode_size(values)
    found = [np.zeros(0, dtype=np.float32)]
    for images, real in image_batches.batches(
        paths, transform, batch_size, workers, accelerator.device, at_least, "classify", hashes
    ):
        with accelerator.autocast():
            logits = model(images)
        found.append(logits.float().softmax(1)[:real, 1].cpu().numpy())
    return np.concatenate(found)


def main(argv: Sequence[str] | None = None) -> None:
    made = step.parser(__doc__, ClassifySettings)
    step.add_device(made)
    made.add_argument("--images", type=Path, required=True, help="folder of raw images")
    made.add_argument("--shard", type=Path, required=True, help="the shard's table of rule vase_inspect_images")
    made.add_argument("--classifier", type=Path, required=True, help="classifier.safetensors")
    reuse.add_state_folder(made)
    made.add_argument("--output", type=Path, required=True, help="predictions of this shard (.parquet)")
    run(made.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    """Classify the shard that `args` name."""
    values = step.read_settings(args)
    record = step.record(
        args, "scripts.vase.classify_images", values, {"shard": args.shard, "classifier": args.classifier}
    )
    shard = args.shard.stem
    listed = tables.read_table(args.shard, ["path", "status", "sha256"]).query("status == 'ok'").reset_index(drop=True)
    keys = [bytes.fromhex(one) for one in listed["sha256"]]
    hashes = {"classifier": record.inputs["classifier"]["sha256"]}
    place = reuse.folder(args.state_folder, of_kind(values, "numerics"), hashes, record.code, PACKAGES)
    kept = reuse.Kept(place, shard, tables.read_rows)
    high, missing = np.zeros(len(listed), dtype=np.float32), listed
    for where, part in kept.find(keys):
        high[where] = part["probability"]
        missing = missing.drop(index=where)
    if len(missing):
        accelerator = devices.make_accelerator(args.device, values.precision, step.threads(args))
        model, described = classifier.load(args.classifier)
        paths = [args.images / path for path in missing["path"]]
        high[missing.index] = classify(
            model, described, paths, values.batch_size, values.workers, accelerator, missing["sha256"].tolist()
        )
    frame = listed[["path"]].assign(probability=high, label=(high >= 0.5).astype(np.int8))
    tables.write_table(args.output, frame, ["path"])
    step.log.info("%s: %d images, %d of high quality", shard, len(frame), int(frame["label"].sum()))
    kept.keep(keys, args.output)
    record.facts |= reuse.facts(shard, len(missing), len(frame))
    record.write(args.meta, [args.output], items=len(frame))


if __name__ == "__main__":
    step.run(main)
