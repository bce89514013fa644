"""What must be right before a model is trained on rows: every problem is found, and all are told at once."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import joblib

from scripts.common import images, progress
from scripts.common.errors import KilnError
from scripts.vase.published_rows import PublishedRow
from scripts.vase.vqa_rows import IMAGE, KINDS

SHOWN = 5
Problems = Iterator[tuple[PublishedRow, str]]


def lint(
    rows: Sequence[PublishedRow],
    kept: Sequence[PublishedRow],
    folder: Path,
    listed: Mapping[str, Mapping],
    sides: Mapping[str, str],
    max_pixels: int,
    processes: int,
) -> None:
    """Check all `rows`, and the image files of those that are `kept`.

    Args:
        rows: images are paths of `listed`, or names that are not there.
        kept: those of `rows` that are used.
        folder: of the images.
        listed: {path: {vase, sha256}} of the manifest.
        sides: side of each vase.
        max_pixels: larger images are refused.
        processes: threads that decode images.

    Raises:
        KilnError: the first problems with file and row, and how many there are: an unknown dimension; an empty question
            or answer; another number of `IMAGE` tags than of images, or tags in an answer; a second row of equal
            images, question and answer; vases of two sides in a row; an image file that is missing, unreadable, or not
            the one that was listed.
    """
    problems = [*_in_texts(rows), *_doubled(rows), *_torn(rows, listed, sides)]
    problems += _in_images(kept, folder, listed, max_pixels, processes)
    if not problems:
        return
    problems.sort(key=lambda one: (str(one[0].file), one[0].number))
    lines = [f"{row.where}: {text}" for row, text in problems[:SHOWN]]
    lines += [f"... and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
    raise KilnError(
        f"{len(problems)} problem{'s' if len(problems) > 1 else ''} in rows of captions or questions\n"
        + "\n".join(lines),
        "mend the rows or take them out; for an image file, put it back and run again",
    )


def _in_texts(rows: Sequence[PublishedRow]) -> Problems:
    for row in rows:
        if row.dimension not in KINDS:
            said = f"dimension {row.dimension!r} is unknown" if row.dimension else "no dimension"
            yield row, f"{said}; these are {', '.join(KINDS)}"
        for role, text in row.turns:
            if not text.replace(IMAGE, "").strip():
                yield row, f"empty {({'user': 'question', 'assistant': 'answer'}).get(role, role)}"
            if role != "user" and IMAGE in text:
                yield row, f"{IMAGE} in a turn of the {role}; only questions show images"
        tags = sum(text.count(IMAGE) for role, text in row.turns if role == "user")
        if row.images and tags != len(row.images):
            yield row, f"{tags} {IMAGE} tags, but {len(row.images)} images; expected as many, or no tag"


def _doubled(rows: Sequence[PublishedRow]) -> Problems:
    seen: dict[tuple, PublishedRow] = {}
    for row in rows:
        first = seen.setdefault((row.images or row.vase, row.turns), row)
        if first is not row:
            place = f"row {first.number}" if first.file == row.file else first.where
            yield row, f"the same images, question and answer as {place}"


def _torn(rows: Sequence[PublishedRow], listed: Mapping[str, Mapping], sides: Mapping[str, str]) -> Problems:
    for row in rows:
        vases = {listed[path]["vase"] for path in row.images if path in listed}
        known = {vase: sides[vase] for vase in sorted(vases) if vase in sides}
        if len(set(known.values())) > 1:
            yield row, f"vases of two sides: {', '.join(f'{vase} ({side})' for vase, side in known.items())}"


def _in_images(
    rows: Sequence[PublishedRow], folder: Path, listed: Mapping[str, Mapping], max_pixels: int, processes: int
) -> Problems:
    """One problem for each file, at the first row that shows it."""
    first: dict[str, PublishedRow] = {}
    for row in rows:
        for path in row.images:
            first.setdefault(path, row)

    def problem(path: str) -> str | None:
        try:
            found = images.inspect(folder / path, max_pixels)
        except FileNotFoundError:
            return "no such file"
        except OSError as error:
            return f"cannot be read ({error.strerror})"
        if found["status"] != "ok":
            return found["reason"]
        return None if found["sha256"] == listed[path]["sha256"] else "not the file that was listed"

    work = (joblib.delayed(problem)(path) for path in progress.bar(list(first), "check images"))
    # threads, not processes: Pillow and hashlib release the GIL while they work
    found = joblib.Parallel(n_jobs=processes, prefer="threads")(work)
    for path, text in zip(first, found, strict=True):
        if text:
            yield first[path], f"image {folder / path}: {text}"
