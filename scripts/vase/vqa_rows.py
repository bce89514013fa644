"""Rows of questions about vases, read and checked; step build_dataset writes them (train, validation, test .jsonl)."""

import dataclasses
import json
from pathlib import Path, PurePosixPath
from typing import Any

from scripts.common.errors import KilnError
from scripts.vase.settings import CAPTION, DIMENSIONS

IMAGE = "<image>"
KINDS = (*DIMENSIONS, CAPTION)
ROLES = {"system", "user", "assistant"}


@dataclasses.dataclass(frozen=True)
class VqaRow:
    """One question, and what is right.

    Attributes:
        id: no two rows share it.
        vase: the vase that the pictures show.
        dimension: one of `DIMENSIONS`, or `CAPTION`.
        turns: (role, text) up to the user's turn that is to be answered; `IMAGE` in a text stands for a picture.
        images: paths relative to the images folder, as many as there are `IMAGE`s.
        reference: the right answer.
        facts: what is known of the vase, JSON {dimension: value}, or "".
    """

    id: str
    vase: str
    dimension: str
    turns: tuple[tuple[str, str], ...]
    images: tuple[str, ...]
    reference: str
    facts: str

    def columns(self) -> dict[str, str]:
        """What a reward may look at beside the completion."""
        return {"reference": self.reference, "dimension": self.dimension, "facts": self.facts}


def read_rows(path: Path) -> list[VqaRow]:
    """The rows of a .jsonl file, in its order; an assistant's last turn is what is to be answered, and left out.

    Raises:
        KilnError: a missing file, no rows, a line that is no such row, a second row of one id; names file and line.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        raise KilnError(f"{path}: no such file", "run rule vase_build_dataset") from None
    except (OSError, UnicodeDecodeError) as error:
        raise KilnError(f"{path}: cannot be read ({error})", "make it anew by rule vase_build_dataset") from None
    rows: list[VqaRow] = []
    seen: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = _row(json.loads(line))
            if row.id in seen:
                raise ValueError(f"id {row.id!r} stands in line {seen[row.id]} already")
        except (ValueError, KeyError, TypeError) as error:
            said = f"no key {error}" if isinstance(error, KeyError) else str(error)
            raise KilnError(f"{path}, line {number}: {said}", "make the file by rule vase_build_dataset") from None
        seen[row.id] = number
        rows.append(row)
    if not rows:
        raise KilnError(f"{path}: no rows", "look at the split: a side is empty, or no question is about its vases")
    return rows


def _row(found: Any) -> VqaRow:
    if not isinstance(found, dict):
        raise ValueError("expected an object with id, vase, dimension, messages, images, reference, facts")
    texts = {name: found[name] for name in ("id", "vase", "dimension", "reference", "facts")}
    for name, value in texts.items():
        if not isinstance(value, str) or not (value.strip() or name == "facts"):
            raise ValueError(f"{name} is {value!r}, expected a text")
    if texts["dimension"] not in KINDS:
        raise ValueError(f"dimension {texts['dimension']!r} is unknown; these are {', '.join(KINDS)}")
    _check_facts(texts["facts"])
    images = found["images"]
    if not isinstance(images, list) or not images or not all(isinstance(one, str) and one for one in images):
        raise ValueError(f"images is {images!r}, expected at least one path")
    outside = [one for one in images if PurePosixPath(one).is_absolute() or ".." in PurePosixPath(one).parts]
    if outside:
        raise ValueError(f"image {outside[0]} is not inside the images folder; expected a path relative to it")
    turns = _turns(found["messages"])
    marks = sum(text.count(IMAGE) for role, text in turns if role == "user")
    if marks != len(images):
        raise ValueError(f"{len(images)} images, but {marks} {IMAGE} in the user's turns; expected as many")
    return VqaRow(**texts, turns=turns, images=tuple(images))


def _turns(messages: Any) -> tuple[tuple[str, str], ...]:
    if not isinstance(messages, list) or not all(
        isinstance(one, dict) and one.get("role") in ROLES and isinstance(one.get("content"), str) for one in messages
    ):
        raise ValueError(f"messages must be a list of role ({', '.join(sorted(ROLES))}) and content (text)")
    turns = [(one["role"], one["content"]) for one in messages]
    if turns and turns[-1][0] == "assistant":
        turns.pop()
    spoken = [role for role, _ in turns[1 if turns and turns[0][0] == "system" else 0 :]]
    if spoken != ["user", "assistant"] * (len(spoken) // 2) + ["user"]:
        raise ValueError(f"roles {', '.join(role for role, _ in turns) or 'none'}: expected user and assistant in turn")
    return tuple(turns)


def _check_facts(facts: str) -> None:
    if not facts:
        return
    try:
        found = json.loads(facts)
    except ValueError as error:
        raise ValueError(f"facts is {facts[:60]!r}, which is not JSON ({error})") from None
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise ValueError(f"facts is {facts[:60]!r}, expected an object of texts, or nothing")
    unknown = [name for name in found if name not in DIMENSIONS]
    if unknown:
        raise ValueError(f"facts: {unknown[0]!r} is no dimension; these are {', '.join(DIMENSIONS)}")
