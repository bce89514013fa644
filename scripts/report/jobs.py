"""What every job took, from the workflow's benchmark files and the artefacts' records beside them."""

from datetime import datetime
from pathlib import Path

import pandas as pd

from scripts.common.artefacts import read_json
from scripts.common.errors import KilnError

FACTS = {"seconds": "s", "cpu_seconds": "cpu_time", "peak_rss_mb": "max_rss"}  # ours: Snakemake's column
RECORDED = ("peak_vram_mb", "items", "items_per_second")
UNITS = {"vase": "images", "busi": "images", "rae": "images", "coca": "slides", "biomedica": "pairs", "demo": "images"}
OTHER_UNITS = {  # of rules whose items are not their pipeline's; a step is one of the optimiser
    "busi_list_images": "files", "busi_train_lora": "steps",
    "vase_build_dataset": "questions", "vase_check_reward": "completions", "vase_evaluate": "questions",
    "vase_predict": "answers", "vase_split": "vases", "vase_split_labelled": "vases", "vase_train_grpo": "steps",
    "vase_train_sft": "steps", "coca_train_tokenizer": "texts", "biomedica_list_remote": "shards",
    "demo_draw_slides": "slides", "demo_train_vlm": "samples",
}  # fmt: skip
COLUMNS = ["rule", "job", "ended", *FACTS, *RECORDED]


def read_jobs(results: Path) -> pd.DataFrame:
    """A row for each job whose benchmark file lies below `results`, sorted by rule and job.

    Columns: rule (`vase_train_sft`), job (its wildcards, joined by "/"), ended (seconds since the epoch), seconds (with
    start and imports; of a training that carried on, of all its attempts), cpu_seconds and peak_rss_mb (MiB, all its
    processes; both of the last attempt), and of its meta.json, where it has them: peak_vram_mb, items,
    items_per_second; else NaN.

    Raises:
        KilnError: a benchmark file cannot be read.
    """
    folder, rows = results / "benchmarks", []
    for path in sorted(folder.rglob("*.tsv")):
        pipeline, step, *job = path.relative_to(folder).with_suffix("").parts
        try:
            taken = pd.read_csv(path, sep="\t").iloc[-1]  # a job that was tried again has a line for each time
            facts = {ours: float(taken[theirs]) for ours, theirs in FACTS.items()}
        except (ValueError, KeyError, IndexError) as error:
            raise KilnError(f"{path}: no benchmark of Snakemake's: {error}", "delete it") from None
        record = record_of(results.joinpath(pipeline, step, *job))
        made = read_json(record) if record else {}
        started = made.get("started")  # a file's time may be that of a copy
        ended = datetime.fromisoformat(started).timestamp() + facts["seconds"] if started else path.stat().st_mtime
        facts["seconds"] = max(facts["seconds"], made.get("wall_seconds") or 0)
        facts["peak_rss_mb"] = max(facts["peak_rss_mb"], made.get("peak_rss_mb") or 0)  # short jobs escape Snakemake
        name = {"rule": f"{pipeline}_{step}", "job": "/".join(job), "ended": ended}
        rows.append(name | facts | {fact: made.get(fact) for fact in RECORDED})
    frame = pd.DataFrame(rows, columns=COLUMNS)
    return frame.astype(dict.fromkeys((*FACTS, *RECORDED), float))


def by_rule(jobs: pd.DataFrame) -> pd.DataFrame:
    """One row for each rule, the longest first: jobs, seconds (sum), longest (seconds of the longest job), cpu_seconds
    (sum), the largest peaks, items (sum), items_per_second (median of its jobs; start and imports left out), and
    the unit that items are counted in."""
    table = jobs.groupby("rule").agg(
        jobs=("seconds", "size"), seconds=("seconds", "sum"), longest=("seconds", "max"),
        cpu_seconds=("cpu_seconds", "sum"), peak_rss_mb=("peak_rss_mb", "max"), peak_vram_mb=("peak_vram_mb", "max"),
        items=("items", lambda own: own.sum(min_count=1)), items_per_second=("items_per_second", "median"),
    )  # fmt: skip
    table["unit"] = [OTHER_UNITS.get(rule) or UNITS.get(rule.partition("_")[0], "items") for rule in table.index]
    return table.sort_values(["seconds", "rule"], ascending=[False, True]).reset_index()


def record_files(results: Path) -> list[Path]:
    """The meta.json of each job whose benchmark file lies below `results`, where it has one."""
    folder = results / "benchmarks"
    places = (results / path.relative_to(folder).with_suffix("") for path in sorted(folder.rglob("*.tsv")))
    return [record for record in map(record_of, places) if record]


def record_of(place: Path) -> Path | None:
    """The meta.json of a job whose results lie in the folder `place`, or beside that name."""
    found = (place / "meta.json", place.with_name(f"{place.name}.meta.json"))
    return next((path for path in found if path.is_file()), None)
