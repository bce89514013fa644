"""Published numbers beside ours: the same protocol or not, why not, and what reproducing them takes.

Rule `report_compare_paper`. Beside the table (CSV) lie a page in Markdown and one in HTML that needs no other file. A
number stands under `ours` only where the records behind it show the published protocol; any other, such as the demo's,
stands under `this run`, with the differences.
"""

import argparse
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import jinja2
import pandas as pd

from scripts.common import artefacts, step
from scripts.report import lineage
from scripts.report.compare_variants import files_of_runs
from scripts.report.paper_protocols import Comparison, Found, compare
from scripts.report.paper_tables import METRICS, QUANTITIES, Cost, Target, read_costs, read_targets
from scripts.report.summarise import PIPELINES
from scripts.retrieve.models import Model, read_table

COMMAND = "snakemake --profile slurm reproduce_{}"
TEMPLATE = Path(__file__).with_name("paper.html.jinja")
NUMBERS = ("ours", "this_run")
FACTS = ("", "_n", "_ci_low", "_ci_high")
COLUMNS = [
    "pipeline", "metric", "model", "split", "unit", "better", "paper", "paper_n",
    *(f"{name}{fact}" for name in NUMBERS for fact in FACTS),
    "run", "file", "protocol", "differs_in", "differences", "source", "command", *QUANTITIES,
]  # fmt: skip
SHOWN = ("metric", "published for", "published", "ours", "this run, not comparable", "protocol", "source")
COSTS = {"gpus": "GPUs: {:g}", "gpu_hours": "GPU hours: {:g}", "disk_gb": "disk: {:g} GB"}
SAME, DIFFERS, NONE, NOT_RUN = "same", "differs", "no number known", "not run"
SOURCES = {  # what a source names, and where it is
    r"arXiv:(\d{4}\.\d{5})": r"https://arxiv.org/abs/\1",
    r"([\w-]+/[\w.-]+)@([0-9a-f]{7,40})": r"https://github.com/\1/tree/\2",
    r"([\w-]+/[\w.-]+) issue #(\d+)": r"https://github.com/\1/issues/\2",
}


class Piece(NamedTuple):
    """A text of the pages, and what it leads to, if anything."""

    text: str
    url: str = ""


def linked(source: str) -> list[Piece]:
    """A source in pieces: arXiv numbers, GitHub repositories at a commit and issues of such lead there."""
    found, end = [], 0
    for match in re.finditer("|".join(SOURCES), source):
        pattern = next(one for one in SOURCES if re.fullmatch(one, match[0]))
        found += [Piece(source[end : match.start()]), Piece(match[0], re.sub(pattern, SOURCES[pattern], match[0]))]
        end = match.end()
    return [one for one in [*found, Piece(source[end:])] if one.text]


def entry(metrics: Mapping[str, Any], place: Sequence[str]) -> Mapping[str, Any] | None:
    """The entry {value, n, ci95} that stands at `place` in a metrics.json, or None."""
    for name in place:
        if not isinstance(metrics, Mapping) or name not in metrics:
            return None
        metrics = metrics[name]
    return metrics


class Runs:
    """The metrics files of a pipeline's runs, each read once: a list of (run, file, metrics, what made them).

    Args:
        page: the folder of the pages, which `file` is relative to.
    """

    def __init__(self, pipeline: str, given: Sequence[str], page: Path):
        self.pipeline, self.found = pipeline, []
        for (variant, run), paths in files_of_runs(pipeline, given).items():
            name = run if run == variant or run.startswith(f"{variant}-") else f"{variant}/{run}"
            self.found += [
                (name, os.path.relpath(path, page), artefacts.read_json(path), lineage.maker(path)) for path in paths
            ]

    def best(self, target: Target, models: Mapping[str, Model]) -> tuple[str, str, Found, Comparison] | None:
        """The run that is nearest to the target's protocol, the first of several; None: no run has the metric."""
        place, candidates = METRICS[self.pipeline][target.metric], []
        for name, file, metrics, made in self.found:
            one = entry(metrics, place)
            if one is not None:
                found = Found(one, metrics, made)
                candidates.append((name, file, found, compare(target, found, models)))
        return min(candidates, key=lambda one: len(one[3].differences), default=None)


def row(target: Target, runs: Runs, models: Mapping[str, Model], costs: Mapping[str, Cost]) -> dict[str, Any]:
    """A target's row of the table, by `COLUMNS`, None where there is nothing; and what the pages say besides."""
    best = runs.best(target, models)
    made = (
        dict.fromkeys(COLUMNS)
        | {"found": (), "published_n": target.published_n, "beside": ""}
        | {name: getattr(target, name) for name in COLUMNS if hasattr(target, name)}
    )
    made |= {"paper": target.value, "paper_n": target.n, "command": COMMAND.format(target.pipeline)}
    made |= {name: costs[name].value for name in QUANTITIES}
    if best is None:
        made["protocol"] = NONE if target.value is None else NOT_RUN
    else:
        name, file, ours, comparison = best
        low, high = ours.entry.get("ci95") or (None, None)
        column = NUMBERS[0] if comparison.same else NUMBERS[1]
        facts = zip(FACTS, (ours.entry["value"], ours.entry["n"], low, high), strict=True)
        made |= {f"{column}{fact}": value for fact, value in facts} | {"run": name, "file": file}
        if ours.entry.get("baseline") is not None:
            made["beside"] = (
                f", {ours.entry['baseline_kind'].replace('_', ' ')} {digits(ours.entry['baseline'], target.unit)}"
            )
        made["protocol"] = NONE if target.value is None else SAME if comparison.same else DIFFERS
        if made["protocol"] == DIFFERS:
            made["found"] = comparison.differences
            made["differs_in"] = ", ".join(comparison.aspects)
            made["differences"] = "; ".join(one.text for one in comparison.differences)
    return made


def digits(value: float | None, unit: str = "") -> str:
    """A number of the pages: four digits, and its unit where that is not plain."""
    if value is None:
        return ""
    text = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{text}{' dB' if unit == 'dB' else ''}"


def cells(one: Mapping[str, Any], notes: list[str]) -> dict[str, list[Piece]]:
    """What stands in a row of the pages, by `SHOWN`; differences go to `notes`, each once."""
    arrow = {"higher": "↑", "lower": "↓"}[one["better"]]
    published = digits(one["paper"], one["unit"]) + (f", n = {one['published_n']}" if one["published_n"] else "")
    texts = (f"{one['metric']} {arrow}", f"{one['model']}; {one['split']}", published)
    shown = {title: [Piece(text)] for title, text in zip(SHOWN, texts, strict=False)}
    run = [Piece(one["run"], quote(one["file"]))] if one["run"] else []
    for name, title in zip(NUMBERS, SHOWN[3:5], strict=True):
        text = digits(one[name], one["unit"])
        low, high = one[f"{name}_ci_low"], one[f"{name}_ci_high"]
        if text and low is not None:  # resampling items that are all alike tells nothing of the next one
            text += " (no spread)" if low == high else f" [{digits(low)}, {digits(high)}]"
        shown[title] = [Piece(f"{text}, n = {one[f'{name}_n']}{one['beside']} ("), *run, Piece(")")] if text else []
    shown["protocol"], shown["source"] = [Piece(one["protocol"])], linked(one["source"])
    aspect = None
    for found in one["found"]:
        if found.text not in notes:
            notes.append(found.text)
        number = notes.index(found.text) + 1
        if found.aspect != aspect:
            shown["protocol"].append(Piece(f"{',' if aspect else ' in'} {found.aspect}"))
        shown["protocol"] += [Piece(" "), Piece(f"({number})", f"#{one['pipeline']}-{number}")]
        aspect = found.aspect
    return {name: shown[name] for name in SHOWN}


def sections(table: Sequence[Mapping[str, Any]], costs: Mapping[str, Mapping[str, Cost]]) -> list[dict[str, Any]]:
    """A section of the pages for each pipeline: name, command, costs, rows of cells, notes that cells number."""
    made = []
    for pipeline in dict.fromkeys(one["pipeline"] for one in table):
        own = [
            {"amount": COSTS[name].format(cost.value), "basis": cost.basis, "how": cost.how}
            for name, cost in costs[pipeline].items()
        ]
        notes: list[str] = []
        rows = [cells(one, notes) for one in table if one["pipeline"] == pipeline]
        part = {"name": pipeline, "command": COMMAND.format(pipeline), "costs": own}
        made.append({**part, "rows": rows, "notes": notes})
    return made


INTRODUCTION = (
    "A number stands under “ours” only where the records behind it show the published protocol: the same number of "
    "samples, split, reference, features, weights and settings. Any other stands under “this run”, with what differs; "
    "the name of the run leads to its file. “Published for” names the authors’ model and data, not ours. "
    "Intervals are of 95 %; “no spread”: every resample gave the same. ↑: more is better, ↓: less is."
)
DRAWN = "{} numbers of drawn data and tiny models. They show that every step runs; they compare with nothing published."


def warning(pipelines: Sequence[str], drawn: Sequence[str]) -> str:
    """That numbers of ours are of the demo's data, and of which of the `pipelines`; empty where none are."""
    own = [name for name in pipelines if name in drawn]
    if not own:
        return ""
    return DRAWN.format("Our numbers here are" if own == list(pipelines) else f"Our numbers of {', '.join(own)} are")


def as_markdown(parts: Sequence[Mapping[str, Any]], note: str, links: Sequence[Piece]) -> str:
    """The page in Markdown: `note` stands above all, and `links` to what lies beside it."""
    lines = ["# Published numbers and ours", "", *([f"> **{note}**", ""] if note else []), INTRODUCTION, ""]
    lines += [f"See also: {', '.join(map(_in_markdown, links))}", ""] if links else []
    for part in parts:
        about = f"To reproduce: `{part['command']}`. What it does: `docs/{part['name']}.md` in Kiln's folder."
        lines += [f"## {part['name']}", "", about, ""]
        lines += [f"- {one['amount']} ({one['basis']}): {one['how']}" for one in part["costs"]]
        lines += ["", f"| {' | '.join(SHOWN)} |", f"|{'---|' * len(SHOWN)}"]
        for one in part["rows"]:
            lines.append(f"| {' | '.join(''.join(map(_in_markdown, pieces)) for pieces in one.values())} |")
        lines += ["", "What differs:", ""] if part["notes"] else [""]
        lines += [f"{number}. {note}" for number, note in enumerate(part["notes"], start=1)]
        lines += [""] if part["notes"] else []
    return "\n".join(lines)


def _in_markdown(piece: Piece) -> str:
    text = piece.text.replace("|", chr(92) + "|")
    return text if not piece.url or piece.url.startswith("#") else f"[{text}]({piece.url})"  # its notes have no anchors


def as_html(parts: Sequence[Mapping[str, Any]], note: str, links: Sequence[Piece]) -> str:
    """The page in HTML, in one file, with `note` and `links` as `as_markdown` has them."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(parts=parts, columns=SHOWN, introduction=INTRODUCTION, note=note, links=links)


def main(argv: Sequence[str] | None = None) -> None:
    made = step.parser(__doc__)
    for pipeline in PIPELINES:
        made.add_argument(
            f"--{pipeline}", nargs="*", default=[], metavar="VARIANT/RUN=FILE", help=f"metrics files of {pipeline}"
        )
    made.add_argument(
        "--pipelines", nargs="+", choices=PIPELINES, default=PIPELINES, help="whose numbers (default: all)"
    )
    made.add_argument("--targets", type=Path, required=True, help="the published numbers, config/paper_targets.csv")
    made.add_argument("--costs", type=Path, required=True, help="what they cost, config/paper_costs.csv")
    made.add_argument("--models", type=Path, required=True, help="the table of models, config/models.csv")
    made.add_argument("--drawn", nargs="*", choices=PIPELINES, default=[], help="pipelines whose data the demo drew")
    made.add_argument("--front-page", type=Path, help="index.html, to which the pages lead back")
    made.add_argument("--output", type=Path, required=True, help="the table (.csv); the pages go beside it")
    run(made.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    """Compare what `args` name."""
    given = {pipeline: getattr(args, pipeline) for pipeline in PIPELINES}
    inputs = {"targets": args.targets, "costs": args.costs, "models": args.models}
    inputs |= {f"{pipeline} {item}": Path(item.partition("=")[2]) for pipeline in PIPELINES for item in given[pipeline]}
    record = step.record(args, "scripts.report.compare_paper", None, inputs)
    targets, costs, models = read_targets(args.targets), read_costs(args.costs), read_table(args.models)
    runs = {pipeline: Runs(pipeline, given[pipeline], args.output.parent) for pipeline in args.pipelines}
    table = [
        row(target, runs[target.pipeline], models, costs[target.pipeline])
        for target in sorted(targets, key=lambda one: PIPELINES.index(one.pipeline))
        if target.pipeline in runs
    ]
    parts = sections(table, costs)
    frame = pd.DataFrame(table, columns=COLUMNS, dtype=object)
    note, links = warning(args.pipelines, args.drawn), [Piece("this table as CSV", quote(args.output.name))]
    if args.front_page:
        page = quote(os.path.relpath(args.front_page, args.output.parent))
        links.insert(0, Piece("front page (made by snakemake report)", page))
    texts = {
        ".csv": frame.to_csv(index=False),
        ".md": as_markdown(parts, note, links),
        ".html": as_html(parts, note, links),
    }
    for ending, text in texts.items():
        artefacts.write_text(args.output.with_suffix(ending), text)
    for state in (SAME, DIFFERS, NOT_RUN, NONE):
        count = sum(one["protocol"] == state for one in table)
        step.log.info("%d of %d numbers: %s", count, len(table), state)
    record.write(args.meta, [args.output.with_suffix(ending) for ending in texts])


if __name__ == "__main__":
    step.run(main)
