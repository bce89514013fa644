"""A small results folder for the tests of the report: what its steps read, with known numbers."""

import json
from pathlib import Path

import pandas as pd
from PIL import Image

from scripts.report import write_index

METRIC = {
    "value": 0.6, "baseline": 0.1, "baseline_kind": "chance", "ci95": [0.5, 0.7], "higher_is_better": True,
    "trivial": 0.2, "n": 1234, "file": "coca/train/main/metrics.json",
}  # fmt: skip
BENCHMARK = "s\th:m:s\tmax_rss\tmax_vms\tmax_uss\tmax_pss\tio_in\tio_out\tmean_load\tcpu_time\n"


def write_summary(folder: Path, step: str, summary: dict) -> Path:
    """summary.json and meta.json of a stage; the summary."""
    folder.mkdir(parents=True)
    (folder / "meta.json").write_text(json.dumps({"step": f"scripts.{step}"}))
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder / "summary.json"


def write_benchmark(results: Path, job: str, *seconds: float, rss: float = 100, cpu: float = 1) -> Path:
    """The benchmark file of a job, a line for each attempt; its path."""
    path = results / f"benchmarks/{job}.tsv"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(BENCHMARK + "".join(f"{one}\t0:00:01\t{rss}\t1\t1\t1\t0\t0\t50\t{cpu}\n" for one in seconds))
    return path


def picture(path: Path, size: tuple[int, int] = (800, 500)) -> Path:
    """A PNG of that size."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "teal").save(path)
    return path


def results(folder: Path, caption: str = "浸润性导管癌", stages: int = 1) -> Path:
    """A results folder of `coca` with two variants, three pictures, one caption, and one or two stages that filter."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text("results: results\ncoca: {slides: /data/slides}\n")
    (folder / "summary.json").write_text(json.dumps({"coca": {"retrieval_r5": METRIC}}))
    rows = [
        {"pipeline": "coca", "metric": "retrieval_r5", "variant": one, "run": one, "value": value, "n": 1234}
        for one, value in (("main", 0.6), ("fast", 0.4))
    ]
    pd.DataFrame(rows).to_csv(folder / "variants.csv", index=False)
    fates = [("in", "", 10), ("passed", "", 7), ("quarantined", "truncated <file>", 3)]
    names = (("list_slides", "slide files"), ("split", "slides"))[:stages]
    funnels = [
        {"pipeline": "coca", "step": step, "items": items, "fate": fate, "reason": reason, "count": count}
        for step, items in names
        for fate, reason, count in fates
    ]
    pd.DataFrame(funnels).to_csv(folder / "funnels.csv", index=False)
    rules = {"rule": "coca_train", "jobs": 1, "seconds": 7200.0, "longest": 7200.0, "cpu_seconds": 3.0,
             "peak_rss_mb": 1234.5, "peak_vram_mb": None, "items": 10, "items_per_second": 2.5}  # fmt: skip
    short = {"rule": "coca_split", "jobs": 2, "seconds": 0.06, "longest": 0.03, "cpu_seconds": 0.0, "peak_rss_mb": 50.0}
    waiting = short | {"rule": "demo_serve_hub", "seconds": 900.0}
    units = [{"unit": "slides"}, {"unit": "slides"}, {"unit": "images"}]
    made = [one | unit for one, unit in zip((rules, short, waiting), units, strict=True)]
    pd.DataFrame(made).to_csv(folder / "rules.csv", index=False)
    pd.DataFrame({"slide": ["P1"], "text": ["<b>bold</b>"], "caption": [caption]}).to_parquet(
        folder / "captions.parquet"
    )
    meta = {"git_commit": "a" * 40, "hardware": {"machine": "x86_64", "cpus": 8, "gpus": ["H200"]},
            "packages": {"torch": "2.14.1"}}  # fmt: skip
    (folder / "coca/train/main").mkdir(parents=True)
    (folder / "coca/train/main/meta.json").write_text(json.dumps(meta))
    (folder / "coca/train/main/metrics.json").write_text(json.dumps({"summary": {"retrieval_r5": METRIC}}))
    write_benchmark(folder, "coca/train/main", 7200)
    for name, size in {"loss": (800, 500), "sheet": (1500, 400), "pairs": (400, 1400)}.items():
        picture(folder / f"coca/train/main/{name}.png", size)
    return folder


def of_runs(folder: Path, caption: Path, count: int) -> dict:
    """Curves of many runs of a training of such a folder, as they are marked for reports."""
    for number in range(count):
        picture(folder / f"coca/train/run-{number}/curve.png")
    labels = {"step": "train {run}", "picture": "curve"}
    pattern = f"{folder}/coca/train/run-{{run,[0-9]+}}/curve.png"
    return {"pattern": pattern, "caption": str(caption), "category": "coca", "labels": labels}


def index_arguments(folder: Path, caption: Path, *more: dict) -> list[str]:
    """The command line of the front page of such a folder, with `more` marked pictures."""
    tables = {name: f"{folder}/{name}.csv" for name in ("variants", "funnels", "rules")}
    marked = {
        "pattern": f"{folder}/coca/train/main/{{name,loss|sheet|pairs}}.png",
        "caption": str(caption),
        "category": "coca",
        "labels": {"step": "train", "picture": "{name}"},
    }
    given = [f"--{name}={path}" for name, path in tables.items()]
    return [
        f"--results={folder}", f"--summary={folder}/summary.json", *given, f"--captions={folder}/captions.parquet",
        f"--pictures={json.dumps([marked, *more])}", "--links", f"settings={folder}/config.yaml",
        f"--output={folder}/index.html", f"--meta={folder}/index.meta.json", "--code-key", "k",
    ]  # fmt: skip


def rendered(place: Path, summary: dict | None, *more: dict, runs: int = 0, stages: int = 1) -> str:
    """The front page of such a folder below `place`, with another `summary`, `more` pictures and curves of `runs`."""
    folder = results(place / "results", stages=stages)
    (place / "caption.rst").write_text("What it shows.")
    (place / "runs.rst").write_text("What runs show.")
    if summary is not None:
        (folder / "summary.json").write_text(json.dumps(summary))
    curves = [of_runs(folder, place / "runs.rst", runs)] if runs else []
    write_index.main(index_arguments(folder, place / "caption.rst", *more, *curves))
    return (folder / "index.html").read_text()
