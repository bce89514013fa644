"""Caption the slides of the validation and test side, by a trained model and the latents of its slide encoder.

Rule `coca_caption`. No caption depends on the batch that it was made in.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from scripts.coca import checkpoints, generation, sides, texts
from scripts.coca.latents import Latents
from scripts.coca.settings import CaptionSettings
from scripts.common import devices, progress, step, tables

SIDES = ("validation", "test")


def main(argv: Sequence[str] | None = None) -> None:
    made = step.parser(__doc__, CaptionSettings)
    step.add_device(made)
    made.add_argument("--manifest", type=Path, required=True, help="manifest.parquet of rule coca_list_slides")
    made.add_argument("--splits", type=Path, required=True, help="splits.csv of rule coca_split")
    made.add_argument("--tokenizer", type=Path, required=True, help="folder of rule coca_train_tokenizer")
    made.add_argument("--latents", type=Path, required=True, help="folder of rule coca_encode_slides")
    made.add_argument("--checkpoint", type=Path, required=True, help="model.safetensors of rule coca_train")
    made.add_argument("--output", type=Path, required=True, help="captions.parquet")
    run(made.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    """Caption what `args` name."""
    values = step.read_settings(args)
    accelerator = devices.make_accelerator(args.device, values.precision, step.threads(args))
    inputs = {name: getattr(args, name) for name in ("manifest", "splits", "checkpoint")}
    inputs |= {"latents": args.latents / "index.parquet"} | texts.identity(args.tokenizer)
    record = step.record(args, "scripts.coca.caption", values, inputs)
    asked = sides.read(args.manifest, args.splits)
    asked = asked[asked["side"].isin(SIDES)]
    tokens = texts.Texts.load(args.tokenizer)
    model, facts = checkpoints.load(args.checkpoint, args.tokenizer)
    coca = model.coca.to(accelerator.device)
    slides, size, captions = asked["slide"].to_list(), values.batch_size, []
    encoder = checkpoints.encoder_sha256(args.checkpoint, facts)
    latents = Latents(args.latents, facts.encoder["dim"], slides, encoder)
    for image_tokens in progress.bar(latents.batches(slides, size), "caption", -(-len(slides) // size)):
        with accelerator.autocast():
            own = slides[len(captions) : len(captions) + size]
            captions += generation.captions(coca, image_tokens.to(accelerator.device), tokens, values, own)
    table = asked[["slide", "side", "text"]].assign(caption=captions)
    tables.write_table(args.output, table, ["slide"])
    empty = sum(not one.strip() for one in captions)
    step.log.info("%d captions, %d of them empty; %d distinct", len(captions), empty, len(set(captions)))
    record.write(args.meta, [args.output], items=len(captions))


if __name__ == "__main__":
    step.run(main)
