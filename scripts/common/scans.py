"""Digests of folders as they were last scanned, for jobs, and for runs that are not to walk a slow disk again."""

from collections.abc import Callable, Iterable
from pathlib import Path

from scripts.common.artefacts import read_json, sha256_text, write_json
from scripts.common.errors import KilnError
from scripts.common.shards import scan


class Seen:
    """What was seen of folders, in one small file each.

    Args:
        place: where these files lie.
        again: scan anew whatever was seen.
        write: remember what a scan finds.
    """

    def __init__(self, place: Path, again: bool, write: bool):
        self.place, self.again, self.write = place, again, write

    def digest(self, folder: Path, extensions: Iterable[str], may_be_empty: bool, say: Callable[[str], None]) -> str:
        """Digest of names, sizes and mtimes of the files in `folder` that have one of the endings.

        Raises:
            KilnError: the folder cannot be scanned; see `shards.scan`.
        """
        extensions = tuple(extensions)
        file = self.place / f"{sha256_text(str(folder), *extensions)[:16]}.json"
        before = self._read(file)
        if before and not self.again:
            return before["digest"]
        if not self.again:
            say(f"{folder}: no earlier scan of it is known ({file}), so it is scanned")
        seen = {"folder": str(folder), "digest": scan(folder, extensions, may_be_empty).digest()}
        if self.write and seen != before:
            write_json(file, seen)
        return seen["digest"]

    @staticmethod
    def _read(file: Path) -> dict | None:
        """What a file says; None if it is missing or damaged."""
        try:
            seen = read_json(file)
        except KilnError:
            return None
        fits = isinstance(seen, dict) and seen.keys() == {"folder", "digest"} and len(str(seen["digest"])) == 64
        return seen if fits else None
