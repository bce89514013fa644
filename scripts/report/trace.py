"""Which steps, settings, code and files a number, or a file of the results, comes from: back to the raw data.

    python -m scripts.report.trace results/demo busi.balanced_accuracy
    python -m scripts.report.trace results/demo busi/predict/main/lora/predictions.csv --code

Read from the records alone (meta.json, files.json); `verify` says whether files are still as recorded.
"""

import argparse
import graphlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from scripts.common import artefacts, run_records, step
from scripts.common.errors import KilnError
from scripts.common.run_records import Artefact, Records

SHORT = 12  # of a sha256 or commit


def file_of(results: Path, records: Records, asked: str) -> str:
    """The file, relative to the results, that holds a metric `pipeline.metric` of summary.json; or `asked` itself.

    Raises:
        KilnError: neither a metric nor a recorded file.
    """
    asked = records.below(asked) or asked
    if asked in records.recorded:
        return asked
    summary = artefacts.read_json(results / "summary.json") if (results / "summary.json").is_file() else {}
    pipeline, _, metric = asked.partition(".")
    if metric in summary.get(pipeline, {}):
        return summary[pipeline][metric]["file"]
    known = ", ".join(f"{name}.{one}" for name, some in summary.items() for one in some)
    what = f"{asked}: no metric of {results}/summary.json and no recorded file"
    raise KilnError(what, f"give a file of the results, or one of {known}")


def back(records: Records, file: str) -> Iterator[tuple[Artefact, list[str], list[str]]]:
    """Each step that `file` comes from, above those that it read from.

    With each are its inputs that other steps made, and its others.
    The others are raw data, models and whatever has no record.
    """
    makers, todo = _makers(records), [file]
    found: dict[str, tuple[Artefact, list[str], list[str]]] = {}
    read_from: dict[str, list[str]] = {}
    while todo:
        artefact = makers.get(todo.pop(0))
        if artefact is None or artefact.meta in found:
            continue
        made, others = [], []
        for path in artefact.inputs:
            below = records.below(path)
            (made if below in makers else others).append(below if below in makers else path)
        found[artefact.meta] = artefact, made, others
        read_from[artefact.meta] = [makers[path].meta for path in made if makers[path].meta != artefact.meta]
        todo += made
    yield from (found[meta] for meta in reversed([*graphlib.TopologicalSorter(read_from).static_order()]))


def lines(records: Records, file: str, code: bool) -> Iterator[str]:
    """What `back` finds, in words; then the packages of all steps together."""
    modules, packages = run_records.noted_modules(records.folder), set()
    for artefact, made, others in back(records, file):
        record = artefact.record
        packages |= {f"{name} {version}" for name, version in record.get("packages", {}).items()}
        commit, _, dirty = (record.get("git_commit") or "unknown").partition("-")
        when, state = record.get("started", "unknown")[:19], dirty and f"-{dirty}"
        yield f"\n{artefact.step}  ({artefact.meta})"
        yield f"  made    {when}, code {record['code'][:SHORT]}, commit {commit[:SHORT]}{state}"
        yield from (f"  from    {path}" for path in made)
        yield from (f"  raw     {path}  sha256 {artefact.inputs[path][:SHORT]}" for path in others)
        if not made and not others:
            yield from (f"  lists   {path}  sha256 {one['sha256'][:SHORT]}" for path, one in artefact.outputs.items())
        for name, key in sorted(modules.get(record["code"], {}).items()) if code else ():
            yield f"  module  {name}  {key[:SHORT]}"
    yield f"\npackages: {', '.join(sorted(packages))}"


def _makers(records: Records) -> dict[str, Artefact]:
    found = {file: artefact for artefact in records.artefacts for file in artefact.outputs}
    for artefact in records.artefacts:
        for listing in artefact.listings:
            found.setdefault(listing, artefact)
            for file in records.listings.get(listing, {}):
                found.setdefault(file, artefact)
    return found


def main(argv: Sequence[str] | None = None) -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("results", type=Path, help="the results folder")
    made.add_argument("what", help="pipeline.metric of summary.json, or a file of the results")
    made.add_argument("--code", action="store_true", help="the modules behind each code key, too")
    args = made.parse_args(argv)
    records = run_records.read(args.results)
    file = file_of(args.results, records, args.what)
    heading = "Steps behind this file, each above those that it read from; other numbers may lie in it, too."
    print("\n".join([f"{args.what}: {file}", heading, *lines(records, file, args.code)]))


if __name__ == "__main__":
    step.run(main)
