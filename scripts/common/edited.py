"""Results whose content is no longer what their record says: edited by hand, or damaged.

Only what may have changed is read: a file that is as long as recorded, and no younger than its record, is taken for
what it was.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from scripts.common.artefacts import record_of, sha256_file
from scripts.common.errors import KilnError

SHOWN = 5


class Edited(NamedTuple):
    """A file that differs from its record, and the output that is deleted to have it made anew."""

    path: Path
    output: Path
    expected: dict[str, Any]

    def __str__(self) -> str:
        found = f"{self.path.stat().st_size} bytes, sha256 {sha256_file(self.path)}"
        return (
            f"{self.path}: changed since it was made\n    found    {found}\n"
            f"    expected {self.expected['bytes']} bytes, sha256 {self.expected['sha256']}, by its record"
        )


def find(outputs: Iterable[Path]) -> list[Edited]:
    """Those of `outputs` that differ from their records; of a `files.json` also the files that it lists.

    What is missing, or has no record, is not among them.
    """
    return [one for output in outputs if output.is_file() for one in _of(output)]


def refuse(outputs: Iterable[Path]) -> None:
    """Stop if one of `outputs` was changed since it was made.

    Raises:
        KilnError: some were; each is named, with what was expected.
    """
    found = find(outputs)
    if found:
        more = f"\nand {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        raise KilnError(
            "\n".join(map(str, found[:SHOWN])) + more,
            "delete what was changed (keep a copy elsewhere if you need it), and the same command makes it anew: rm "
            + " ".join(sorted({f"'{one.output}'" for one in found})),
        )


def listed(listing: Path) -> dict[Path, dict[str, Any]]:
    """{file: its record} of what a `files.json` lists with bytes and sha256; nothing for any other file.

    Links among them lead to raw data, which is not ours to compare.
    """
    if listing.name != "files.json":
        return {}
    try:
        entries = json.loads(listing.read_text(encoding="utf-8")).items()
        return {listing.parent / name: entry for name, entry in entries if {"bytes", "sha256"} <= set(entry)}
    except (ValueError, AttributeError, TypeError):
        return {}  # damaged: its own record tells


def _of(output: Path) -> Iterable[Edited]:
    found = record_of(output)
    if found and _differs(output, *found):
        yield Edited(output, output, found[0])
        return
    since = output.stat().st_mtime_ns
    for path, record in listed(output).items():
        if path.is_file() and not path.is_symlink() and _differs(path, record, since):
            yield Edited(path, output, record)


def _differs(path: Path, record: dict[str, Any], recorded_ns: int) -> bool:
    facts = path.stat()
    if facts.st_size != record["bytes"]:
        return True
    return facts.st_mtime_ns > recorded_ns and sha256_file(path) != record["sha256"]
