"""Predict the quality class of every readable image of one shard, batch by batch.

Rule `vase_classify_images`; one job per shard.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from scripts.common import devices, image_batches, step, tables
from scripts.vase import classifier
from scripts.vase.settings import ClassifySettings


@torch.inference_mode()
def classify(model, values, paths: Sequence[Path], batch_size: int, workers: int, accelerator) -> np.ndarray:
    """Probability of class 1 (high quality) per path: [N] float32 in [0, 1]."""
    model = model.to(accelerator.device, memory_format=torch.channels_last)
    transform, at_least = classifier.evaluation_transform(values.image_size), classifier.decode_size(values)
    found = [np.zeros(0, dtype=np.float32)]
    for images, real in image_batches.batches(
        paths, transform, batch_size, workers, accelerator.device, at_least, "classify"
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
    made.add_argument("--output", type=Path, required=True, help="predictions of this shard (.parquet)")
    run(made.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    """Classify the shard that `args` name."""
    values = step.read_settings(args)
    accelerator = devices.make_accelerator(args.device, values.precision, step.threads(args))
    record = step.record(
        args, "scripts.vase.classify_images", values, {"shard": args.shard, "classifier": args.classifier}
    )
    frame = tables.read_table(args.shard, ["path", "status"]).query("status == 'ok'")[["path"]]
    model, described = classifier.load(args.classifier)
    paths = [args.images / path for path in frame["path"]]
    high = classify(model, described, paths, values.batch_size, values.workers, accelerator)
    frame = frame.assign(probability=high, label=(high >= 0.5).astype(np.int8))
    tables.write_table(args.output, frame, ["path"])
    step.log.info("%s: %d images, %d of high quality", args.shard.stem, len(frame), int(frame["label"].sum()))
    record.write(args.meta, [args.output], items=len(frame))


if __name__ == "__main__":
    step.run(main)
