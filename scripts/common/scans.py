"""What folders held when they were last scanned, for jobs, and for runs that are not to walk a slow disk again."""

import collections
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import pyarrow.compute as pc

from scripts.common.artefacts import read_json, sha256_text, write_json
from scripts.common.errors import KilnError
from scripts.common.shards import Scan, scan


class Facts(NamedTuple):
    """What files come to: hex sha256 of names, sizes and mtimes, bytes, and how many lie below each top folder.

    A file that lies in no folder counts under the empty name.
    """

    digest: str
    bytes: int
    tops: dict[str, int]


def facts(found: Scan) -> Facts:
    """The facts of the files that a scan found."""
    tops = collections.Counter(
        parts[0] if len(parts) > 1 else ""
        for parts in pc.split_pattern(found.files["path"], "/", max_splits=1).to_pylist()
    )
    return Facts(found.digest(), pc.sum(found.files["size"]).as_py() or 0, dict(sorted(tops.items())))


class Seen:
    """What was seen of folders, in one small file each.

    Args:
        place: where these files lie.
        again: scan anew whatever was seen.
        write: remember what a scan finds.
    """

    def __init__(self, place: Path, again: bool, write: bool):
        self.place, self.again, self.write = place, again, write

    def facts(self, folder: Path, extensions: Iterable[str], may_be_empty: bool, say: Callable[[str], None]) -> Facts:
        """Facts of the files in `folder` that have one of the endings.

        Raises:
            KilnError: the folder cannot be scanned; see `shards.scan`.
        """
        extensions = tuple(extensions)
        file = self.place / f"{sha256_text(str(folder), *extensions)[:16]}.json"
        before = self._read(file)
        if before and not self.again:
            return before
        if not self.again:
            say(f"{folder}: no earlier scan of it is known ({file}), so it is scanned")
        seen = facts(scan(folder, extensions, may_be_empty))
        if self.write and seen != before:
            write_json(file, {"folder": str(folder), **seen._asdict()})
        return seen

    @staticmethod
    def _read(file: Path) -> Facts | None:
        """What a file says; None if it is missing or damaged."""
        try:
            seen = read_json(file)
        except KilnError:
            return None
        fits = isinstance(seen, dict) and seen.keys() == {"folder", *Facts._fields} and len(str(seen["digest"])) == 64
        return Facts(*(seen[name] for name in Facts._fields)) if fits else None
