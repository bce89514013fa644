"""A results folder as an RO-Crate 1.1 (https://w3id.org/ro/crate/1.1), by the profiles of process and workflow runs.

The crate names artefacts, never the items in them: a folder is one entity with its `files.json`, a table one file. What
is not recorded (who ran it, under which licence the results may be used) is not said.
"""

import datetime
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from rocrate.model.computationalworkflow import ComputationalWorkflow
from rocrate.model.computerlanguage import ComputerLanguage
from rocrate.model.contextentity import ContextEntity
from rocrate.model.entity import Entity
from rocrate.rocrate import ROCrate

from scripts.common import run_records
from scripts.common.artefacts import describe_files, sha256_text
from scripts.common.run_records import Artefact, Facts, Records
from scripts.common.settings import to_json

VERSION = "1.1"  # of RO-Crate, on which the profiles build
PROFILES = {
    "https://w3id.org/ro/wfrun/process/0.5": ("Process Run Crate", "0.5"),
    "https://w3id.org/ro/wfrun/workflow/0.5": ("Workflow Run Crate", "0.5"),
    "https://w3id.org/workflowhub/workflow-ro-crate/1.0": ("Workflow RO-Crate", "1.0"),
}
TERMS = "https://w3id.org/ro/terms/workflow-run/context"  # has `sha256`, which the crate's own context lacks
SNAKEMAKE = "https://snakemake.github.io"
LICENCE = "https://spdx.org/licenses/MIT"  # of the workflow: its file LICENSE
FORMATS = {  # media types of the endings that we write
    ".arrow": "application/vnd.apache.arrow.file",
    ".csv": "text/csv",
    ".html": "text/html",
    ".json": "application/json",
    ".jsonl": "application/jsonl",
    ".md": "text/markdown",
    ".parquet": "application/vnd.apache.parquet",
    ".png": "image/png",
    ".tsv": "text/tab-separated-values",
    ".yaml": "application/yaml",
}


def build(
    records: Records, artefacts: Sequence[Artefact], workflow: str, main: str, others: Mapping[str, Mapping]
) -> dict[str, Any]:
    """The JSON of `ro-crate-metadata.json`; equal records give equal bytes.

    Args:
        records: of the results folder.
        artefacts: those that are described, at least one.
        workflow: the folder below the results that holds a copy of the workflow.
        main: the file in it that the others are included by.
        others: {file below the results that no record names: properties of its entity}.
    """
    return _Crate(records, artefacts, workflow, main, others).crate.metadata.generate()


class _Crate:
    def __init__(
        self, records: Records, artefacts: Sequence[Artefact], workflow: str, main: str, others: Mapping[str, Mapping]
    ):
        self.records, self.artefacts = records, artefacts
        self.crate = ROCrate(version=VERSION)
        self.crate.metadata.extra_contexts.append(TERMS)
        first, last = self._times()
        root = self.crate.root_dataset
        root["name"] = f"Results of Kiln in {records.name}"
        root["description"] = (
            "What was made from raw data (tables, models, predictions, scores), and of each artefact how. "
            "The items of a folder are listed in its files.json."
        )
        root["datePublished"] = last
        root["license"] = self._said(
            "#licence",
            "CreativeWork",
            name="Not stated",
            description="The results depend on the licences of the raw data and models that they were made from.",
        )
        profiles = [
            self._said(url, "CreativeWork", name=name, version=version) for url, (name, version) in PROFILES.items()
        ]
        root["conformsTo"] = profiles
        self.crate.metadata.append_to("conformsTo", profiles[-1])
        for file in sorted(set(others) - {main}):
            self._file(file, **others[file])
        program = self._workflow(workflow, main, [file for file in others if file.startswith(f"{workflow}/")])
        actions = [action for artefact in artefacts for action in self._runs(artefact)]
        results = {file: self._of(file) for one in artefacts for file in one.outputs}
        whole = self._said(
            "#run",
            "CreateAction",
            name="The workflow's run",
            description="From the first step that made one of these results to the end of the last, in one go or more.",
            instrument=program,
            object=[self._of(file) for file in others if file.endswith("/config.yaml")],
            result=[entity for entity in results.values() if entity],
            subjectOf=self._of(run_records.REPORT),
            startTime=first,
            endTime=last,
        )
        self.crate.mainEntity = program
        root["mentions"] = [whole, *actions]

    def _times(self) -> tuple[str | None, str]:
        starts = [start for start in map(begun, self.artefacts) if start]
        return min(starts, default=None), max(ended(self.records.folder, one) for one in self.artefacts)

    def _workflow(self, folder: str, main: str, files: Iterable[str]) -> Entity:
        commits = sorted({one.record["git_commit"] for one in self.artefacts if one.record.get("git_commit")})
        self._said(LICENCE, "CreativeWork", name="MIT License")
        language = ComputerLanguage(self.crate, "#snakemake", {"name": "Snakemake", "url": SNAKEMAKE})
        properties = {
            "name": "Kiln",
            "license": {"@id": LICENCE},
            "programmingLanguage": self.crate.add(language),
            "hasPart": [self._of(file) for file in sorted(files) if file.endswith(".smk") or "/envs/" in file],
            **({"version": ", ".join(commits)} if commits else {}),
            **_sizes(describe_files([self.records.folder / main])[os.path.basename(main)]),
        }
        source = self.records.folder / main
        return self.crate.add(ComputationalWorkflow(self.crate, source, main, properties=properties))

    def _runs(self, artefact: Artefact) -> Iterable[Entity]:
        """The entities of an artefact; what is yielded is the action that made it."""
        record, made = artefact.record, []
        for file, facts in artefact.outputs.items():
            if os.path.exists(self.records.folder / file):
                made.append(self._file(file, **_sizes(facts)))
        for listing in artefact.listings:
            entity = self._of(listing) or self._file(listing)
            folder = os.path.dirname(listing)
            made.append(
                self.crate.add_dataset(
                    self.records.folder / folder,
                    f"{folder}/",
                    properties={
                        "name": folder,
                        "hasPart": [entity],
                        "description": "Its files.json lists what it holds",
                    },
                )
            )
        read = [self._input(path, digest) for path, digest in artefact.inputs.items()]
        described = self._file(artefact.meta, description="The record of this artefact: settings, inputs, code, time")
        yield self._said(
            f"#{artefact.meta}",
            "CreateAction",
            name=f"{artefact.step}: {artefact.meta.removesuffix(run_records.META).rstrip('/.')}",
            description=f"A run of the step {record['step']}, as {artefact.meta} records it",
            instrument=self._step(artefact),
            object=list({entity.id: entity for entity in read}.values()),
            result=made,
            subjectOf=described,
            startTime=begun(artefact),
            endTime=ended(self.records.folder, artefact),
        )

    def _step(self, artefact: Artefact) -> Entity:
        """The program: one for each state of its code and its packages."""
        record = artefact.record
        packages = record.get("packages") or {}
        what = sha256_text(record["step"], record["code"], str(record.get("git_commit")), to_json(packages))[:12]
        return self._said(
            f"#{record['step']}-{what}",
            "SoftwareApplication",
            name=record["step"],
            softwareVersion=record.get("git_commit"),
            identifier=f"code key {record['code']}",
            softwareRequirements=[
                self._said(f"#{name}-{version}", "SoftwareApplication", name=name, softwareVersion=version)
                for name, version in sorted(packages.items())
            ],
        )

    def _input(self, path: str, digest: str) -> Entity:
        """An input: another artefact's file, or one that is described by its hash alone."""
        file = self.records.below(path)
        own = file and self.records.recorded.get(file)
        if file and own and own["sha256"] == digest and os.path.lexists(self.records.folder / file):
            return self._of(file) or self._file(file, **_sizes(own))
        return self._said(f"#input-{digest}-{path}", "CreativeWork", name=path, sha256=digest)

    def _file(self, file: str, **properties: Any) -> Entity:
        """The entity of a file below the results; hashed if its facts are not given."""
        if "sha256" not in properties:
            properties |= _sizes(describe_files([self.records.folder / file])[os.path.basename(file)])
        if kind := FORMATS.get(os.path.splitext(file)[1]):
            properties["encodingFormat"] = kind
        return self.crate.add_file(self.records.folder / file, file, properties={"name": file, **properties})

    def _of(self, file: str) -> Entity | None:
        return self.crate.get(quote(file))

    def _said(self, identifier: str, kind: str, /, **properties: Any) -> Entity:
        """A contextual entity; what is not known is left out."""
        known = {key: _plain(value) for key, value in properties.items() if value not in (None, [])}
        return self.crate.add(ContextEntity(self.crate, quote(identifier, safe="#:/"), {"@type": kind, **known}))


def _plain(value: Any) -> Any:
    """A list of one as that one, as JSON-LD has it."""
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def _sizes(facts: Facts) -> dict[str, str]:
    return {"contentSize": str(facts["bytes"]), "sha256": facts["sha256"]}


def begun(artefact: Artefact) -> str | None:
    """When a step started, in UTC, if its record says so."""
    started = artefact.record.get("started")
    return started and _time(datetime.datetime.fromisoformat(started).timestamp())


def ended(folder: Path, artefact: Artefact) -> str:
    """When a step ended, in UTC: `started` and `wall_seconds` later.

    The seconds of a training that carried on count its earlier attempts, too; its record was written before that then.
    """
    written = (folder / artefact.meta).stat().st_mtime
    started, seconds = artefact.record.get("started"), artefact.record.get("wall_seconds")
    if started is None or seconds is None:
        return _time(written)
    start = datetime.datetime.fromisoformat(started).timestamp()
    return _time(min(start + seconds, max(written, start)))


def _time(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat(timespec="milliseconds")
