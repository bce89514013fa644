"""Reinforce a fine-tuned vision-language model by ms-swift's GRPO, with our reward or a user's.

Rule `vase_train_grpo`. Killed at any moment, the same command carries on and, on a CPU, ends with the same bytes.
`last/` is the adapter, or the whole model when all weights are trained; `completions.jsonl` holds what was sampled,
with its rewards and advantages.
"""

import argparse
import contextlib
import shutil
from collections.abc import Sequence
from pathlib import Path

from scripts.common import artefacts, devices, model_folders, step
from scripts.common.fingerprint import fingerprint
from scripts.common.locks import writer_lock
from scripts.common.settings import Settings, of_kind
from scripts.common.trainer_checkpoints import newest_complete
from scripts.vase import check_reward, reward_plugin, swift_flags, swift_training
from scripts.vase.settings import GrpoSettings, RewardSettings, VlmSettings
from scripts.vase.trivial_answers import majority_answers
from scripts.vase.vqa_rows import read_rows

ROWS = 1000  # by which the reward of the majority answers is measured


class TrainGrpoSettings(Settings):
    """Settings of this step."""

    vlm: VlmSettings = VlmSettings()
    grpo: GrpoSettings = GrpoSettings()
    reward: RewardSettings = RewardSettings()


def main(argv: Sequence[str] | None = None) -> None:
    made = step.parser(__doc__, TrainGrpoSettings)
    swift_training.add_arguments(made)
    made.add_argument("--system", type=Path, help="file with the system prompt (.txt)")
    run(made.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    """Train and write what `args` name."""
    values = step.read_settings(args)
    swift_training.quiet_other_ranks()
    inputs = {"train": args.train, "validation": args.validation, **model_folders.identity(args.model)}
    inputs |= {"system": args.system} if args.system else {}
    inputs |= {"reward plugin": Path(values.reward.plugin)} if values.reward.plugin else {}
    record = step.record(args, "scripts.vase.train_grpo", values, inputs)
    hashes = {name: one["sha256"] for name, one in record.inputs.items()}
    folder = args.state_folder / fingerprint(of_kind(values, "numerics"), hashes, record.code)
    record.carries_on(folder)
    first = swift_training.rank() == 0
    with writer_lock(folder, owner="training") if first else contextlib.nullcontext():
        swift_training.set_environment(args.images, args.model, values.vlm, folder / "cache")
        on_cpu = devices.prepare(args.device, values.grpo.precision, step.threads(args), values.grpo.deterministic)
        precision = devices.choose_precision(values.grpo.precision, on_cpu)
        reward_plugin.register(values.reward)

        def flags(resumed: Path | None) -> dict:
            return swift_flags.training_flags(
                values.grpo, values.vlm, args.model, args.train, args.validation, folder, precision, on_cpu,
                swift_training.processes(), resumed,
            ) | swift_flags.reward_flags(values.grpo, values.reward, args.system)  # fmt: skip

        state = swift_training.run("grpo", flags, values.grpo, "vase.grpo", folder, args.tracker_folder, on_cpu)
        if first:
            write(args, values, folder, state, record)
    swift_training.finish(args.state_folder, args.meta)


def write(args: argparse.Namespace, values: TrainGrpoSettings, folder: Path, state: dict, record) -> None:
    """Write all outputs; the model's listing last but for the record."""
    out = args.output_folder
    floors = {"majority answers": majority_reward(args.train, values)}
    metrics = swift_training.write_metrics(out, state, floors)
    completions = out / "completions.jsonl"
    with artefacts.atomic_path(completions) as temporary:
        shutil.copyfile(folder / "completions.jsonl", temporary)
    listing = swift_training.write_model(newest_complete(folder), out / "last", args.model.name)
    record.write(args.meta, [listing, completions, metrics], items=state["global_step"])


def majority_reward(train: Path, values: TrainGrpoSettings) -> float:
    """Mean reward of giving each dimension's most frequent answer of `train`, in the right format, over its rows.

    At most `ROWS` of them: a user's reward may be slow.
    """
    rows = read_rows(train)
    answers = majority_answers(rows, values.reward.synonyms)
    form = "{}" if values.reward.format == "plain" else "<think></think><answer>{}</answer>"
    asked = check_reward.chosen(rows, ROWS, values.grpo.seed)
    texts = [[form.format(answers[row.dimension])] for row in asked]
    return float(check_reward.score(asked, texts, values.reward)["sum"].mean())


if __name__ == "__main__":
    step.run(main)
