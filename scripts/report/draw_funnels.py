"""What each stage of each pipeline took in, passed on and left out, and why: a picture a pipeline, and one table.

Rule `report_draw_funnels`. `funnels.csv` has a row for each stage and fate: pipeline, step, items, fate (in, passed,
or the name that the stage has for it), reason, count.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from scripts.common import artefacts, plots, step
from scripts.common.errors import KilnError
from scripts.report.funnels import Stage, read_stage
from scripts.report.summarise import PIPELINES

SHOWN = 3  # reasons in a picture; the table has all
COLUMNS = ["pipeline", "step", "items", "fate", "reason", "count"]


def rows(stage: Stage) -> list[dict]:
    """A row for what came in, what was passed on, and each reason to leave items out."""
    place = {"pipeline": stage.pipeline, "step": stage.step, "items": stage.items}
    fates = [("in", "", stage.total), ("passed", "", stage.passed)]
    fates += [(fate, reason, count) for (fate, reason), count in stage.lost.items()]
    return [{**place, "fate": fate, "reason": reason, "count": count} for fate, reason, count in fates]


def parts(stage: Stage) -> dict[str, int]:
    """What a stage's bar is made of: what was passed on, the commonest reasons, and all others together."""
    reasons: dict[str, int] = {}
    for (_, reason), count in sorted(stage.lost.items(), key=lambda one: (-one[1], one[0])):
        reasons[reason] = reasons.get(reason, 0) + count
    named = dict(list(reasons.items())[: SHOWN if len(reasons) <= SHOWN else SHOWN - 1])
    rest = len(reasons) - len(named)
    others = {f"{rest} other reasons": sum(reasons.values()) - sum(named.values())} if rest else {}
    return {"passed on": stage.passed, **named, **others}


def main(argv: Sequence[str] | None = None) -> None:
    made = step.parser(__doc__)
    for pipeline in PIPELINES:
        made.add_argument(
            f"--{pipeline}", type=Path, nargs="*", default=[], help=f"summaries of {pipeline}, first to last"
        )
    made.add_argument("--output-folder", type=Path, required=True, help="where funnels.csv and the pictures go")
    run(made.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    """Draw the funnels of the pipelines that `args` name."""
    given = {pipeline: getattr(args, pipeline) for pipeline in PIPELINES}
    inputs = {f"{pipeline} {path.parent.name}": path for pipeline, paths in given.items() for path in paths}
    record = step.record(args, "scripts.report.draw_funnels", None, inputs)
    stages = {name: [read_stage(name, path) for path in paths] for name, paths in given.items() if paths}
    if not stages:
        raise KilnError("no summary is given", "name at least one: --rae rae/build_arrow/summary.json")
    frame = pd.DataFrame([row for own in stages.values() for one in own for row in rows(one)])[COLUMNS]
    outputs = [args.output_folder / "funnels.csv"]
    artefacts.write_text(outputs[0], frame.to_csv(index=False))
    for pipeline, own in stages.items():
        outputs.append(args.output_folder / f"{pipeline}.png")
        bars = {f"{one.step.replace('_', ' ')}\n{one.total:,} {one.items}": parts(one) for one in own}
        plots.shares(outputs[-1], bars, f"{pipeline}: what became of the items")
    record.write(args.meta, outputs)


if __name__ == "__main__":
    step.run(main)
