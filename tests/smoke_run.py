"""Runs of config/smoke.yaml, and settings that make them tiny: the same jobs, on a CPU."""

import json
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import workflow
import yaml

PIPELINES = ("vase", "busi", "rae", "coca", "biomedica")
TINY = {
    "device": "cpu",
    "resources": {name: {"threads": 1, "mem_mb": 2000} for name in ("light", "cpu", "gpu_single")},
    "demo": {
        "draw": {"image_size": 64},
        "ultrasound": {"image_size": 64},
        "digits": {"image_size": 64},
        "slides": {"min_tiles": 20, "max_tiles": 80},
        "figures": {"figures": 200, "samples_per_shard": 40, "min_side": 40, "max_side": 60},
        "encoders": {
            "dinov2": {"input_size": 56, "patch": 7, "width": 48, "layers": 1, "heads": 2},
            "siglip2": {"input_size": 64, "patch": 8, "width": 48, "layers": 1, "heads": 2},
        },
        "published": {
            "vlm": {
                "hidden": 64, "layers": 1, "heads": 4, "kv_heads": 2, "mlp": 128, "vocabulary": 2000,
                "vision_hidden": 64, "vision_depth": 8, "vision_heads": 4, "vision_mlp": 128,
            },
            "clip": {"name": "ViT-S-32-alt"},
        },
    },
    "vase": {
        "classifier": {"arch": "resnet18", "image_size": 64, "workers": 0}, "classify": {"workers": 0},
        "clip": {"workers": 0}, "sft": {"workers": 0, "dataset_processes": 1}, "grpo": {"workers": 0},
    },
    "busi": {"train": {"workers": 0}, "predict": {"workers": 0}},
    "rae": {
        "encoders": {"dinov2": {"input_size": 56}, "siglip2": {"input_size": 64}}, "image_size": 64,
        "decoder": {"size": "free", "layers": 1, "width": 48, "mlp": 96, "heads": 2},
        "perceptual": {"weights": None, "backbone": [8, 16]},
        "discriminator": {"dim": 32, "depth": 3, "heads": 2, "taps": [0, 2], "size": 64},
        "latent_stats": {"workers": 0}, "autoencoder": {"workers": 0}, "dataset": {"processes": 1},
        "evaluate": {"workers": 0, "extractor": "kiln-random", "inception": None},
    },
    "coca": {
        "list": {"processes": 1}, "tokenizer": {"vocabulary": 300},
        "encoder": {"latents": 4, "dim": 32, "depth": 2, "transformer_depth": 1, "heads": 2},
        "model": {
            "dim": 32, "unimodal_depth": 1, "multimodal_depth": 1, "dim_latents": 16, "image_queries": 4,
            "dim_head": 16, "heads": 2, "ff_mult": 2,
        },
        "train": {"workers": 0}, "encode": {"workers": 0}, "caption": {"max_length": 4},
    },
    "biomedica": {
        "index": {"processes": 1}, "plan": {"samples": 80, "batch_size": 16, "lanes": 2, "shuffle_buffer": 16},
        "model": {"config": {
            "embed_dim": 16,
            "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "patch_size": 16, "head_width": 16},
            "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
        }},
        "train": {"workers": 1},
    },
}  # fmt: skip


def run(folder: Path, pipeline: str, settings: dict, cores: int, preset: Sequence[str] = ()) -> float:
    """Run a pipeline's smoke in `folder`: `preset`, config/smoke.yaml on top of it, `settings` on both; its minutes."""
    (folder / "config").mkdir(parents=True)
    shutil.copy(workflow.ROOT / "config/smoke_reward.py", folder / "config")
    own = folder / "config/own.yaml"
    own.write_text(yaml.safe_dump(settings))
    files = [*preset, "config/smoke.yaml", str(own)]
    line = workflow.command(workflow.ROOT, folder, pipeline, "--configfile", *files)
    line[line.index("--cores") + 1] = str(cores)
    start = time.monotonic()
    done = subprocess.run(line, capture_output=True, text=True, cwd=workflow.ROOT, timeout=1800)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return (time.monotonic() - start) / 60


def steps(results: Path) -> dict[str, int]:
    """{training: optimiser steps} of all trainings below `results`."""
    found = {}
    for path in sorted(results.glob("*/train*/**/metrics.json")):
        metrics = json.loads(path.read_text(encoding="utf-8"))
        made = metrics.get("steps")
        if made is None and "train" in metrics:
            made = metrics["train"][-1]["step"]
        if made is None:
            record = json.loads(path.with_name("meta.json").read_text(encoding="utf-8"))
            made = record["items"] / record["settings"]["batch_size"]
        found[str(path.parent.relative_to(results))] = made
    return found


def peaks(results: Path) -> dict[str, float]:
    """{step's folder: peak of the GPU's memory in GB} of all steps below `results` that used one."""
    records = {path: json.loads(path.read_text(encoding="utf-8")) for path in sorted(results.rglob("meta.json"))}
    return {
        str(path.parent.relative_to(results)): record["hardware"]["peak_vram_mb"] / 1e3
        for path, record in records.items()
        if record["hardware"].get("peak_vram_mb")
    }
