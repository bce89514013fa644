"""Merge an adapter into its base, in the base's own dtype, and show that the merged model answers the same.

Rule `busi_merge`. The logits of base + adapter and of the merged model, read back from disk, are compared on
validation prompts; the folder appears only when they agree (`scripts.common.merge_parity`). An adapter trained on
a 4-bit base is merged into the unquantised one, as QLoRA's authors do.
"""

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import PeftModel

from scripts.busi.chat_examples import ChatExamples
from scripts.busi.chat_rows import read_rows
from scripts.busi.settings import BaseSettings, MergeSettings, Settings
from scripts.common import artefacts, devices, disk, merge_parity, model_folders, step, vlm
from scripts.common.errors import KilnError


class MergeStepSettings(Settings):
    """Settings of this step."""

    base: BaseSettings = BaseSettings()
    merge: MergeSettings = MergeSettings()


def prompts(family: vlm.Family, processor, images: Path, rows, config, count: int, device) -> list[dict]:
    """The first `count` rows, spread evenly over the file, as batches of one, so that padding plays no part."""
    chosen = rows.iloc[sorted({round(i * (len(rows) - 1) / max(count - 1, 1)) for i in range(count)})]
    batches = []
    for example in ChatExamples(images, chosen, family, processor, taught=False):
        if isinstance(example, KilnError):
            raise example
        batch = family.collate(config, [example], 0)
        del batch["labels"]
        batches.append(vlm.to_device(batch, device))
    return batches


def merge(args: argparse.Namespace, values: MergeStepSettings, folder: Path) -> dict:
    """Write the merged model into `folder` and return the parity report.

    Raises:
        KilnError: the merged model is another one.
    """
    on_cpu = devices.prepare(args.device, "auto", step.threads(args))
    device = torch.device("cpu") if on_cpu else torch.device("cuda", torch.cuda.current_device())
    family = vlm.family(values.base.family, values.base.code_sha256)
    processor = family.load_processor(args.base)
    model = family.load_model(args.base, dtype="auto", device_map={"": device})
    batches = prompts(
        family, processor, args.images, read_rows(args.prompts), model.config, values.merge.prompts, device
    )  # fmt: skip
    base = merge_parity.logits_at_answer(model, batches)
    model = PeftModel.from_pretrained(model, args.adapter)
    adapted = merge_parity.logits_at_answer(model, batches)
    model = model.merge_and_unload()
    dtype = model.dtype
    disk.require_disk(folder, model.get_memory_footprint(), "the merged model")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    del model
    for path in args.base.glob(family.code) if family.code else ():
        shutil.copy(path, folder)
    merged = family.load_model(folder, dtype="auto", device_map={"": device})
    report = merge_parity.compare(adapted, merge_parity.logits_at_answer(merged, batches), base, dtype)
    step.log.info("parity: %s", report)
    merge_parity.require_parity(report, step.log.warning)
    return report


def main(argv: Sequence[str] | None = None) -> None:
    made = step.parser(__doc__, MergeStepSettings)
    step.add_device(made)
    made.add_argument("--base", type=Path, required=True, help="folder of the base model")
    made.add_argument("--adapter", type=Path, required=True, help="final_model of rule busi_train_lora")
    made.add_argument("--images", type=Path, required=True, help="folder of the images")
    made.add_argument("--prompts", type=Path, required=True, help="validation.jsonl of rule busi_build_conversations")
    made.add_argument("--output-folder", type=Path, required=True, help="model/ and parity.json")
    run(made.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    """Merge what `args` name."""
    values = step.read_settings(args)
    if not (args.adapter / "adapter_model.safetensors").is_file():
        raise KilnError(f"{args.adapter}: no adapter_model.safetensors", "give the final_model of rule busi_train_lora")
    inputs = {"adapter": args.adapter / "adapter_model.safetensors", "prompts": args.prompts}
    record = step.record(args, "scripts.busi.merge", values, {**inputs, **model_folders.identity(args.base)})
    folder, parity = args.output_folder / "model", args.output_folder / "parity.json"
    with artefacts.atomic_folder(folder) as temporary:
        report = merge(args, values, temporary)
        listing = artefacts.describe_files(sorted(p for p in temporary.iterdir() if p.is_file()))
        artefacts.write_json(temporary / "files.json", listing)
    artefacts.write_json(parity, report)
    record.write(args.meta, [folder / "files.json", parity])


if __name__ == "__main__":
    step.run(main)
