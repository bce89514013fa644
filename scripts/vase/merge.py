"""Merge an adapter into its base by `swift export`, and show that the merged model answers the same.

Rules `vase_merge_sft` and `vase_merge_grpo`. The logits of base + adapter (transformers and peft) and of the merged
model, read back from disk, are compared on validation prompts; the folder appears only when they agree
(`scripts.common.merge_parity`). The model is merged into a fresh folder: where one exists, ms-swift skips the merge
and reports success.
"""

import argparse
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from scripts.common import artefacts, devices, disk, merge_parity, model_folders, step, vlm
from scripts.common.errors import KilnError
from scripts.common.settings import Settings
from scripts.vase import generation, swift_training
from scripts.vase.settings import MergeSettings, VlmSettings
from scripts.vase.swift_flags import as_arguments, export_flags
from scripts.vase.vqa_rows import read_rows


class MergeStepSettings(Settings):
    """Settings of this step."""

    vlm: VlmSettings = VlmSettings()
    merge: MergeSettings = MergeSettings()


def logits(model, args: argparse.Namespace, values: MergeStepSettings, device: torch.device) -> torch.Tensor:
    """Next-token logits [prompts, vocabulary] float32 of rows spread evenly over the file, one at a time."""
    rows = read_rows(args.prompts)
    count = values.merge.prompts
    chosen = [rows[i] for i in sorted({round(i * (len(rows) - 1) / max(count - 1, 1)) for i in range(count)})]
    processor = generation.FAMILY.load_processor(args.base)
    generation.cap_pixels(processor, values.vlm.max_pixels)
    batches = [generation.encode(processor, args.images, [row], None, model.config) for row in chosen]
    return merge_parity.logits_at_answer(model, [vlm.to_device(batch, device) for batch in batches])


def merge(args: argparse.Namespace, values: MergeStepSettings, folder: Path) -> dict:
    """Write the merged model into `folder`, which must not exist, and return the parity report.

    Raises:
        KilnError: the adapter does not fit the base, or the merged model is another one.
    """
    on_cpu = devices.prepare(args.device, "auto", step.threads(args))
    device = torch.device("cpu") if on_cpu else torch.device("cuda", torch.cuda.current_device())
    model = generation.FAMILY.load_model(args.base, dtype="auto", device_map={"": device})
    dtype = model.dtype
    disk.require_disk(folder.parent, model.get_memory_footprint(), "the merged model")
    base = logits(model, args, values, device)
    from peft import PeftModel

    with swift_training.explained("vase.merge", folder):
        model = PeftModel.from_pretrained(model, args.adapter)
        adapted = logits(model, args, values, device)
        del model
        export(args, values, folder, dtype)
    merged = generation.FAMILY.load_model(folder, dtype="auto", device_map={"": device})
    report = merge_parity.compare(adapted, logits(merged, args, values, device), base, dtype)
    step.log.info("parity: %s", report)
    merge_parity.require_parity(report, step.log.warning)
    return report


def export(args: argparse.Namespace, values: MergeStepSettings, folder: Path, dtype: torch.dtype) -> None:
    """Run `swift export --merge_lora` in this process: a second one would pay for its imports again."""
    named = str(dtype).removeprefix("torch.")
    with tempfile.TemporaryDirectory() as cache:
        swift_training.set_environment(args.images, args.base, values.vlm, Path(cache))
        import swift

        from scripts.vase import swift_hooks, swift_template

        swift_hooks.set_up_logging()
        swift_template.take_image_tokens_from_tokenizer()
        swift.export_main(as_arguments(export_flags(values.vlm, args.base, args.adapter, folder, named)))
    for path in folder.glob("*"):
        if path.is_file():
            os.chmod(path, 0o644)  # ms-swift's weights are for their owner alone


def main(argv: Sequence[str] | None = None) -> None:
    made = step.parser(__doc__, MergeStepSettings)
    step.add_device(made)
    made.add_argument("--base", type=Path, required=True, help="folder of the base model")
    made.add_argument("--adapter", type=Path, required=True, help="folder of the adapter")
    made.add_argument("--images", type=Path, required=True, help="folder of the images")
    made.add_argument("--prompts", type=Path, required=True, help="rows whose logits are compared")
    made.add_argument("--output-folder", type=Path, required=True, help="model/ and parity.json")
    run(made.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    """Merge what `args` name."""
    values = step.read_settings(args)
    if not (args.adapter / "adapter_model.safetensors").is_file():
        raise KilnError(f"{args.adapter}: no adapter_model.safetensors", "give the folder of an adapter")
    inputs = {"adapter": args.adapter / "adapter_model.safetensors", "prompts": args.prompts}
    record = step.record(args, "scripts.vase.merge", values, {**inputs, **model_folders.identity(args.base)})
    folder, parity = args.output_folder / "model", args.output_folder / "parity.json"
    with artefacts.atomic_folder(folder) as temporary:
        temporary.rmdir()
        report = merge(args, values, temporary)
        listing = artefacts.describe_files(sorted(p for p in temporary.iterdir() if p.is_file()))
        artefacts.write_json(temporary / "files.json", listing)
    artefacts.write_json(parity, report)
    record.write(args.meta, [folder / "files.json", parity])


if __name__ == "__main__":
    step.run(main)
