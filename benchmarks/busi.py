"""Pipeline `busi`: search for near-twins, scoring of answers, and training by LoRA against QLoRA.

duplicates  see `benchmarks.busi_duplicates`
scoring     the three answers' likelihoods of a batch of images
            three passes  one whole forward pass over image, prompt and answer for each answer, as one would write it
            ours          `scripts.busi.scoring`: image and prompt once, then the answers' own tokens
training    samples per second and peak memory of rule `busi_train_lora`'s trainer, LoRA against QLoRA, each in a
            process of its own; the same model, images, batch and number of steps

The model is a Qwen2.5-VL of transformers' own classes with random weights, on which speed does not depend; its
sizes are stated. On a GPU use `--hidden 2048 --layers 28 --device cuda`.

    python -m benchmarks.busi --output benchmarks/output/busi.json
"""

import argparse
import json
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image

from benchmarks import busi_duplicates
from benchmarks.measure import processor as cpu_name
from benchmarks.measure import seconds_of
from scripts.busi import fine_tuning, lora, scoring, train_lora
from scripts.busi.chat_examples import ChatExamples
from scripts.busi.settings import PROMPT, TrainLoraSettings
from scripts.common import devices, tiny_vlm, vlm
from scripts.common.artefacts import write_json

CLASSES = ("Normal", "Benign", "Malignant")
FAMILY = vlm.family("qwen")
TARGET = 2.0  # times three passes


def draw_images(folder: Path, count: int, side: int) -> pd.DataFrame:
    """Noise pictures in `folder`, and chat rows of them."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(count):
        Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    names = [f"{number}.png" for number in range(count)]
    labels = [number % 3 for number in range(count)]
    answers = [CLASSES[label] for label in labels]
    return pd.DataFrame({"image": names, "label": labels, "prompt": PROMPT, "answer": answers})


def compare_scoring(args: argparse.Namespace, folder: Path, rows: pd.DataFrame) -> dict:
    """Interleaved runs of both ways to the same numbers."""
    device, dtype = torch.device(args.device), devices.DTYPES[args.precision]
    processor = FAMILY.load_processor(folder / "base")
    model = FAMILY.load_model(folder / "base", dtype=dtype, device_map={"": device}).eval()
    rows = rows.iloc[: args.batch_size]
    answers = scoring.encode_answers(processor.tokenizer, CLASSES)
    prompts = list(ChatExamples(folder / "images", rows, FAMILY, processor, taught=False))
    shared = vlm.to_device(FAMILY.collate(model.config, prompts, 0, "left"), device)
    shared.pop("labels")
    whole = []
    for name in CLASSES:
        taught = ChatExamples(folder / "images", rows.assign(answer=name), FAMILY, processor)
        whole.append(vlm.to_device(FAMILY.collate(model.config, list(taught), 0), device))

    @torch.inference_mode()
    def three_passes() -> torch.Tensor:
        sums = []
        for batch in whole:
            labels = batch["labels"][:, 1:]
            inputs = {name: value for name, value in batch.items() if name != "labels"}
            likely = model(**inputs).logits[:, :-1].double().log_softmax(-1)
            known = likely.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
            sums.append((known * (labels != vlm.IGNORED)).sum(1).cpu())
        return torch.stack(sums, 1)

    def ours() -> torch.Tensor:
        return scoring.log_likelihoods(model, FAMILY, shared, answers)

    difference = float((three_passes() - ours()).abs().max())
    if difference > (1e-3 if dtype == torch.float32 else 0.5):
        sys.exit(f"the two ways differ by {difference}")
    runs = [(seconds_of(three_passes, device), seconds_of(ours, device)) for _ in range(args.runs)]
    ratios = [plain / fast for plain, fast in runs]
    medians = [statistics.median(column) for column in zip(*runs, strict=True)]
    return {
        "tokens_per_prompt": int(shared["attention_mask"].sum(1).max()),
        "three_passes_images_per_second": args.batch_size / medians[0],
        "ours_images_per_second": args.batch_size / medians[1],
        "ratio": medians[0] / medians[1],
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "target": TARGET,
        "largest_difference": difference,
    }


def train_once(method: str, args: argparse.Namespace, folder: Path, rows: pd.DataFrame, connection) -> None:
    """Train a few steps; sends seconds per run and peak memory in MB (of the GPU, or of the process)."""
    torch.set_num_threads(args.threads)
    settings = {
        "epochs": 1,
        "batch_size": args.batch_size,
        "accumulation": 1,
        "workers": 0,
        "precision": args.precision,
    }
    values = TrainLoraSettings.model_validate({"base": {"family": "qwen"}, "train": settings})
    device, dtype = torch.device(args.device), devices.DTYPES[args.precision]
    on_cpu = device.type == "cpu"
    arguments = fine_tuning.training_arguments(values.train, folder / method, args.precision, on_cpu, len(rows), 1)
    arguments.eval_strategy = "no"
    processor = FAMILY.load_processor(folder / "base")
    model = train_lora.load_base(values, FAMILY, folder / "base", dtype, method == "qlora", device)
    model = lora.add_adapters(model, FAMILY, values.lora, method == "qlora", True, None)
    data = ChatExamples(folder / "images", rows, FAMILY, processor)
    fine_tuning.make_trainer(model, FAMILY, processor, arguments, data, data, []).train()  # warm-up
    for _ in range(args.runs):
        trainer = fine_tuning.make_trainer(model, FAMILY, processor, arguments, data, data, [])
        connection.send(seconds_of(trainer.train, device))
    peak = (
        torch.cuda.max_memory_allocated() / 1e6
        if not on_cpu
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    )
    connection.send({"peak_mb": peak, "weights_mb": model.get_memory_footprint() / 1e6})


def compare_training(args: argparse.Namespace, folder: Path, rows: pd.DataFrame) -> dict:
    """Both methods, in turns: their processes wait for each other only by being started one after the other."""
    context, found = multiprocessing.get_context("spawn"), {}
    for method in ("lora", "qlora"):
        ours, theirs = context.Pipe()
        process = context.Process(target=train_once, args=(method, args, folder, rows, theirs))
        process.start()
        seconds = [ours.recv() for _ in range(args.runs)]
        found[method] = {"samples_per_second": [len(rows) / s for s in seconds], **ours.recv()}
        process.join()
    speeds = {method: statistics.median(one["samples_per_second"]) for method, one in found.items()}
    return {**found, "lora_over_qlora": speeds["lora"] / speeds["qlora"]}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("duplicates", "scoring", "training"), help="one of the three")
    parser.add_argument("--hidden", type=int, default=256, help="width of the language model and the vision encoder")
    parser.add_argument("--layers", type=int, default=8, help="of the language model; the vision encoder has half")
    parser.add_argument("--side", type=int, default=336, help="pixels; a token is 28 x 28 of them")
    parser.add_argument("--images", type=int, default=16, help="pictures to train on")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32")
    parser.add_argument("--output", type=Path, help="all figures as JSON")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    where = cpu_name() if args.device == "cpu" else torch.cuda.get_device_name(args.device)
    facts = {"machine": where, **{name: str(value) for name, value in vars(args).items()}}
    wanted = [args.only] if args.only else ["duplicates", "scoring", "training"]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        if args.only != "duplicates":
            rows = draw_images(folder / "images", args.images, args.side)
            tiny_vlm.build(
                folder / "base", [PROMPT, *CLASSES], hidden=args.hidden, layers=args.layers, image_side=args.side,
                vision_hidden=args.hidden, vision_depth=max(args.layers // 2, 1),
            )  # fmt: skip
        for name in wanted:
            work = {
                "duplicates": lambda: busi_duplicates.compare(runs=args.runs, threads=args.threads),
                "scoring": lambda: compare_scoring(args, folder, rows),
                "training": lambda: compare_training(args, folder, rows),
            }[name]
            facts[name] = work()
            print(name, json.dumps(facts[name], indent=1))
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        write_json(args.output, facts)


if __name__ == "__main__":
    main()
