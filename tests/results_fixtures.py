"""A small results folder, made with the functions that steps use."""

import json
from pathlib import Path

import pandas as pd
import yaml

from scripts.common import artefacts, code_key, tables

CODE = "scripts.common.trivial"
METRIC = {"value": 0.8, "baseline": 0.5, "n": 100, "ci95": [0.7, 0.9], "higher_is_better": True}


def record(results: Path, step: str, meta: str, outputs: list[str], inputs: list[str] = (), **settings) -> Path:
    """Write the record of finished outputs, as a step does."""
    given = {Path(name).stem: results / name for name in inputs}
    made = artefacts.Record(f"scripts.{step}", settings, given, code_key.code_key(CODE))
    made.write(results / meta, [results / name for name in outputs])
    return results / meta


def make(results: Path, lr: float = 1e-3, metric: dict | None = None) -> Path:
    """Raw images, a list of them, links, a training with two model folders of one name, scores, the summary.

    All folders that a record can stand for occur: beside it, below it, and beside a folder of its own name.
    """
    raw = results / "demo/draw"
    (raw / "images").mkdir(parents=True)
    for name in ("a b.png", "c.png"):
        (raw / "images" / name).write_bytes(name.encode() * 50)
    artefacts.write_listing(raw)
    record(results, "demo.draw", "demo/draw.meta.json", ["demo/draw/files.json"], seed=0)

    rows = [
        {"path": name, "sha256": artefacts.sha256_file(raw / "images" / name), "status": "ok"}
        for name in ("a b.png", "c.png")
    ]
    manifest = results / "vase/list_images/manifest.parquet"
    tables.write_table(manifest, pd.DataFrame(rows), ["path"])
    record(results, "vase.list_images", "vase/list_images/meta.json", ["vase/list_images/manifest.parquet"])

    facts = {row["path"]: {"bytes": 50 * len(row["path"]), "sha256": row["sha256"]} for row in rows}
    links = results / "vase/accept_images/main/accepted"
    links.parent.mkdir(parents=True)
    artefacts.link_folder(links, {name: raw / "images" / name for name in facts}, facts)
    record(
        results,
        "vase.accept_images",
        "vase/accept_images/main/meta.json",
        ["vase/accept_images/main/accepted/files.json"],
        ["vase/list_images/manifest.parquet"],
    )

    train = results / "vase/train_sft/main"
    for side in ("best", "last"):
        (train / side).mkdir(parents=True)
        (train / side / "model.safetensors").write_text(f"{side} {lr}")
        artefacts.write_listing(train / side)
    artefacts.write_json(train / "metrics.json", {"lr": lr})
    record(
        results,
        "vase.train_sft",
        "vase/train_sft/main/meta.json",
        [f"vase/train_sft/main/{name}" for name in ("best/files.json", "last/files.json", "metrics.json")],
        ["vase/accept_images/main/accepted/files.json"],
        lr=lr,
    )

    inputs = ["vase/train_sft/main/metrics.json"]
    headline = {**(metric or METRIC), "file": inputs[0]}
    artefacts.write_json(results / "summary.json", {"vase": {"sft_accuracy": headline}})
    record(results, "report.summarise", "summary.meta.json", ["summary.json"], inputs)

    settings = {"results": str(results), "vase": {"images": f"{results}/demo/draw/images", "sft": {"lr": lr}}}
    (results / "config.yaml").write_text(yaml.safe_dump(settings))
    (results / "code").mkdir()
    modules = code_key.module_keys(CODE)
    keys = {code_key.code_key(CODE): sorted(modules)}
    (results / "code/now.json").write_text(json.dumps({"modules": modules, "keys": keys}))
    (results / "logs").mkdir()
    (results / "logs/a.log").write_text("told\n")
    return results


def edit(path: Path, change) -> None:
    """Put what `change` makes of a file's JSON in its place."""
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))
