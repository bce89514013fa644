"""Pipeline `vase`, second half: SFT and GRPO by ms-swift, and answering in batches against one at a time.

answers     greedy answers per second of `scripts.vase.generation`, a batch of prompts against one prompt at a time, as
            one would write it; the same model, prompts and longest answer, and the same texts on a CPU
training    tokens per second and peak memory of rules `vase_train_sft` and `vase_train_grpo`, each in a process of its
            own, by the flags of the rules; tokens are those of prompts (pictures included) and answers

The model is a Qwen2.5-VL of transformers' own classes with random weights, on which speed does not depend. On a GPU use
`--hidden 2048 --layers 28 --device cuda:0 --precision bf16 --batch-size 64`.

    python -m benchmarks.vase_training --output benchmarks/output/vase_training.json
"""

import argparse
import json
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.measure import processor as cpu_name
from benchmarks.measure import seconds_of
from scripts.common import devices, tiny_vlm
from scripts.common.artefacts import write_json
from scripts.common.trackers import tracker
from scripts.common.trainer_checkpoints import WholeCheckpoints
from scripts.vase import generation, reward_plugin, swift_flags, swift_training
from scripts.vase.settings import GrpoSettings, RewardSettings, SftSettings, VlmSettings
from scripts.vase.vqa_rows import read_rows

QUESTIONS = {"technique": ("What technique?", "black-figure"), "shape": ("What shape?", "amphora")}
TARGET = 3.0  # times one at a time, on a CPU
LONGEST = 16  # tokens of an answer


def write_data(root: Path, args: argparse.Namespace) -> None:
    """A model, noise pictures, and rows of questions about them with and without answers."""
    (root / "images").mkdir()
    rng = np.random.default_rng(0)
    words = [word for pair in QUESTIONS.values() for word in pair]
    tiny_vlm.build(
        root / "base", words, hidden=args.hidden, layers=args.layers, vision_hidden=args.hidden,
        vision_depth=max(2, args.layers // 2), image_side=args.side,
    )  # fmt: skip
    lines: dict[str, list[str]] = {"sft": [], "grpo": []}
    for number in range(args.images):
        name = f"{number}.png"
        Image.fromarray(rng.integers(0, 256, (args.side, args.side, 3), dtype=np.uint8)).save(root / "images" / name)
        dimension = list(QUESTIONS)[number % 2]
        question, answer = QUESTIONS[dimension]
        asked = [{"role": "user", "content": f"<image>{question}"}]
        row = {"id": name, "vase": name, "dimension": dimension, "images": [name], "reference": answer, "facts": ""}
        answered = [*asked, {"role": "assistant", "content": answer}]
        lines["sft"].append(json.dumps({**row, "messages": answered}))
        lines["grpo"].append(json.dumps({**row, "messages": asked}))
    for kind, some in lines.items():
        (root / f"{kind}.jsonl").write_text("\n".join(some) + "\n", encoding="utf-8")


def compare_answers(root: Path, args: argparse.Namespace) -> dict:
    """Interleaved runs of both ways over the same prompts."""
    device = torch.device(args.device)
    torch.set_num_threads(args.threads)
    model, processor = generation.load(root / "base", device, devices.DTYPES[args.precision], args.side**2)
    rows = read_rows(root / "grpo.jsonl")

    def answer(size: int) -> list[str]:
        texts = []
        for start in range(0, len(rows), size):
            some = rows[start : start + size]
            found = generation.generate(model, processor, root / "images", some, max_new_tokens=LONGEST)
            texts += [one.text for one in found]
        return texts

    if answer(1) != answer(args.batch_size) and args.device == "cpu":
        sys.exit("batched answers differ from those given one at a time")
    runs = [
        (seconds_of(lambda: answer(1), device), seconds_of(lambda: answer(args.batch_size), device))
        for _ in range(args.runs)
    ]
    ratios = [single / batched for single, batched in runs]
    medians = [statistics.median(column) for column in zip(*runs, strict=True)]
    return {
        "prompts": len(rows),
        "one_at_a_time_per_second": len(rows) / medians[0],
        "batched_per_second": len(rows) / medians[1],
        "ratio": medians[0] / medians[1],
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "target": TARGET,
    }


def prompt_tokens(root: Path, args: argparse.Namespace) -> int:
    """Tokens of the longest prompt, picture included."""
    processor = generation.FAMILY.load_processor(root / "base")
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(root / "base")
    batch = generation.encode(processor, root / "images", read_rows(root / "grpo.jsonl"), None, config)
    return int(batch["attention_mask"].sum(1).max())


def train(kind: str, root: Path, args: argparse.Namespace, connection) -> None:
    """One training by ms-swift; sends seconds, rows and mean answer tokens, and peak memory in MB."""
    on_cpu = args.device == "cpu"
    vlm = VlmSettings(max_pixels=args.side**2)
    folder = root / f"out_{kind}"
    swift_training.set_environment(root / "images", root / "base", vlm, folder / "cache")
    devices.prepare(args.device, args.precision, args.threads)
    shared = {
        "batch_size": args.batch_size, "accumulation": 1, "max_steps": args.steps, "workers": 0,
        "dataset_processes": 1, "gradient_checkpointing": False,
    }  # fmt: skip
    values = SftSettings(**shared) if kind == "sft" else GrpoSettings(
        **shared, tuner={"tuner": "lora"}, generations=8, beta=0, max_completion_length=LONGEST
    )  # fmt: skip
    rows = root / f"{kind}.jsonl"
    flags = swift_flags.training_flags(
        values, vlm, root / "base", rows, rows, folder, args.precision, on_cpu, 1, None
    ) | {"val_dataset": None, "eval_strategy": "no", "save_strategy": "no"}
    if kind == "grpo":
        flags |= swift_flags.reward_flags(values, RewardSettings(format="plain"), None)
        reward_plugin.register(RewardSettings(format="plain"))
    import swift

    from scripts.vase import swift_hooks, swift_template

    swift_template.take_image_tokens_from_tokenizer()
    swift_hooks.register_callbacks(WholeCheckpoints(1, None, None), tracker(folder, "none"), args.steps, "")
    arguments = swift_flags.as_arguments(flags)
    found = (swift.sft_main if kind == "sft" else swift.rlhf_main)(arguments)
    history = found["log_history"]
    lengths = [row["completions/mean_length"] for row in history if "completions/mean_length" in row]
    peak = torch.cuda.max_memory_allocated() / 1e6 if not on_cpu else None
    connection.send(
        {
            "seconds": next(row["train_runtime"] for row in history if "train_runtime" in row),
            "rows": args.steps * args.batch_size,
            "answer_tokens": statistics.mean(lengths) if lengths else 8,
            "peak_mb": peak or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
        }
    )


def measure_training(root: Path, args: argparse.Namespace) -> dict:
    """Each kind of training in a process of its own."""
    context, found = multiprocessing.get_context("spawn"), {}
    tokens = prompt_tokens(root, args)
    for kind in ("sft", "grpo"):
        ours, theirs = context.Pipe()
        process = context.Process(target=train, args=(kind, root, args, theirs))
        process.start()
        theirs.close()
        try:
            one = ours.recv()
        except EOFError:
            sys.exit(f"{kind} failed")
        process.join()
        one["tokens_per_second"] = one["rows"] * (tokens + one["answer_tokens"]) / one["seconds"]
        found[kind] = one
    return {"prompt_tokens": tokens, **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("answers", "training"), help="one of the two")
    parser.add_argument("--hidden", type=int, default=256, help="width of the language model and the vision encoder")
    parser.add_argument("--layers", type=int, default=8, help="of the language model; the vision encoder has half")
    parser.add_argument("--side", type=int, default=112, help="pixels; a token is 28 x 28 of them")
    parser.add_argument("--images", type=int, default=64, help="prompts")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=10, help="of each training")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32")
    parser.add_argument("--output", type=Path, help="all figures as JSON")
    args = parser.parse_args()
    parts = {"answers": compare_answers, "training": measure_training}
    found = {"machine": cpu_name(), **{name: str(value) for name, value in vars(args).items()}}
    with tempfile.TemporaryDirectory() as folder:
        write_data(Path(folder), args)
        for name, part in parts.items():
            if args.only in (None, name):
                found[name] = part(Path(folder), args)
                print(name, json.dumps(found[name], indent=1))
    if args.output:
        write_json(args.output, found)


if __name__ == "__main__":
    main()
