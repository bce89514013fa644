"""Answers of base, SFT and GRPO model to the questions of the test side.

Rule `vase_predict`. Each model answers greedily with the right pictures (mode `greedy`), greedily with another vase's
pictures (`shuffled`, no captions), and, the fine-tuned ones, by sampling at temperature 1 (`sampled`). Samples are
drawn under GRPO's system prompt, whichever model draws, since they show what GRPO changed. Killed at any moment, the
same command carries on and ends with the same bytes.
"""

import argparse
import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import pyarrow as pa
import torch

from scripts.common import artefacts, devices, model_folders, progress, step, tables
from scripts.common.errors import KilnError
from scripts.common.fingerprint import fingerprint
from scripts.common.locks import writer_lock
from scripts.common.settings import Settings, of_kind
from scripts.vase import generation
from scripts.vase.settings import CAPTION, VlmSettings, VqaPredictSettings
from scripts.vase.shuffled_images import with_other_images
from scripts.vase.vqa_rows import VqaRow, read_rows

BASE, SFT, GRPO = MODELS = ("base", "sft", "grpo")
SAMPLED = (SFT, GRPO)
KEY = ("model", "mode", "id", "draw")
SCHEMA = pa.schema(
    [(name, pa.string()) for name in ("model", "mode", "id", "vase", "dimension")]
    + [("draw", pa.int64()), ("text", pa.string()), ("tokens", pa.int64())]
)


class PredictStepSettings(Settings):
    """Settings of this step."""

    vlm: VlmSettings = VlmSettings()
    predict: VqaPredictSettings = VqaPredictSettings()


class Batch(NamedTuple):
    """Rows that one model answers together; `draw` counts the samples."""

    model: str
    mode: str
    draw: int
    rows: list[VqaRow]

    @property
    def name(self) -> str:
        return "/".join([self.model, self.mode, str(self.draw), self.rows[0].id])


def batches(model: str, rows: Sequence[VqaRow], values: VqaPredictSettings) -> Iterator[Batch]:
    """All that `model` is asked, in an order that depends on `rows` alone; prompts of a batch are of like length."""
    single = [row for row in rows if row.dimension != CAPTION]
    modes = [("greedy", 0, rows)]
    modes += [("shuffled", 0, with_other_images(single, values.seed))] if single else []
    modes += [("sampled", draw, rows) for draw in range(values.samples) if model in SAMPLED]
    for mode, draw, asked in modes:
        ordered = sorted(asked, key=lambda row: (len(row.images), sum(len(text) for _, text in row.turns), row.id))
        for start in range(0, len(ordered), values.batch_size):
            yield Batch(model, mode, draw, ordered[start : start + values.batch_size])


class Answers:
    """Answers by batch, kept in a file that is whole or absent and never older than `save_minutes` of work."""

    def __init__(self, path: Path, save_minutes: float):
        self.path, self.save_seconds = path, 60 * save_minutes
        self.done: dict[str, list[generation.Answer]] = {}
        if path.is_file():
            for line in path.read_text(encoding="utf-8").splitlines():
                name, found = json.loads(line)
                self.done[name] = [generation.Answer(*one) for one in found]
            step.log.info("resumed: %d batches are answered already", len(self.done))
        self.last_save = time.monotonic()

    def add(self, batch: Batch, answers: list[generation.Answer]) -> None:
        """Keep a batch's answers, and save if a save is due."""
        self.done[batch.name] = answers
        if time.monotonic() - self.last_save >= self.save_seconds:
            self.save()

    def save(self) -> None:
        """Write all answers."""
        lines = [json.dumps([name, answers], ensure_ascii=True) for name, answers in self.done.items()]
        artefacts.write_text(self.path, "".join(line + "\n" for line in lines))
        self.last_save = time.monotonic()


def system_of(batch: Batch, systems: Mapping[str, str]) -> str | None:
    """The system prompt of a batch: the model's own, for samples GRPO's."""
    return systems.get(GRPO if batch.mode == "sampled" and GRPO in systems else batch.model)


def answer(
    folder: Path, images: Path, todo: Sequence[Batch], systems: Mapping[str, str], values: PredictStepSettings, device,
    dtype, answers: Answers,
) -> None:  # fmt: skip
    """Let the model in `folder` answer the batches of `todo`."""
    model, processor = generation.load(folder, device, dtype, values.vlm.max_pixels)
    for batch in progress.bar(todo, f"predict {todo[0].model}"):
        # the model's name is left out: draws of different models are then as alike as the models are
        seed = generation.batch_seed(values.predict.seed, str(batch.draw), *(row.id for row in batch.rows))
        sampling = generation.Sampling() if batch.mode == "sampled" else None
        found = generation.generate(
            model, processor, images, batch.rows, max_new_tokens=values.predict.max_new_tokens,
            system=system_of(batch, systems), sampling=sampling, seed=seed,
        )  # fmt: skip
        answers.add(batch, found)
    answers.save()


def table(asked: Sequence[Batch], answers: Answers) -> pd.DataFrame:
    """predictions.parquet's rows."""
    return pd.DataFrame(
        [
            (batch.model, batch.mode, row.id, row.vase, row.dimension, batch.draw, *one)
            for batch in asked
            for row, one in zip(batch.rows, answers.done[batch.name], strict=True)
        ],
        columns=SCHEMA.names,
    )


def named_paths(given: Sequence[str], option: str) -> dict[str, Path]:
    """{name: path} of NAME=PATH, in the order of `MODELS`.

    Raises:
        KilnError: another form, an unknown name, or one given twice.
    """
    found: dict[str, Path] = {}
    for one in given:
        name, equals, path = one.partition("=")
        if name not in MODELS or not path:
            raise KilnError(f"{option} {one}: expected NAME=PATH", f"NAME is one of {', '.join(MODELS)}")
        if name in found:
            raise KilnError(f"{option} {one}: {name} is given twice", "give each model once")
        found[name] = Path(path)
    return {name: found[name] for name in MODELS if name in found}


def main(argv: Sequence[str] | None = None) -> None:
    made = step.parser(__doc__, PredictStepSettings)
    step.add_device(made)
    made.add_argument(
        "--model", action="append", required=True, metavar="NAME=FOLDER", help="base, sft or grpo; repeatable"
    )
    made.add_argument(
        "--system",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="that model's system prompt; repeatable; grpo=FILE is that of all samples, too",
    )
    made.add_argument("--images", type=Path, required=True, help="folder of the images")
    made.add_argument("--rows", type=Path, required=True, help="test.jsonl of rule vase_build_dataset")
    made.add_argument("--state-folder", type=Path, required=True, help="where the resumable state lies")
    made.add_argument("--output", type=Path, required=True, help="predictions.parquet")
    run(made.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    """Let the models answer what `args` name."""
    values = step.read_settings(args)
    models, systems = named_paths(args.model, "--model"), named_paths(args.system, "--system")
    for name in systems:
        if name not in models and name != GRPO:
            raise KilnError(f"--system {name}=..: there is no --model {name}=..", "give that model, or leave this out")
    inputs = {"rows": args.rows} | {f"system of {name}": path for name, path in systems.items()}
    for name, folder in models.items():
        inputs |= {f"{name}: {part}": path for part, path in model_folders.identity(folder).items()}
    record = step.record(args, "scripts.vase.predict", values, inputs)
    rows = read_rows(args.rows)
    texts = {name: path.read_text(encoding="utf-8").strip() for name, path in systems.items()}
    on_cpu = devices.prepare(args.device, values.predict.precision, step.threads(args))
    precision = devices.choose_precision(values.predict.precision, on_cpu)
    device = torch.device("cpu") if on_cpu else torch.device("cuda", torch.cuda.current_device())
    hashes = {name: one["sha256"] for name, one in record.inputs.items()}
    numerics = of_kind(values, "numerics") | {"precision": precision}
    folder = args.state_folder / fingerprint(numerics, hashes, record.code)
    with writer_lock(folder, owner="answers"):
        answers = Answers(folder / "answers.jsonl", values.predict.save_minutes)
        asked = {name: list(batches(name, rows, values.predict)) for name in models}
        for name, path in models.items():
            todo = [batch for batch in asked[name] if batch.name not in answers.done]
            if todo:
                answer(path, args.images, todo, texts, values, device, devices.DTYPES[precision], answers)
                generation.free(device)
        made = table([batch for some in asked.values() for batch in some], answers)
        tables.write_table(args.output, made, KEY, SCHEMA)
    record.write(args.meta, [args.output], items=len(made))
    shutil.rmtree(args.state_folder, ignore_errors=True)


if __name__ == "__main__":
    step.run(main)
