"""All records of a results folder: what each `meta.json`, `files.json` and the RO-Crate say of which file.

A `meta.json` names its outputs without their folders, so they are looked for: beside it, else below its folder (of
`NAME.meta.json`, below the folder NAME), where no record that lies nearer claims them.
"""

import collections
import os
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import unquote

import yaml

from scripts.common import prune
from scripts.common.artefacts import read_json, sha256_file
from scripts.common.errors import KilnError

LISTING = "files.json"
META = "meta.json"
CRATE = "ro-crate-metadata.json"
NOT_RESULTS = ("logs", "benchmarks", "state", "code", "records")  # below the results, but no results
REPORT = "report.html"
WRITER = "writer.lock"  # only a results folder has one
NOT_RECORDED = (REPORT, "README.md", "config.yaml", WRITER)  # not made by steps, so without a record

Facts = Mapping[str, Any]  # {bytes, sha256} of a file


class Artefact(NamedTuple):
    """One run of a step.

    Attributes:
        meta: its record, relative to the results folder like all paths here.
        record: what that says.
        outputs: {file: its facts}; files that are missing stand where they would be looked for first.
        listings: every `files.json` that belongs to it, whether its record names it or another of that name.
    """

    meta: str
    record: dict[str, Any]
    outputs: dict[str, Facts]
    listings: list[str]

    @property
    def step(self) -> str:
        """Dotted name of the step, without `scripts.`."""
        return self.record["step"].removeprefix("scripts.")

    @property
    def inputs(self) -> dict[str, str]:
        """{path as it was given: sha256}, as accepted where a result was accepted."""
        made = {one["path"]: one["sha256"] for one in self.record["inputs"].values()}
        accepted = (self.record.get("accepted") or [{}])[-1].get("inputs", {})
        return made | {path: found for path, found in accepted.items() if path in made}


class Records(NamedTuple):
    """A results folder as its records have it.

    Attributes:
        folder: the results folder.
        name: the folder as the last run named it.
        names: with which recorded paths below it start: that one, and one that it had before.
        artefacts: in order of `meta`.
        listings: {files.json: {file below its folder, relative to the results: its entry}}.
        files: every file and link but for logs, benchmarks, states, what no step makes, and results folders inside.
        recorded: {file: its facts} by metas and listings; a link's are those of what it leads to.
    """

    folder: Path
    name: str
    names: list[str]
    artefacts: list[Artefact]
    listings: dict[str, dict[str, Facts]]
    files: set[str]
    recorded: dict[str, Facts]

    def below(self, path: str) -> str | None:
        """A recorded path relative to the results folder; None if it lies elsewhere."""
        return next((path.removeprefix(f"{one}/") for one in self.names if path.startswith(f"{one}/")), None)


def read(folder: Path) -> Records:
    """Read all records below a results folder.

    Raises:
        KilnError: there is no such folder, it holds no record, or a record is damaged; the file is named.
    """
    if not folder.is_dir():
        raise KilnError(f"{folder}: no such folder", "give a results folder, such as results/demo")
    files = set(_files(folder))
    metas = sorted(one for one in files if one.endswith(f".{META}") or PurePosixPath(one).name == META)
    if not metas:
        raise KilnError(f"{folder}: no record (meta.json) below it", "give a results folder, such as results/demo")
    records = {meta: _record(folder / meta) for meta in metas}
    places = _places(files, {name for record in records.values() for name in record["outputs"]} | {LISTING})
    claims = {os.path.dirname(meta) for meta in metas if PurePosixPath(meta).name == META}
    listings = {file: _entries(folder, file) for file in sorted(places[LISTING])}
    artefacts = [_artefact(folder, meta, records[meta], places, claims) for meta in metas]
    every = (entry for entries in listings.values() for entry in entries.items())
    recorded = {file: facts for file, facts in every if {"bytes", "sha256"} <= facts.keys()}
    for artefact in artefacts:
        recorded |= artefact.outputs
    name = str(read_settings(folder).get("results", folder))
    names = [name, str(folder), *_former_name(artefacts, recorded)]
    return Records(folder, name, names, artefacts, listings, files, recorded)


def _files(folder: Path) -> Iterator[str]:
    for place, inner, names in os.walk(folder):
        within = os.path.relpath(place, folder)
        top = within == "."
        inner[:] = [
            name
            for name in inner
            if not (top and name in NOT_RESULTS)
            and not prune.LEFTOVER.fullmatch(name)
            # another run's results, such as results/demo in results
            and not os.path.exists(os.path.join(place, name, WRITER))
        ]
        links = [name for name in inner if os.path.islink(os.path.join(place, name))]
        for name in [*names, *links]:
            if not (top and name in NOT_RECORDED) and not prune.LEFTOVER.fullmatch(name):
                yield name if top else f"{within}/{name}"


def _record(path: Path) -> dict[str, Any]:
    record = read_json(path)
    wanted = {"step": str, "settings": dict, "inputs": dict, "outputs": dict, "code": str}
    for key, kind in wanted.items():
        if not isinstance(record, dict) or not isinstance(record.get(key), kind):
            raise KilnError(f"{path}: no record of a step: {key!r} is missing or no {kind.__name__}", _REMAKE)
    facts = [*record["outputs"].values(), *record["inputs"].values()]
    if not all(isinstance(one, dict) and isinstance(one.get("sha256"), str) for one in facts):
        raise KilnError(f"{path}: a file in it has no sha256", _REMAKE)
    return record


_REMAKE = "delete it and run again, which makes the result anew; or take the file from a copy"


def _entries(folder: Path, listing: str) -> dict[str, Facts]:
    found = read_json(folder / listing)
    if not isinstance(found, dict) or not all(isinstance(entry, dict) for entry in found.values()):
        raise KilnError(f"{folder / listing}: expected {{file: {{bytes, sha256}}}}", _REMAKE)
    above = os.path.dirname(listing)
    return {os.path.join(above, name): entry for name, entry in found.items()}


def _places(files: set[str], names: set[str]) -> dict[str, list[str]]:
    """{name: all files of that name}, of some names."""
    found: dict[str, list[str]] = {name: [] for name in names}
    for file in sorted(files):
        if (name := os.path.basename(file)) in found:
            found[name].append(file)
    return found


def _artefact(
    folder: Path, meta: str, record: dict[str, Any], places: Mapping[str, list[str]], claims: set[str]
) -> Artefact:
    place, file = os.path.split(meta)
    own = place if file == META else os.path.join(place, file.removesuffix(f".{META}"))

    def is_its(path: str) -> bool:
        """Whether `path`, below the folder of this record, belongs to no record that is nearer."""
        above = os.path.dirname(path)
        while above != own:
            if above in claims:
                return False
            above = os.path.dirname(above)
        return own not in claims or file == META

    outputs, listings = {}, [path for path in places[LISTING] if path.startswith(f"{own}/") and is_its(path)]
    for name, facts in record["outputs"].items():
        beside = os.path.join(place, name)
        found = (
            [beside]
            if (folder / beside).exists()
            else [path for path in places[name] if path.startswith(f"{own}/") and is_its(path)]
        )
        same = [path for path in found if len(found) > 1 and sha256_file(folder / path) == facts["sha256"]]
        outputs[(same or found or [beside])[0]] = facts
    return Artefact(meta, record, outputs, listings)


class Hashes(NamedTuple):
    """What a crate says: {file below its folder: {bytes, sha256}}, and when the last was made (ISO 8601, UTC)."""

    files: dict[str, Facts]
    when: str


def crate_hashes(folder: Path) -> Hashes | None:
    """The hashes in the crate of a results folder; None if it has none.

    Raises:
        KilnError: the crate is damaged.
    """
    path = folder / CRATE
    if not path.is_file():
        return None
    try:
        entities = read_json(path)["@graph"]
        (when,) = [one["datePublished"] for one in entities if one["@id"] == "./"]
        files = {
            unquote(one["@id"]): {"bytes": int(one["contentSize"]), "sha256": one["sha256"]}
            for one in entities
            if "contentSize" in one
        }
    except (KeyError, TypeError, ValueError) as error:
        raise KilnError(f"{path}: no crate as `snakemake` writes it: {error!r}", "delete it and run again") from None
    return Hashes(files, when)


def _former_name(artefacts: list[Artefact], recorded: Mapping[str, Facts]) -> list[str]:
    """What most inputs start with that are results, by the rest of their path and by content: the folder's old name."""
    found: collections.Counter[str] = collections.Counter()
    for artefact in artefacts:
        for path, digest in artefact.inputs.items():
            parts = path.split("/")
            ends = (("/".join(parts[:at]), "/".join(parts[at:])) for at in range(1, len(parts)))
            found.update([start for start, end in ends if end in recorded and recorded[end]["sha256"] == digest][:1])
    return [name for name, _ in found.most_common(1)]


def noted_modules(folder: Path) -> dict[str, dict[str, str]]:
    """{code key: {module: its key}} of what runs left in {results}/code."""
    found: dict[str, dict[str, str]] = {}
    for path in sorted((folder / "code").glob("*.json")):
        left = read_json(path)
        for key, modules in left.get("keys", {}).items():
            found[key] = {name: left["modules"][name] for name in modules}
    return found


def read_settings(folder: Path) -> dict[str, Any]:
    """The resolved settings of the last run in a results folder; empty if it has left none.

    Raises:
        KilnError: the file is no YAML mapping.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        return {}
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise KilnError(f"{path}: not YAML: {error}", "delete it: the next run writes it anew") from None
    if not isinstance(found, dict):
        raise KilnError(f"{path}: expected settings, found {type(found).__name__}", "the next run writes it anew")
    return found
