"""The whole second half for three seeds of drawing, pre-training, SFT and GRPO: each learns what the demo shows."""

import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml
from vase_fixtures import ROOT, write

from scripts.common import artefacts
from scripts.demo.vases import SIDES

pytestmark = pytest.mark.slow(minutes=20)
SEEDS = (1, 2, 3)
DEMO = yaml.safe_load((ROOT / "config/demo.yaml").read_text())


def step(module: str, folder: Path, settings: dict | None = None, **paths) -> None:
    """Run a step as its rule does; `folder` takes its record."""
    command = [sys.executable, "-m", "scripts.common.launch", "--gpus", "0", "--", module, "--threads", "1"]
    for name, value in paths.items():
        for one in value if isinstance(value, list) else [value]:
            command += [f"--{name.replace('_', '-')}", str(one)]
    command += ["--settings", json.dumps(settings)] if settings else []
    command += ["--meta", str(folder / "meta.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, (module, done.stderr[-3000:])


def tables_of(drawn: Path, root: Path) -> dict[str, Path]:
    """What the first half gives, with its filters perfect: pictures without a flaw are accepted."""
    truth = pd.read_parquet(drawn / "truth.parquet")
    good = truth[(truth["quality"] == 1) & truth["side"].isin([s for s in SIDES if s not in ("top", "bottom")])]
    sha = {path: artefacts.sha256_file(drawn / "images" / path) for path in truth["path"]}
    listed = truth[["path", "vase"]].assign(
        sha256=truth["path"].map(sha), view=truth["view"].astype(str), width=128, height=128, status="ok"
    )
    vases = sorted(truth["vase"].unique())
    cuts = (0.7 * len(vases), 0.8 * len(vases))
    sides = ["train" if i < cuts[0] else "validation" if i < cuts[1] else "test" for i in range(len(vases))]
    return {
        "manifest": write(root / "manifest.parquet", listed),
        "accepted": write(root / "accepted.parquet", good[["path", "vase"]].assign(accepted=True)),
        "best_views": write(root / "best.parquet", good.drop_duplicates("vase")[["vase", "path"]], "vase"),
        "splits": write(root / "splits.parquet", [{"vase": v, "side": s} for v, s in zip(vases, sides, strict=True)],
                        "vase"),
    }  # fmt: skip


def summary_of(seed: int, root: Path) -> dict:
    """The headline metrics of one seed."""
    vase, drawn, base = DEMO["vase"], root / "drawn", root / "base"
    draw = {"seed": seed, "vases": 200, "labelled_vases": 1, "shared_vases": 0, "clip_vases": 1}
    step("scripts.demo.draw_vases", root / "1", draw, output_folder=drawn)
    step("scripts.demo.train_vlm", root / "2", {**DEMO["demo"]["vlm"], "seed": seed}, output_folder=base)
    rows, images = root / "rows", drawn / "images"
    published = {name: drawn / f"published/{name}.json" for name in ("captions", "questions")}
    step("scripts.vase.build_dataset", root / "3", images=images, output_folder=rows, **published,
         **tables_of(drawn, root))  # fmt: skip
    sft, grpo = {**vase["sft"], "seed": seed}, {**vase["grpo"], "seed": seed}
    places = {"images": images, "state_folder": root / "state", "tracker_folder": root / "curves"}
    step("scripts.vase.train_sft", root / "4", {"sft": sft}, model=base, train=rows / "sft_train.jsonl",
         validation=rows / "sft_validation.jsonl", output_folder=root / "sft", **places)  # fmt: skip
    step("scripts.vase.merge", root / "5", base=base, adapter=root / "sft/best", images=images,
         prompts=rows / "sft_validation.jsonl", output_folder=root / "merged_sft")  # fmt: skip
    step("scripts.vase.train_grpo", root / "6", {"grpo": grpo, "reward": vase["reward"]},
         model=root / "merged_sft/model", train=rows / "grpo_train.jsonl", validation=rows / "grpo_validation.jsonl",
         output_folder=root / "grpo", **places)  # fmt: skip
    step("scripts.vase.merge", root / "7", base=root / "merged_sft/model", adapter=root / "grpo/last", images=images,
         prompts=rows / "sft_validation.jsonl", output_folder=root / "merged_grpo")  # fmt: skip
    models = [f"base={base}", f"sft={root / 'merged_sft/model'}", f"grpo={root / 'merged_grpo/model'}"]
    step("scripts.vase.predict", root / "8", {"predict": vase["predict"]}, model=models, images=images,
         rows=rows / "test.jsonl", output=root / "predictions.parquet", state_folder=root / "state")  # fmt: skip
    step("scripts.vase.evaluate", root / "9", {"reward": vase["reward"]}, predictions=root / "predictions.parquet",
         rows=rows / "test.jsonl", train=rows / "sft_train.jsonl", images=images,
         output_folder=root / "evaluate")  # fmt: skip
    return artefacts.read_json(root / "evaluate/metrics.json")["summary"]


@pytest.fixture(scope="module")
def summaries(tmp_path_factory) -> dict[int, dict]:
    return {seed: summary_of(seed, tmp_path_factory.mktemp(f"seed_{seed}")) for seed in SEEDS}


def test_every_seed_learns_and_looks_at_its_picture(summaries):
    shown = {seed: {n: (m["value"], m["baseline"]) for n, m in one.items()} for seed, one in summaries.items()}
    print(json.dumps(shown))
    for seed, one in summaries.items():
        accuracy, grounding = one["sft_accuracy"], one["image_grounding"]
        assert accuracy["value"] >= accuracy["baseline"] + 0.15, (seed, shown)
        assert accuracy["ci95"][0] > accuracy["baseline"], (seed, shown)
        assert grounding["value"] >= grounding["baseline"] + 0.20, (seed, shown)
        assert grounding["ci95"][0] > grounding["baseline"], (seed, shown)


def test_grpo_raises_the_mean_reward_and_lowers_none(summaries):
    gains = {seed: one["grpo_reward"]["value"] - one["grpo_reward"]["baseline"] for seed, one in summaries.items()}
    assert sum(gains.values()) > 0, gains
    assert min(gains.values()) >= -0.02, gains
