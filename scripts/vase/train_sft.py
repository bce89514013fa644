"""Fine-tune a vision-language model on vase questions and captions, by ms-swift's SFT.

Rule `vase_train_sft`. Killed at any moment, the same command carries on and, on a CPU, ends with the same bytes.
`best/` is the checkpoint of the least validation loss, `last/` that of the last step: adapters, or whole models when
all weights are trained.
"""

import argparse
import contextlib
from collections.abc import Sequence
from pathlib import Path

from scripts.common import devices, model_folders, step, trivial
from scripts.common.errors import KilnError
from scripts.common.fingerprint import fingerprint
from scripts.common.locks import writer_lock
from scripts.common.settings import Settings, of_kind
from scripts.common.trainer_checkpoints import MARK, checkpoints
from scripts.vase import swift_flags, swift_training
from scripts.vase.settings import SftSettings, VlmSettings
from scripts.vase.vqa_rows import read_rows


class TrainSftSettings(Settings):
    """Settings of this step."""

    vlm: VlmSettings = VlmSettings()
    sft: SftSettings = SftSettings()


def main(argv: Sequence[str] | None = None) -> None:
    made = step.parser(__doc__, TrainSftSettings)
    swift_training.add_arguments(made)
    run(made.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    """Train and write what `args` name."""
    values = step.read_settings(args)
    swift_training.quiet_other_ranks()
    inputs = {"train": args.train, "validation": args.validation, **model_folders.identity(args.model)}
    record = step.record(args, "scripts.vase.train_sft", values, inputs)
    hashes = {name: one["sha256"] for name, one in record.inputs.items()}
    folder = args.state_folder / fingerprint(of_kind(values, "numerics"), hashes, record.code)
    record.carries_on(folder)
    first = swift_training.rank() == 0
    with writer_lock(folder, owner="training") if first else contextlib.nullcontext():
        swift_training.set_environment(args.images, args.model, values.vlm, folder / "cache")
        on_cpu = devices.prepare(args.device, values.sft.precision, step.threads(args), values.sft.deterministic)
        precision = devices.choose_precision(values.sft.precision, on_cpu)

        def flags(resumed: Path | None) -> dict:
            return swift_flags.training_flags(
                values.sft, values.vlm, args.model, args.train, args.validation, folder, precision, on_cpu,
                swift_training.processes(), resumed,
            )  # fmt: skip

        state = swift_training.run("sft", flags, values.sft, "vase.sft", folder, args.tracker_folder, on_cpu)
        if first:
            write(args, values, folder, state, record)
    swift_training.finish(args.state_folder, args.meta)


def write(args: argparse.Namespace, values: TrainSftSettings, folder: Path, state: dict, record) -> None:
    """Write all outputs; the models' listings last but for the record."""
    whole = {p.name: p for p in checkpoints(folder) if (p / MARK).is_file()}
    best = whole.get(f"checkpoint-{state['best_global_step']}")
    if best is None:
        raise KilnError(f"{folder}: no checkpoint was validated", "make vase.sft.save_steps a multiple of eval_steps")
    metrics = swift_training.write_metrics(args.output_folder, state, guess(args, values.vlm.template))
    last = whole[f"checkpoint-{state['global_step']}"]
    base = args.model.name
    listings = [
        swift_training.write_model(checkpoint, args.output_folder / name, base)
        for name, checkpoint in (("best", best), ("last", last))
    ]
    record.write(args.meta, [*listings, metrics], items=state["global_step"])


def guess(args: argparse.Namespace, template: str) -> dict[str, float]:
    """The loss of a guess by frequency, to be drawn; none where rows have answers in several turns."""
    from scripts.vase import swift_template  # after the environment is set: ms-swift reads it when imported

    rows = read_rows(args.train)
    if any(role == "assistant" for row in rows for role, _ in row.turns):
        return {}
    answers = swift_template.answer_tokens(args.model, template, [row.reference for row in rows])
    return {trivial.GUESS: trivial.guess_loss([row.dimension for row in rows], answers)}


if __name__ == "__main__":
    step.run(main)
