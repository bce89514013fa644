"""From a result back to what it was made from, by the records that lie beside results."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from scripts.common import artefacts

LEVELS = 6  # folders between a file and the record that names it, at most


class Made(NamedTuple):
    """A file and the record (meta.json) of the step that made it."""

    path: Path
    record: Mapping[str, Any]

    @property
    def step(self) -> str:
        """The module that made it."""
        return self.record["step"]

    def hash_of(self, name: str) -> str | None:
        """sha256 of the step's input `name`, as it was read; None: it had no such input."""
        return self.record["inputs"].get(name, {}).get("sha256")

    def input(self, name: str) -> "Made | None":
        """What made the step's input `name`, or None: no such input, or no record of the bytes that were read."""
        one = self.record["inputs"].get(name)
        return one and maker(Path(one["path"]), one["sha256"])

    def inputs(self, ending: str) -> list["Made | None"]:
        """What made each input whose name ends so."""
        return [self.input(name) for name in self.record["inputs"] if name.endswith(ending)]

    def read(self, name: str) -> Any:
        """The JSON of the step's input `name`, or None where its bytes are no longer those that were read."""
        one = self.record["inputs"].get(name)
        path = one and Path(one["path"])
        return artefacts.read_json(path) if path and path.is_file() and _is(path, one["sha256"]) else None


def maker(path: Path, sha256: str | None = None) -> Made | None:
    """The step that made `path`, or None where no record beside or above it names the file with this hash.

    A file of a folder artefact is vouched for by the folder's files.json, which a record names.

    Args:
        sha256: of the bytes in question; None: of the file as it is now.

    Raises:
        KilnError: a record is not JSON.
    """
    sha256 = sha256 or artefacts.sha256_file(path)
    above = list(path.parents)[:LEVELS]
    for meta in (path.with_name(f"{path.stem}.meta.json"), *(folder / "meta.json" for folder in above)):
        if not meta.is_file():
            continue
        record = artefacts.read_json(meta)
        outputs = record.get("outputs", {})
        names = (path.relative_to(meta.parent).as_posix(), path.name)
        if any(outputs.get(name, {}).get("sha256") == sha256 for name in names):
            return Made(path, record)
    listing = path.with_name("files.json")
    if path == listing or not listing.is_file():
        return None
    listed = artefacts.read_json(listing).get(path.name, {})
    return maker(listing) if listed.get("sha256") == sha256 else None


def _is(path: Path, sha256: str) -> bool:
    return artefacts.sha256_file(path) == sha256
