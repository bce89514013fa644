"""The front page of a results folder: one static file with the headline numbers, pictures, costs and links.

Rule `report_write_index`. Pictures are inside it, so that it can be mailed, and needs no network; what it links to lies
beside it in the results folder.
"""

import argparse
import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd
import yaml
from PIL import Image

from scripts.common import artefacts, step
from scripts.common.errors import KilnError
from scripts.report.drawn import uses_drawn_data
from scripts.report.fonts import embedded_face
from scripts.report.headlines import counted, digits, shown, verdict
from scripts.report.jobs import record_files
from scripts.report.overview import WAITING, main_metric
from scripts.report.pictures import Kind, Picture, by_kind, find_pictures

TITLES = {
    "vase": "Vases: quality, best views, a vision-language model by SFT and GRPO",
    "busi": "Breast ultrasound: a vision-language model by LoRA",
    "rae": "Representation autoencoder",
    "coca": "Slides and reports: CoCa",
    "biomedica": "Figures and captions: CLIP on local and streamed pairs",
}
WORDS = {  # of the glossary, to which the baselines and kinds of intervals of these names lead
    "baseline": "What a number is compared with: a guess, an untreated input, or the same model before a step.",
    "chance": "The expectation of a random answer or order.",
    "majority": "The answer that is most frequent in training, given to every question (of its kind).",
    "most frequent": "The class that is most frequent on the test side itself: no constant answer scores more.",
    "constant": "One picture for all, each pixel the mean of its place: for PSNR the best that there is.",
    "shrunk input": "The pictures themselves, made 8 times smaller and large again: a blur that needs no model.",
    "before filtering": "All images of the test side, accepted or not.",
    "random view": "A view drawn at random from the same vases.",
    "shuffled images": "The same questions, each asked beside the picture of another vase.",
    "image grounding": "Accuracy with the right pictures, against that with shuffled images: what the model takes from "
    "the picture and not from the words of the question.",
    "before grpo": "The model after SFT, before GRPO, on the same questions.",
    "local only": "Runs of as many steps on local pairs alone; hybrid over local is the difference to them.",
    "baseline + paired difference": "Both models answer the same items. The interval is that of their difference, item "
    "by item, put upon the baseline: it is clear of the baseline where the difference is clear of 0.",
    "delete-a-group jackknife": "Of a number that is no mean, such as rFID: the items are dealt to groups in turn, the "
    "number is computed with each group left out, and the interval follows from how far these differ.",
    "groups": "Items that belong together (views of a vase, slides of a patient, figures of an article, near-twins) "
    "are resampled together, since one tells little more than all: the interval rests on the groups, not on n.",
}
CAPTIONS = 6  # of slides, shown
WIDE, TALL = 1100, 2.5  # pixels; of the width


def bar(one: Mapping[str, Any]) -> dict[str, float]:
    """Places in percent of a metric's value, interval and baseline on a line that holds them all and 0: to 1 where they
    are shares."""
    low, high = one.get("ci95") or (one["value"], one["value"])
    known = {"value": one["value"], "low": low, "high": high, "baseline": one.get("baseline")}
    known = {name: value for name, value in known.items() if value is not None}
    least, most = min(0.0, *known.values()), max(0.0, *known.values())
    most = max(most, 1.0) if most <= 1 and least >= 0 else most + 0.06 * (most - least)
    return {name: round(100 * (value - least) / (most - least), 2) for name, value in known.items()}


def embedded(path: Path) -> str:
    """A PNG as a data URI."""
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


def form(path: Path) -> str:
    """How a picture is shown: "wide", the whole page's width, for a sheet of many; "tall", in a frame that scrolls."""
    width, height = size(path)
    return "wide" if width > WIDE else "tall" if height > TALL * width else ""


def size(path: Path) -> tuple[int, int]:
    """Width and height of a picture in pixels."""
    with Image.open(path) as image:
        return image.size


def not_better(parts: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Names of the parts of a metric that are not clear of their baselines."""
    return [name for name, one in parts.items() if verdict(one) == "not clearly better"]


def sort_pictures(found: Iterable[Picture], funnels: Path) -> tuple[dict[str, list[Picture]], dict[str, list[Kind]]]:
    """({pipeline: pictures in the folder `funnels`}, {pipeline: its other pictures by kind})."""
    drawn: dict[str, list[Picture]] = {}
    others: dict[str, list[Picture]] = {}
    for one in found:
        (drawn if one.path.parent == funnels else others).setdefault(one.category, []).append(one)
    return drawn, {pipeline: by_kind(own) for pipeline, own in others.items()}


def environment(metas: Iterable[Path]) -> dict[str, list[str]]:
    """What artefacts were made with: {commits, machines, gpus, packages}, each as its different values, sorted."""
    found: dict[str, set[str]] = {"commits": set(), "machines": set(), "gpus": set(), "packages": set()}
    for path in metas:
        made = artefacts.read_json(path)
        found["commits"].add(made.get("git_commit") or "not in a repository")
        hardware = made.get("hardware", {})
        found["machines"].add(f"{hardware.get('machine')}, {hardware.get('cpus')} CPU cores")
        found["gpus"] |= set(hardware.get("gpus") or [])
        found["packages"] |= {f"{name} {version}" for name, version in made.get("packages", {}).items()}
    return {name: sorted(values) for name, values in found.items()}


def by_step(funnels: pd.DataFrame, pipeline: str) -> dict[str, list[dict]]:
    """{step: rows of funnels.csv}, in their order; the first two of a step are what came in and was passed on."""
    own = funnels[funnels["pipeline"] == pipeline]
    return {name: _rows(rows) for name, rows in own.groupby("step", sort=False)}


def totals(rules: pd.DataFrame) -> list[dict]:
    """What all rules of rules.csv took, then those of each pipeline, the longest first; services, which wait, left out.

    Keys: name, jobs, seconds and cpu_seconds (sums), longest, peak_rss_mb and peak_vram_mb (largest).
    """
    rules = rules[~rules["rule"].isin(WAITING)]
    sums = dict.fromkeys(("jobs", "seconds", "cpu_seconds"), "sum")
    peaks = dict.fromkeys(("longest", "peak_rss_mb", "peak_vram_mb"), "max")
    by_pipeline = rules.groupby(rules["rule"].str.partition("_")[0]).agg(sums | peaks)
    by_pipeline = by_pipeline.rename_axis("name").sort_values("seconds", ascending=False).reset_index()
    return _rows(pd.concat([rules.agg(sums | peaks).to_frame("all").T.rename_axis("name").reset_index(), by_pipeline]))


def captions(path: Path | None) -> list[dict[str, str]]:
    """Captions of a table {slide, text, caption}, evenly spread over its slides; none without a table."""
    if path is None:
        return []
    frame = pd.read_parquet(path, columns=["slide", "text", "caption"]).sort_values("slide")
    return frame.iloc[np.linspace(0, len(frame) - 1, min(CAPTIONS, len(frame))).astype(int)].to_dict("records")


def links(results: Path, given: Sequence[str]) -> list[tuple[str, str]]:
    """(title, path relative to the page) of items `TITLE=FILE`.

    Raises:
        KilnError: an item has another form, is not there, or lies elsewhere.
    """
    found = []
    for item in given:
        title, equals, path = item.partition("=")
        if not (title and equals and Path(path).is_file() and Path(path).is_relative_to(results)):
            raise KilnError(f"--links {item!r}: expected TITLE=FILE below {results}", "give files that are there")
        found.append((title, str(Path(path).relative_to(results))))
    return found


def main(argv: Sequence[str] | None = None) -> None:
    made = step.parser(__doc__)
    made.add_argument("--results", type=Path, required=True, help="the results folder, in which the page lies")
    made.add_argument("--summary", type=Path, required=True, help="summary.json")
    made.add_argument("--variants", type=Path, required=True, help="variants.csv of report_compare_variants")
    made.add_argument("--funnels", type=Path, required=True, help="funnels.csv of report_draw_funnels")
    made.add_argument("--rules", type=Path, required=True, help="rules.csv of report_measure_jobs")
    made.add_argument("--captions", type=Path, help="captions.parquet of coca_caption")
    made.add_argument("--pictures", type=json.loads, required=True, help="JSON list, see scripts.report.pictures")
    made.add_argument("--links", nargs="*", default=[], metavar="TITLE=FILE", help="what lies beside the page")
    made.add_argument("--output", type=Path, required=True, help="index.html")
    run(made.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    """Write the page."""
    inputs = {name: getattr(args, name) for name in ("summary", "variants", "funnels", "rules")}
    record = step.record(args, "scripts.report.write_index", None, inputs)
    summary = artefacts.read_json(args.summary)
    found = [one for marked in args.pictures for one in find_pictures(marked)]
    drawn, kinds = sort_pictures(found, args.funnels.parent)
    config = yaml.safe_load((args.results / "config.yaml").read_text(encoding="utf-8"))
    variants, rules = pd.read_csv(args.variants), pd.read_csv(args.rules)
    page = _render(
        summary=summary,
        titles=TITLES,
        mains={pipeline: main_metric(pipeline, metrics) for pipeline, metrics in summary.items()},
        drawn=uses_drawn_data(config),
        variants=_rows(variants),
        several=variants.groupby("pipeline")["run"].nunique().gt(1).to_dict(),
        pictures={pipeline: kinds.get(pipeline, []) for pipeline in summary},
        drawn_funnels={pipeline: drawn.get(pipeline, []) for pipeline in summary},
        funnels={pipeline: by_step(pd.read_csv(args.funnels), pipeline) for pipeline in summary},
        rules=_rows(rules),
        totals=totals(rules),
        words=WORDS,
        services=[name for name in WAITING if name in set(rules["rule"])],
        captions=captions(args.captions),
        environment=environment(record_files(args.results)),
        results=config["results"],
        links=links(args.results, args.links),
    )
    artefacts.write_text(args.output, page)
    step.log.info("%s: %d pictures, %.1f MB", args.output, len(found), len(page) / 1e6)
    record.write(args.meta, [args.output])


def _render(**values: Any) -> str:
    template = _template()
    return template.render(font_face=embedded_face(template.render(font_face="", **values)), **values)


def _rows(frame: pd.DataFrame) -> list[dict]:
    return frame.astype(object).where(frame.notna(), None).to_dict("records")


def _template() -> jinja2.Template:
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    made = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    made.lstrip_blocks = True
    made.globals |= {"bar": bar, "counted": counted, "digits": digits, "embedded": embedded, "form": form}
    made.globals |= {"not_better": not_better, "shown": shown, "size": size, "verdict": verdict}
    return made.get_template("index.html.jinja")


if __name__ == "__main__":
    step.run(main)
