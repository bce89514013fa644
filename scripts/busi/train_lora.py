"""Fine-tune a vision-language model with LoRA, or with QLoRA on its 4-bit form.

Rule `busi_train_lora`. Killed at any moment, the same command carries on and, on a CPU, ends with the same
bytes. Under torchrun each process takes its share of every batch; with `deepspeed: zero2` the Trainer hands the
optimiser to DeepSpeed. `final_model/` holds the adapter (safetensors), tokenizer and processor.
"""

import argparse
import contextlib
import logging
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from scripts.busi import fine_tuning, lora
from scripts.busi.chat_examples import ChatExamples
from scripts.busi.chat_rows import read_rows
from scripts.busi.settings import TrainLoraSettings
from scripts.common import artefacts, devices, disk, model_folders, preflight, step, trackers, trivial, vlm
from scripts.common.errors import KilnError
from scripts.common.fingerprint import fingerprint
from scripts.common.locks import writer_lock
from scripts.common.settings import of_kind
from scripts.common.spent import let_go
from scripts.common.trainer_checkpoints import WholeCheckpoints, from_rank_0, newest_complete, step_of
from scripts.common.trainer_log import Log, history


def load_base(values: TrainLoraSettings, family: vlm.Family, folder: Path, dtype: torch.dtype, quantised: bool, device):
    """The frozen base on `device`, in `dtype` or in 4 bits; the same device for all of it, never spread."""
    options = {"dtype": dtype, "device_map": {"": device}}
    if quantised:
        options["quantization_config"] = lora.quantisation(values.lora, family, dtype)
    return family.load_model(folder, **options)


def check_room(
    model, values: TrainLoraSettings, example: vlm.Example, dtype, device: torch.device, state: Path
) -> None:
    """State what training needs, and stop now if memory or disk lack it."""
    trained, parameters = fine_tuning.trainable(model)
    text = model.config.get_text_config()
    kept = preflight.transformer_activation_bytes(
        values.train.batch_size * len(example.input_ids), text.hidden_size, text.num_hidden_layers, text.vocab_size,
        values.train.gradient_checkpointing, dtype.itemsize,
    )  # fmt: skip
    each = model.get_memory_footprint() / parameters
    states = {"adamw_torch": 2.0, "adamw_8bit": 0.5, "paged_adamw_8bit": 0.5}[values.train.optimiser]
    needed = preflight.estimate_training_memory(parameters, trained, states, each, kept, trainable_bytes=4)
    settings = ("busi.train.batch_size", "busi.methods (qlora)", "busi.train.gradient_checkpointing")
    preflight.require_vram(needed, "cpu" if device.type == "cpu" else str(device), settings)
    step.log.info("%d of %d parameters are trained", trained, parameters)
    disk.require_disk(state, (values.train.save_total_limit + 1) * 12 * trained, "the training states")


def train(args: argparse.Namespace, values: TrainLoraSettings, folder: Path):
    """Train to the end, resuming from the newest whole checkpoint in `folder`: (trainer, processor).

    Raises:
        OutOfTime, Interrupted: the time is used up, or a signal came; the state is saved.
    """
    settings, quantised = values.train, args.method == "qlora"
    on_cpu = devices.prepare(args.device, settings.precision, step.threads(args), settings.deterministic)
    precision = devices.choose_precision(settings.precision, on_cpu)
    dtype = devices.DTYPES[precision]
    rows = {side: read_rows(getattr(args, side)) for side in ("train", "validation")}
    processes = int(os.environ.get("WORLD_SIZE", 1))
    arguments = fine_tuning.training_arguments(settings, folder, precision, on_cpu, len(rows["train"]), processes)
    torch.manual_seed(settings.seed)
    family = vlm.family(values.base.family, values.base.code_sha256)
    processor = family.load_processor(args.base)
    model = load_base(values, family, args.base, dtype, quantised, arguments.device)
    model = lora.add_adapters(
        model, family, values.lora, quantised, settings.gradient_checkpointing, settings.init_from
    )  # fmt: skip
    data = {side: ChatExamples(args.images, table, family, processor) for side, table in rows.items()}
    first = data["train"][0]
    if isinstance(first, KilnError):
        raise first
    check_room(model, values, first, dtype, arguments.device, folder)
    resumed = from_rank_0(newest_complete(folder) if arguments.process_index == 0 else None)
    kind = settings.tracker if arguments.process_index == 0 else "none"
    keeper = WholeCheckpoints(
        settings.save_total_limit, settings.save_minutes, settings.budget_minutes, settings.stall_minutes
    )  # fmt: skip
    writer = trackers.tracker(args.tracker_folder, kind, step_of(resumed) + 1 if resumed else 0)
    with contextlib.closing(writer), keeper.running(folder):
        trainer = fine_tuning.make_trainer(
            model, family, processor, arguments, data["train"], data["validation"],
            [keeper, Log(writer, settings.log_steps, "lower busi.train.lr, or set precision bf16")],
        )  # fmt: skip
        if resumed:
            step.log.info("resumed from %s", resumed)
        trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
    return trainer, processor


def main(argv: Sequence[str] | None = None) -> None:
    made = step.parser(__doc__, TrainLoraSettings)
    step.add_device(made)
    made.add_argument("--method", choices=("lora", "qlora"), required=True)
    made.add_argument("--base", type=Path, required=True, help="folder of the model to start from")
    made.add_argument("--images", type=Path, required=True, help="folder of the images")
    made.add_argument("--train", type=Path, required=True, help="train.jsonl of rule busi_build_conversations")
    made.add_argument("--validation", type=Path, required=True, help="validation.jsonl of the same rule")
    made.add_argument("--state-folder", type=Path, required=True, help="where the resumable state lies")
    made.add_argument("--tracker-folder", type=Path, required=True, help="TensorBoard or W&B files")
    made.add_argument("--output-folder", type=Path, required=True, help="final_model/, metrics.json")
    run(made.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    """Train and write what `args` name."""
    values = step.read_settings(args)
    rank = int(os.environ.get("RANK", 0))
    if rank:
        step.log.setLevel(logging.WARNING)
    inputs = {"train": args.train, "validation": args.validation, **model_folders.identity(args.base)}
    if values.train.init_from:
        inputs["init_from"] = Path(values.train.init_from, "adapter_model.safetensors")
    record = step.record(args, "scripts.busi.train_lora", values, inputs)
    record.facts["method"] = args.method
    hashes = {name: one["sha256"] for name, one in record.inputs.items()}
    folder = args.state_folder / fingerprint(
        {**of_kind(values, "numerics"), "method": args.method}, hashes, record.code
    )  # fmt: skip
    record.carries_on(folder)
    with writer_lock(folder, owner="training") if rank == 0 else contextlib.nullcontext():
        trainer, processor = train(args, values, folder)
        if rank == 0:
            write(args, values, trainer, processor, record)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    if rank == 0:
        let_go(args.state_folder, args.meta)


def write(args, values: TrainLoraSettings, trainer, processor, record) -> None:
    """Write all outputs; the model's listing last but for the record."""
    folder = args.output_folder
    folder.mkdir(parents=True, exist_ok=True)
    metrics = folder / "metrics.json"
    rows = read_rows(args.train)
    answers = [vlm.answer_ids(processor.tokenizer, answer).tolist() for answer in rows["answer"]]
    guess = trivial.guess_loss(rows["prompt"], answers)
    trained, parameters = fine_tuning.trainable(trainer.model)
    facts = {"trained_parameters": trained, "parameters": parameters, "guess_loss": guess}
    artefacts.write_json(metrics, {**facts, **history(trainer.state.log_history)})
    final = folder / "final_model"
    model = trainer.accelerator.unwrap_model(trainer.model)
    model.peft_config["default"].base_model_name_or_path = args.base.name  # a path of this machine helps nobody
    with artefacts.atomic_folder(final) as temporary:
        model.save_pretrained(temporary, save_embedding_layers=False)  # else peft asks the hub
        (temporary / "README.md").unlink(missing_ok=True)  # peft's empty card; describe_model writes ours
        processor.save_pretrained(temporary)
        listing = artefacts.describe_files(sorted(p for p in temporary.iterdir() if p.is_file()))
        artefacts.write_json(temporary / "files.json", listing)
    record.write(args.meta, [final / "files.json", metrics], items=trainer.state.global_step)


if __name__ == "__main__":
    step.run(main)
