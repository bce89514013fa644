"""Describe a results folder as an RO-Crate, for archives and other tools; rule `report_describe_run`.

`ro-crate-metadata.json` at the top of the results names every artefact: its files with their sha256, the step that made
it with code, packages and times, and what that read. Beside it lies a copy of the workflow: Snakefile, rules,
environments, the resolved settings.
"""

import argparse
import os
import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from scripts.common import artefacts, prune, run_records, step
from scripts.common.env_key import env_key
from scripts.common.errors import KilnError
from scripts.common.run_records import Artefact
from scripts.report import crates

ROOT = Path(__file__).resolve().parents[2]


def copy_workflow(config: Path, folder: Path) -> None:
    """A copy of Snakefile, rules, environments and the settings `config` in `folder`, with a `files.json`."""
    with artefacts.atomic_folder(folder) as temporary:
        for pattern in ("Snakefile", "rules/*.smk", "envs/*.yaml"):
            for file in sorted(ROOT.glob(pattern)):
                target = temporary / file.relative_to(ROOT)
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, target)
        shutil.copyfile(config, temporary / "config.yaml")
        artefacts.write_listing(temporary)


def current(found: Sequence[Artefact], results: Path, runs: Mapping[str, Collection[str]]) -> list[Artefact]:
    """Those that belong to `runs`, {pipeline: names of its runs and variants}, or to no run alone."""
    known = results / "state" / prune.VARIANTS
    folders = set(artefacts.read_json(known)) if known.is_file() else set()

    def is_current(meta: str) -> bool:
        parts = meta.split("/")
        for at in range(1, len(parts)):
            if parts[0] in runs and "/".join(parts[:at]) in folders:
                return parts[at].partition(".")[0] in runs[parts[0]]
        return True

    return [one for one in found if is_current(one.meta)]


def main(argv: Sequence[str] | None = None) -> None:
    made = step.parser(__doc__)
    made.add_argument("--results", type=Path, required=True, help="the results folder")
    made.add_argument("--config", type=Path, required=True, help="the resolved settings of the run (config.yaml)")
    made.add_argument(
        "--runs",
        nargs="*",
        default=[],
        metavar="PIPELINE=NAME,NAME",
        help="runs and variants that are described (default: all that are there)",
    )
    made.add_argument("--output", type=Path, required=True, help="ro-crate-metadata.json, at the top of the results")
    made.add_argument("--workflow-folder", type=Path, required=True, help="where the copy of the workflow goes")
    run(made.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    """Describe the results folder that `args` names.

    Raises:
        KilnError: it holds no artefact, a record is damaged, or an argument has another form.
    """
    if args.output != args.results / run_records.CRATE:
        raise KilnError(f"{args.output}: a crate describes its folder", f"give {args.results / run_records.CRATE}")
    record = step.record(args, "scripts.report.describe_run", None, {})
    if not args.config.is_file():
        raise KilnError(f"{args.config}: no such file", "a run of Snakemake writes it; or give --config")
    runs = {}
    for item in args.runs:
        pipeline, equals, names = item.partition("=")
        if not equals:
            raise KilnError(f"--runs {item!r}: expected PIPELINE=NAME,NAME", "give it as vase=main,low-0")
        runs[pipeline] = names.split(",")
    records = run_records.read(args.results)
    own = os.path.relpath(args.meta, args.results)
    found = [one for one in current(records.artefacts, args.results, runs) if one.meta != own]
    if not found:
        raise KilnError(f"{args.results}: no artefact of these runs", "run a pipeline first")
    copy_workflow(args.config, args.workflow_folder)
    workflow = os.path.relpath(args.workflow_folder, args.results)
    crate = crates.build(records, found, workflow, f"{workflow}/Snakefile", _others(args.results, workflow))
    artefacts.write_json(args.output, crate)
    step.log.info("%d artefacts described in %s", len(found), args.output)
    record.write(args.meta, [args.output], items=len(found))


def _others(results: Path, workflow: str) -> dict[str, dict[str, str]]:
    """{file that no record names: what the crate says of it}."""
    found: dict[str, dict[str, str]] = {}
    for path in sorted((results / workflow).rglob("*")):
        if path.is_file():
            found[str(path.relative_to(results))] = {}
    for name, facts in found.items():
        if name.startswith(f"{workflow}/envs/"):
            facts["identifier"] = f"environment key {env_key(results / name)}"
    found[f"{workflow}/config.yaml"]["description"] = "The resolved settings"
    for path in sorted((results / "code").glob("*.json")):
        found[f"code/{path.name}"] = {"description": "Which modules code keys stand for, and the key of each"}
    if (results / run_records.REPORT).is_file():
        found[run_records.REPORT] = {"description": "Pictures, run times and the graph of rules"}
    return found


if __name__ == "__main__":
    step.run(main)
