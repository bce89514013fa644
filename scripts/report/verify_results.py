"""Hash all results again, and say what does not match its record; rule `report_verify_results`.

    python -m scripts.report.verify_results results/demo

Outputs are compared with the `meta.json` that names them, members of a folder with its `files.json`, records with the
RO-Crate, and what each step read with what the step before it says now. With --raw also what lies outside the results:
raw images with the lists of them, models and tables with the records of what was made from them. Exit status 1 if
something is off.
"""

import argparse
import collections
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from joblib import Parallel, delayed

from scripts.common import artefacts, progress, run_records, step, tables
from scripts.common.errors import KilnError
from scripts.common.run_records import Facts, Hashes, Records

SHOWN = 50
MEND = "take what changed or is missing from a copy, or delete it and run Snakemake again, which makes it anew"
MOVE = "move what no record names elsewhere, or delete it"
HINTS = {
    "changed": MEND,
    "missing": MEND,
    "older input": "run Snakemake again; `make accept RULE=...` keeps a training as it is",
    "no record": MOVE,
    "not listed": MOVE,
}
# Lists of raw files with the sha256 of their bytes, and the setting of the folder that their paths start in.
RAW_LISTS = {
    "vase/list_images/manifest.parquet": "vase.images",
    "vase/list_labelled/labelled.parquet": "vase.labelled",
    "busi/list_images/manifest.parquet": "busi.images",
}


class Finding(NamedTuple):
    """What is off.

    Attributes:
        what: changed, missing, older input, no record, or not listed.
        file: relative to the results folder, or as recorded if it lies outside.
        detail: what was found, and expected by what.
    """

    what: str
    file: str
    detail: str


class Expected(NamedTuple):
    """What a file should be.

    Attributes:
        name: what a finding calls it.
        path: where it, or a link to it, lies.
        real: the file itself.
        facts: as `source` says; of a link whose target nobody recorded, none.
    """

    name: str
    path: str
    real: str
    facts: Facts
    source: str


def _expect(name: str, path: Path, facts: Facts, source: str) -> Expected:
    return Expected(name, str(path), os.path.realpath(path), facts, source)


def verify(folder: Path, raw: bool, threads: int) -> tuple[list[Finding], int]:
    """What is off below a results folder, by file, and how many files were compared.

    Args:
        raw: also read what lies outside the folder.

    Raises:
        KilnError: the folder holds no records, or a record is damaged.
    """
    records = run_records.read(folder)
    crate = run_records.crate_hashes(folder)
    expected = [*_own(records), *_described(records, crate)]
    inside = f"{folder.resolve()}/"
    expected = [one for one in expected if raw or one.real.startswith(inside)]
    if raw:
        expected += [*_raw_inputs(records), *_raw_lists(records)]
    found = _hash(expected, threads)
    findings = [*_differing(expected, found), *_older_inputs(records, found), *_unrecorded(records, crate)]
    return sorted(set(findings), key=lambda one: (one.file, one.what)), len(found)


def _own(records: Records) -> Iterator[Expected]:
    for artefact in records.artefacts:
        for file, facts in artefact.outputs.items():
            yield _expect(file, records.folder / file, facts, artefact.meta)
    for listing, entries in records.listings.items():
        for file, facts in entries.items():
            yield _expect(file, records.folder / file, facts, listing)


def _described(records: Records, crate: Hashes | None) -> Iterator[Expected]:
    """Records themselves, and files without one, by the crate; records that are younger than it are not in it."""
    if crate is None:
        return
    made = {artefact.meta: artefact for artefact in records.artefacts}
    recorded = records.recorded
    for file, facts in crate.files.items():
        if file in made and _last_change(made[file].record) > crate.when:
            continue
        if file not in recorded and not (file not in made and _made_since(records, file, crate)):
            yield _expect(file, records.folder / file, facts, run_records.CRATE)


def _made_since(records: Records, file: str, crate: Hashes) -> bool:
    """Whether a file belongs to an artefact that was made after the crate."""
    owners = (one for one in records.artefacts if file in one.listings)
    return any(_last_change(one.record) > crate.when for one in owners)


def _last_change(record: dict[str, Any]) -> str:
    """When a step started, or its result was last accepted: ISO 8601, in UTC."""
    return max(record.get("started", ""), *(one["when"] for one in record.get("accepted", [])), "")


def _raw_inputs(records: Records) -> Iterator[Expected]:
    for artefact in records.artefacts:
        for path, digest in artefact.inputs.items():
            if records.below(path) is None:
                yield _expect(path, Path(path), {"sha256": digest}, artefact.meta)


def _raw_lists(records: Records) -> Iterator[Expected]:
    settings = run_records.read_settings(records.folder)
    for table, key in RAW_LISTS.items():
        if table not in records.files:
            continue
        section, name = key.split(".")
        place = settings.get(section, {}).get(name)
        if place is None:
            raise KilnError(f"{records.folder}/config.yaml: no {key}, by which {table} is read", "run once more")
        within = records.below(f"{place}/")
        above = records.folder / within if within is not None else Path(place)
        for row in tables.read_table(records.folder / table, ["path", "sha256"]).itertuples():
            yield _expect(str(Path(place, row.path)), above / row.path, {"sha256": row.sha256}, table)


def _hash(expected: Sequence[Expected], threads: int) -> dict[str, tuple[int, str] | None]:
    """{real path: bytes and sha256, None if there is no such file}, each read once."""
    paths = sorted({one.real for one in expected if "sha256" in one.facts})
    jobs = Parallel(n_jobs=threads, prefer="threads", return_as="generator")
    made = jobs(delayed(_facts)(path) for path in paths)
    return dict(zip(paths, progress.bar(made, "files read", total=len(paths)), strict=True))


def _facts(path: str) -> tuple[int, str] | None:
    try:
        return os.path.getsize(path), artefacts.sha256_file(Path(path))
    except OSError:
        return None


def _differing(expected: Sequence[Expected], found: dict[str, tuple[int, str] | None]) -> Iterator[Finding]:
    for one in expected:
        if "sha256" not in one.facts:  # a link without facts, of which only its own place is known
            if not os.path.lexists(one.path):
                yield Finding("missing", one.name, f"named by {one.source}")
            continue
        facts = found[one.real]
        if facts is None:
            yield Finding("missing", one.name, f"named by {one.source}")
            continue
        size, digest = facts
        if one.facts.get("bytes", size) != size:
            yield Finding("changed", one.name, f"{size} bytes, expected {one.facts['bytes']} by {one.source}")
        elif digest != one.facts["sha256"]:
            wanted = one.facts["sha256"]
            yield Finding("changed", one.name, f"sha256 {digest[:12]}, expected {wanted[:12]} by {one.source}")


def _older_inputs(records: Records, found: dict[str, tuple[int, str] | None]) -> Iterator[Finding]:
    """What was made from another state of an input than the one that its own record names."""
    recorded = records.recorded
    for artefact in records.artefacts:
        for path, digest in artefact.inputs.items():
            file = records.below(path)
            if file is None:
                continue
            now = recorded[file]["sha256"] if file in recorded else None
            if now is None and (facts := found.get(os.path.realpath(records.folder / file))):
                now = facts[1]
            if now is not None and now != digest:
                detail = f"made from {file} with sha256 {digest[:12]}, which is {now[:12]} now"
                yield Finding("older input", artefact.meta, detail)


def _unrecorded(records: Records, crate: Hashes | None) -> Iterator[Finding]:
    known = {run_records.CRATE, *(crate.files if crate else ()), *records.recorded, *records.listings}
    for artefact in records.artefacts:
        known |= {artefact.meta, *artefact.outputs}
    for entries in records.listings.values():
        known |= entries.keys()
    for file in records.files - known:
        listing = next((one for one in _above(file) if one in records.listings), None)
        if listing:
            yield Finding("not listed", file, f"no entry in {listing}")
        else:
            yield Finding("no record", file, "no meta.json or files.json names it")


def _above(file: str) -> Iterator[str]:
    while file:
        file = os.path.dirname(file)
        yield os.path.join(file, run_records.LISTING)


def table(findings: Sequence[Finding]) -> str:
    """Findings as aligned text, the first of them."""
    rows = [Finding("what", "file", "detail"), *findings[:SHOWN]]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    lines = [f"{what:<{widths[0]}}  {file:<{widths[1]}}  {detail}" for what, file, detail in rows]
    if len(findings) > SHOWN:
        lines.append(f"and {len(findings) - SHOWN} more; --output FILE has all")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    made = argparse.ArgumentParser(
        prog="python -m scripts.report.verify_results",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("results", type=Path, help="the results folder, such as results/demo")
    made.add_argument("--raw", action="store_true", help="read raw data and models outside the results, too")
    made.add_argument("--output", type=Path, help="a table (tsv) of all that is off")
    made.add_argument("--threads", type=int, default=None, help="files read at a time (default: CPUs it may use)")
    run(made.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    """Verify the results folder that `args` names.

    Raises:
        KilnError: something is off, after the table of it is printed.
    """
    findings, count = verify(args.results, args.raw, step.threads(args))
    if args.output:
        frame = pd.DataFrame(findings, columns=Finding._fields)
        artefacts.write_text(args.output, frame.to_csv(sep="\t", index=False))
    if not findings:
        print(f"{args.results}: {count} files read, all as recorded")
        return
    print(table(findings), flush=True)
    counts = collections.Counter(one.what for one in findings)
    said = ", ".join(f"{number} {what}" for what, number in sorted(counts.items()))
    hints = dict.fromkeys(HINTS[what] for what in sorted(counts))
    raise KilnError(f"{args.results}: {count} files read; not as recorded: {said}", "; ".join(hints))


if __name__ == "__main__":
    step.run(main)
