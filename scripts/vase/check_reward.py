"""Before GRPO: does the reward vary between the completions of one prompt?

Rule `vase_check_reward`. GRPO learns from advantages (r - mean) / std within a prompt's group (Shao et al. 2024,
DeepSeekMath, section 4.1.2). Where every group's rewards are equal the gradient is zero: training would run and learn
nothing. This step samples as GRPO will, writes how rewards are distributed, and fails when no group varies.
"""

import argparse
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from scripts.common import artefacts, devices, model_folders, progress, step
from scripts.common.errors import KilnError
from scripts.common.settings import Settings
from scripts.vase import generation
from scripts.vase.reward_plugin import load_scorer
from scripts.vase.rewards import Reward
from scripts.vase.settings import GrpoSettings, RewardSettings, VlmSettings
from scripts.vase.vqa_rows import VqaRow, read_rows

QUANTILES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
BATCH = 8  # prompts per forward pass
EQUAL = 1e-6  # rewards of a group that differ by less are equal


class CheckRewardSettings(Settings):
    """Settings of this step."""

    vlm: VlmSettings = VlmSettings()
    grpo: GrpoSettings = GrpoSettings()
    reward: RewardSettings = RewardSettings()


def chosen(rows: Sequence[VqaRow], count: int, seed: int) -> list[VqaRow]:
    """`count` rows drawn by `seed` from `rows`, whatever their order; all where there are fewer."""
    ordered = sorted(rows, key=lambda row: row.id)
    return random.Random(seed).sample(ordered, min(count, len(ordered)))


def sample(model, processor, images: Path, rows: Sequence[VqaRow], values: GrpoSettings, system: str | None):
    """Completions of each row, as GRPO draws them: [rows][generations] texts."""
    sampling = generation.Sampling(values.temperature, values.top_p, values.top_k)
    texts: list[list[str]] = [[] for _ in rows]
    for draw in progress.bar(range(values.generations), "check reward"):
        for start in range(0, len(rows), BATCH):
            some = rows[start : start + BATCH]
            seed = generation.batch_seed(values.seed, str(draw), *(row.id for row in some))
            found = generation.generate(
                model, processor, images, some, max_new_tokens=values.max_completion_length, system=system,
                sampling=sampling, seed=seed,
            )  # fmt: skip
            for number, one in enumerate(found, start=start):
                texts[number].append(one.text)
    return texts


def distribution(rewards: np.ndarray) -> dict[str, Any]:
    """Mean, standard deviation and quantiles of rewards [prompts, generations], and what varies within groups."""
    return {
        "mean": float(rewards.mean()),
        "std": float(rewards.std()),
        "mean_std_within_groups": float(rewards.std(axis=1).mean()),
        "groups_with_variance": float((np.ptp(rewards, axis=1) > EQUAL).mean()),
        "quantiles": {str(q): float(np.quantile(rewards, q)) for q in QUANTILES},
    }


def score(rows: Sequence[VqaRow], texts: Sequence[Sequence[str]], values: RewardSettings) -> dict[str, np.ndarray]:
    """Rewards [prompts, generations] of `content` and `format`, and their weighted sum as GRPO adds them up."""
    shape = len(texts), len(texts[0])
    repeated = [row.columns() for row, group in zip(rows, texts, strict=True) for _ in group]
    flat = [text for group in texts for text in group]
    columns = {name: [one[name] for one in repeated] for name in repeated[0]}
    content = np.array(load_scorer(values)(flat, columns), dtype=float).reshape(shape)
    reward = Reward(values)
    form = np.array([reward.format(text) for text in flat], dtype=float).reshape(shape)
    return {"sum": content + values.format_weight * form, "content": content, "format": form}


def report(rows: Sequence[VqaRow], texts: Sequence[Sequence[str]], rewards: dict[str, np.ndarray]) -> dict[str, Any]:
    """reward_check.json."""
    groups = [
        {
            "id": row.id,
            "dimension": row.dimension,
            "reference": row.reference,
            "mean": float(total.mean()),
            "std": float(total.std()),
            "rewards": total.tolist(),
            "completions": list(group),
        }
        for row, group, total in zip(rows, texts, rewards["sum"], strict=True)
    ]
    prompts, generations = rewards["sum"].shape
    parts = {name: distribution(found) for name, found in rewards.items()}
    return {"prompts": prompts, "generations": generations, **parts, "groups": groups}


def require_variance(made: dict[str, Any]) -> None:
    """Refuse a reward by which GRPO could not learn.

    Raises:
        KilnError: no group has any variance in the summed reward.
    """
    if made["sum"]["groups_with_variance"] > 0:
        return
    shown = ", ".join(f"{100 * float(q):g} %: {value:.3f}" for q, value in made["sum"]["quantiles"].items())
    parts = "; ".join(
        f"{name} mean {made[name]['mean']:.3f}, std {made[name]['std']:.3f}" for name in ("content", "format")
    )
    means = ", ".join(f"{group['mean']:.3f}" for group in made["groups"])
    first = made["groups"][0]
    raise KilnError(
        f"none of {made['prompts']} groups of {made['generations']} completions has any variance in the reward, so "
        f"GRPO's gradient would be zero. Quantiles of the summed reward: {shown}; {parts}; means of the groups: "
        f"{means}. Row {first['id']} ({first['dimension']}, right: {first['reference']!r}) got "
        f"{first['completions'][0][:200]!r}",
        "raise vase.grpo.generations or vase.grpo.temperature; shape the reward, so that half-right answers differ "
        "(vase.reward); look whether the rows have reference and dimension, and whether SFT taught such answers",
    )


def main(argv: Sequence[str] | None = None) -> None:
    made = step.parser(__doc__, CheckRewardSettings)
    step.add_device(made)
    made.add_argument("--model", type=Path, required=True, help="folder of the model that GRPO starts from")
    made.add_argument("--rows", type=Path, required=True, help="grpo_train.jsonl of rule vase_build_dataset")
    made.add_argument("--images", type=Path, required=True, help="folder of the images")
    made.add_argument("--system", type=Path, help="file with the system prompt (.txt)")
    made.add_argument("--output", type=Path, required=True, help="reward_check.json")
    run(made.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    """Check the reward that `args` name."""
    values = step.read_settings(args)
    inputs = {"rows": args.rows, **model_folders.identity(args.model)}
    inputs |= {"system": args.system} if args.system else {}
    inputs |= {"reward plugin": Path(values.reward.plugin)} if values.reward.plugin else {}
    record = step.record(args, "scripts.vase.check_reward", values, inputs)
    rows = chosen(read_rows(args.rows), values.reward.check_prompts, values.grpo.seed)
    system = args.system.read_text(encoding="utf-8").strip() if args.system else None
    on_cpu = devices.prepare(args.device, values.grpo.precision, step.threads(args))
    dtype = devices.DTYPES[devices.choose_precision(values.grpo.precision, on_cpu)]
    device = torch.device("cpu") if on_cpu else torch.device("cuda", torch.cuda.current_device())
    model, processor = generation.load(args.model, device, dtype, values.vlm.max_pixels)
    texts = sample(model, processor, args.images, rows, values.grpo, system)
    made = report(rows, texts, score(rows, texts, values.reward))
    require_variance(made)
    artefacts.write_json(args.output, made)
    total = made["sum"]
    step.log.info(
        "reward %.3f, standard deviation within groups %.3f; %.0f %% of %d groups vary",
        total["mean"], total["mean_std_within_groups"], 100 * total["groups_with_variance"], made["prompts"],
    )  # fmt: skip
    record.write(args.meta, [args.output], items=made["prompts"] * made["generations"])


if __name__ == "__main__":
    step.run(main)
