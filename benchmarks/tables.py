"""The steps that read whole tables, at a million rows: CPU time and peak memory of each.

Every step runs by its command line, in a process of its own, on tables and small files that `benchmarks.tables_data`
makes; its children count too. Memory is the largest sum of the processes' peak resident sizes (VmHWM), pages of mapped
files among them; the bound is what resource class `light` asks for, 2,000 MB.

concat      pandas.concat of the shards' tables, names split by Series.str.extract, duplicated, to_parquet: what one
            would write in place of vase_list_images
ours        the step

    python -m benchmarks.tables --output benchmarks/output/tables.json
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil

from benchmarks import tables_data as data
from benchmarks.measure import ROOT, processor
from scripts.common.artefacts import write_json

BOUND_MB = 2000
POLL_SECONDS = 0.05
CONCAT = """
import pandas, sys, pathlib
parts = [pandas.read_parquet(path) for path in sorted(pathlib.Path(sys.argv[1]).glob("*.parquet"))]
frame = pandas.concat(parts, ignore_index=True)
pattern = r"(?i)(?P<vase>[A-F0-9-]+)_(?P<view>\\d+)_ac001001\\.jpg$"
frame = frame.join(frame["path"].str.extract(pattern))
frame[frame.duplicated("sha256", keep=False)].sort_values("sha256").to_csv(sys.argv[2] + ".tsv", sep="\\t")
frame.sort_values("path").to_parquet(sys.argv[2])
"""
Facts = dict[str, Any]


def peak_mb(pid: int, peaks: dict[int, float]) -> float:
    """Sum over a process and its living children of the most that each has held; `peaks` remembers."""
    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(pid)
        now = {}
        own = parent.cmdline()  # a child of the same has not begun its own program, and shows its parent's memory
        children = [one for one in parent.children(recursive=True) if _command(one) not in (None, own)]
        for process in (parent, *children):
            with contextlib.suppress(OSError):  # it has just ended
                lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
                peak = next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:")), None)
                if peak is not None:  # None: ended, not yet waited for
                    now[process.pid] = peak
        peaks["most"] = max(peaks.get("most", 0.0), sum(now.values()))
    return peaks.get("most", 0.0)


def _command(process: psutil.Process) -> list[str] | None:
    try:
        return process.cmdline()
    except psutil.Error:  # it has just ended
        return None


def measure(command: Sequence[str]) -> Facts:
    """Wall time, CPU time of all processes and peak memory of a command; a failure ends the benchmark."""
    with tempfile.TemporaryFile() as said:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=said, cwd=ROOT)
        peaks: dict = {}
        while True:
            peak_mb(process.pid, peaks)
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            time.sleep(POLL_SECONDS)
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - start
        said.seek(0)
        if process.returncode:
            text = said.read().decode(errors="replace")
            sys.exit(f"failed with status {process.returncode}: {' '.join(command)[:500]} ...\n{text[-3000:]}")
    cpu = usage.ru_utime + usage.ru_stime
    return {"seconds": round(seconds, 1), "cpu_seconds": round(cpu, 1), "peak_mb": round(peaks["most"])}


def _spread(arguments: Iterable) -> Iterator[str]:
    for one in arguments:
        if isinstance(one, list):
            yield from _spread(one)
        else:
            yield str(one)


class Runner:
    """Runs steps and keeps what they took."""

    def __init__(self, threads: int):
        self.threads, self.found = threads, {}

    def __call__(self, step: str, rows: int, *arguments: object, of: str = "vase", what: str = "rows") -> None:
        """Measure `scripts.{of}.{step}`; lists among its arguments are spread."""
        spread = list(_spread(arguments))
        command = [sys.executable, "-m", f"scripts.{of}.{step}", *spread, "--threads", str(self.threads)]
        self.keep(f"{of}_{step}", rows, what, command)

    def keep(self, name: str, rows: int, what: str, command: Sequence[str]) -> None:
        """Measure a command under a name."""
        self.found[name] = {"rows": rows, "of": what, **measure(command)}
        print(name, json.dumps(self.found[name]), flush=True)


def vase(folder: Path, run: Runner, rows: int) -> None:
    """From the shards' tables to rows for training, with the links to files."""
    data.vase_images(folder, rows)
    data.labelled_images(folder / "list_labelled" / "labelled.parquet", max(rows // 10, 1000))
    data.clip_model(folder / "clip")

    def table(step: str, name: str) -> Path:
        return folder / step / name

    def out(step: str) -> list:
        return ["--output-folder", folder / step, "--meta", folder / step / "meta.json"]

    def parts(step: str, ending: str) -> list:
        return sorted((folder / step).glob(f"*{ending}"))

    manifest, images = table("list_images", "manifest.parquet"), ["--images", folder / "images"]
    listed, splits = ["--manifest", manifest], ["--splits", table("split", "splits.parquet")]
    predictions = ["--predictions", table("link_classes", "predictions.parquet")]
    scores, accepted = ["--scores", folder / "scores.parquet"], table("accept_images", "accepted.parquet")
    shards = parts("inspect_images", ".parquet")
    concat = [sys.executable, "-c", CONCAT, str(folder / "inspect_images"), str(folder / "concat.parquet")]
    run.keep("alternative to vase_list_images: concat", rows, "images", concat)
    run("list_images", rows, "--shards", shards, out("list_images"), what="images")
    labelled = table("list_labelled", "labelled.parquet")
    run("split_labelled", rows // 10, "--labelled", labelled, out("split_labelled"), what="labelled images")
    labelled = table("split_labelled", "labelled.parquet")
    run("split", rows, listed, "--labelled", labelled, out("split"), what="images")
    classes = ["--predictions", parts("classify_images", ".parquet")]
    run("link_classes", rows, images, listed, classes, out("link_classes"), what="images, each a link")
    embeddings = ["--embeddings", parts("embed_images", ".arrow"), "--model", folder / "clip"]
    meta = folder / "scores.meta.json"
    run("score_images", rows, embeddings, "--output", scores[1], "--meta", meta, what=f"embeddings of {data.WIDTH}")
    run("choose_threshold", rows, scores, predictions, splits, out("choose_threshold"), what="images")
    threshold = ["--threshold", table("choose_threshold", "threshold.json"), "--timed", meta]
    accepting = [*images, *listed, *predictions, *scores, *threshold]
    run("accept_images", rows, accepting, out("accept_images"), what="images, four fifths links")
    choosing = [*images, *listed, "--accepted", accepted, "--timed", meta]
    run("select_views", rows, choosing, out("select_views"), what="images")
    data.used_by_classifier(folder / "used.parquet", labelled)
    used = ["--classifier", folder / "used.parquet", "--sample", table("choose_threshold", "sample.parquet")]
    audit = ["--output", folder / "audit.json", "--meta", folder / "audit.meta.json"]
    run("audit_split", rows // data.VIEWS, splits, used, audit, what="vases")
    data.questions(folder / "questions.jsonl", rows, rows // data.VIEWS)
    best = ["--best-views", table("select_views", "best_views.parquet")]
    asked = ["--accepted", accepted, *best, "--questions", folder / "questions.jsonl", *splits]
    run("build_dataset", rows, images, listed, asked, out("build_dataset"), what="questions and images")


def busi(folder: Path, run: Runner, rows: int) -> None:
    """Listing and search with files for a twentieth of the rows, and the split of all."""
    files = max(rows // 20, 300)
    data.busi_images(folder / "images", files)
    classes = ["--classes", *data.busi_listing.ListSettings().classes]
    listed, images = folder / "list_images", ["--images", folder / "images"]
    run(
        "list_images", files, images, "--output-folder", listed, "--meta", listed / "meta.json", of="busi", what="files"
    )
    found = ["--output-folder", folder / "found", "--meta", folder / "found.meta.json"]
    manifest = ["--manifest", listed / "manifest.parquet"]
    run("find_duplicates", files, images, manifest, classes, found, of="busi", what="files")
    search = [sys.executable, "-m", "benchmarks.tables_search", "--pictures", str(rows), "--folder", str(folder)]
    run.keep("busi search alone", rows, "thumbnails in a file", [*search, "--threads", str(run.threads)])
    data.busi_groups(folder / "groups.parquet", rows)
    split = ["--output-folder", folder / "split", "--meta", folder / "split.meta.json"]
    run("split", rows, "--groups", folder / "groups.parquet", classes, split, of="busi", what="images")


def coca(folder: Path, run: Runner, rows: int) -> None:
    """Listing with files for a tenth of the rows, and the split of all."""
    files = max(rows // 10, 300)
    data.coca_slides(folder, files)
    out = ["--output-folder", folder / "list_slides", "--meta", folder / "list_slides" / "meta.json"]
    given = ["--slides", folder / "slides", "--labels", folder / "labels.json", "--state-folder", folder / "state"]
    run("list_slides", files, given, out, of="coca", what="slides, each a file")
    data.coca_manifest(folder / "manifest.parquet", rows)
    out = ["--output-folder", folder / "split", "--meta", folder / "split" / "meta.json"]
    run("split", rows, "--manifest", folder / "manifest.parquet", out, of="coca", what="slides")


def rae(folder: Path, run: Runner, rows: int) -> None:
    """An Arrow folder of small files: the listing, its check and its shards."""
    data.vase_images(folder, rows)
    out = ["--output-folder", folder / "arrow", "--meta", folder / "arrow" / "meta.json"]
    run("build_arrow", rows, "--images", folder / "images", out, of="rae", what="small files")


def biomedica(folder: Path, run: Runner, rows: int) -> None:
    """The index of a tenth of the pairs, and what reads an index of all of them."""
    files = max(rows // 10, 300)
    data.biomedica_repo(folder)
    data.biomedica_shards(folder / "tars", files)
    out = ["--output-folder", folder / "indexed", "--meta", folder / "indexed" / "meta.json"]
    run("index_local", files, "--shards", folder / "tars" / "shards", out, of="biomedica", what="pairs in tars")
    data.biomedica_index(folder, rows)
    given = ["--index", folder / "index", "--remote", folder / "remote"]
    out = ["--output-folder", folder / "held_out", "--meta", folder / "held_out" / "meta.json"]
    run("hold_out", rows, given, "--shards", folder / "shards", out, of="biomedica", what="pairs of the index")
    out = ["--output", folder / "plan.json", "--meta", folder / "plan.meta.json"]
    run("plan", rows, given, out, of="biomedica", what="pairs of the index")


PARTS: dict[str, Callable[[Path, Runner, int], None]] = {
    "vase": vase, "busi": busi, "coca": coca, "rae": rae, "biomedica": biomedica,
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="some of the pipelines")
    made.add_argument("--rows", type=int, default=1_000_000, help="of the tables")
    made.add_argument("--threads", type=int, default=1, help="of each step")
    made.add_argument("--folder", type=Path, help="where the data goes (default: a temporary folder)")
    made.add_argument("--output", type=Path, help="write the figures here too (.json)")
    args = made.parse_args(argv)
    run = Runner(args.threads)
    for name in args.only:
        with tempfile.TemporaryDirectory(dir=args.folder, prefix=f"{name}-") as place:
            PARTS[name](Path(place), run, args.rows)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        facts = {"machine": processor(), "cores": os.cpu_count(), "rows": args.rows, "threads": args.threads}
        write_json(args.output, {**facts, "bound_mb": BOUND_MB, "steps": run.found})


if __name__ == "__main__":
    main()
