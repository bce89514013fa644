"""Captions and questions that others published, as plain rows.

Captions: a JSON list of {images, caption, data_by, conversations}. Questions: a JSON list, or JSON Lines, of {question,
answer, dimension, and image, images or vase}. Further keys are left alone.
"""

import dataclasses
import functools
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, TextIO

from scripts.common.errors import KilnError
from scripts.vase.settings import CAPTION
from scripts.vase.vqa_rows import IMAGE

CAPTION_KEYS = "each row is {images: [names], caption: text}, with conversations: [{value}, {value}, ...] if there are"
QUESTION_KEYS = "each row is {question, answer, dimension, and image, images or vase}, all texts"
ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}


@dataclasses.dataclass(frozen=True, slots=True)
class PublishedRow:
    """One conversation about pictures.

    Attributes:
        file: where it stands.
        number: its row there; in JSON the element, in JSON Lines the line, from 1.
        dimension: as written; "" if it is not.
        turns: (role, text): at most one of system first, then user and assistant in turn, an assistant's last. The
            user's turns hold an `IMAGE` for each picture, put before the first where none was written. Texts are
            stripped; they may be empty.
        images: names as written, or paths once they are matched; none where only the vase is named.
        vase: its name, where only that is given.
    """

    file: Path
    number: int
    dimension: str
    turns: tuple[tuple[str, str], ...]
    images: tuple[str, ...]
    vase: str | None = None

    @property
    def where(self) -> str:
        """File and row, for messages."""
        return f"{self.file}, row {self.number}"

    @property
    def answer(self) -> str:
        """What the last turn says."""
        return self.turns[-1][1]

    def showing(self, images: Sequence[str]) -> "PublishedRow":
        """This row with `images`, and an `IMAGE` for each where its texts have none."""
        turns = list(self.turns)
        if not any(IMAGE in text for _, text in turns):
            first = next(number for number, (role, _) in enumerate(turns) if role == "user")
            turns[first] = ("user", IMAGE * len(images) + turns[first][1])
        return dataclasses.replace(self, images=tuple(images), turns=tuple(turns))


def read_captions(path: Path, question: str) -> list[PublishedRow]:
    """The rows of a captions file, in its order; `question` asks where a row has no conversations.

    Raises:
        KilnError: names file and row of what cannot be read, lacks a key, or has another type or order of roles.
    """
    rows = []
    for number, found in _records(path):
        where = f"{path}, row {number}"
        images = _names(found, "images", where, CAPTION_KEYS)
        if found.get("conversations"):
            turns = _conversation(found["conversations"], where)
        else:
            turns = (("user", question), ("assistant", _text(found, "caption", where, CAPTION_KEYS)))
        rows.append(PublishedRow(path, number, CAPTION, turns, ()).showing(images))
    return rows


def read_questions(path: Path) -> list[PublishedRow]:
    """The rows of a questions file, in its order. A vase counts only where no image is named.

    Raises:
        KilnError: names file and row of what cannot be read, lacks a key, or has another type.
    """
    rows = []
    for number, found in _records(path):
        where = f"{path}, row {number}"
        question, answer = (_text(found, key, where, QUESTION_KEYS) for key in ("question", "answer"))
        dimension = _text(found, "dimension", where, QUESTION_KEYS) if found.get("dimension") is not None else ""
        row = PublishedRow(path, number, dimension, (("user", question), ("assistant", answer)), ())
        key = next((key for key in ("images", "image") if found.get(key) is not None), None)
        if key is not None:
            rows.append(row.showing(_names(found, key, where, QUESTION_KEYS)))
        elif type(found.get("vase")) is int:
            rows.append(dataclasses.replace(row, vase=str(found["vase"])))
        elif found.get("vase") is not None:
            rows.append(dataclasses.replace(row, vase=_text(found, "vase", where, QUESTION_KEYS)))
        else:
            raise KilnError(f"{where}: no image, images or vase; it has {_keys(found)}", QUESTION_KEYS)
    return rows


def match_images(rows: Iterable[PublishedRow], paths: Iterable[str]) -> list[PublishedRow]:
    """`rows` with the one of `paths` that each image means in place of its name; unknown names stay as they are.

    A path is meant that is written the same, else the only one of the same file name.

    Raises:
        KilnError: a file name that several paths have.
    """
    known = set(paths)

    @functools.cache
    def by_name() -> dict[str, list[str]]:  # most files name images as they are listed, or none
        found = defaultdict(list)
        for path in sorted(known):
            found[PurePosixPath(path).name].append(path)
        return found

    def meant(name: str, where: str) -> str:
        written = PurePosixPath(name.replace("\\", "/"))
        if written.as_posix() in known:
            return written.as_posix()
        found = by_name().get(written.name, [])
        if len(found) > 1:
            raise KilnError(
                f"{where}: image {name} may be any of {len(found)} files: {', '.join(found[:4])}",
                "write its path relative to the images folder",
            )
        return found[0] if found else name

    def matched(row: PublishedRow) -> PublishedRow:
        images = tuple(meant(name, row.where) for name in row.images)
        return row if images == row.images else dataclasses.replace(row, images=images)

    return [matched(row) for row in rows]


def _records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(row number, the row) of a JSON list, or of JSON Lines where the file ends in .jsonl, which is read by line."""
    try:
        with path.open(encoding="utf-8-sig", newline="\n") as file:
            for number, row in _lines(path, file) if path.suffix.lower() == ".jsonl" else _elements(path, file):
                if not isinstance(row, dict):
                    raise KilnError(f"{path}, row {number}: {row!r:.60}, expected an object", "write {...}")
                yield number, row
    except OSError as error:
        raise KilnError(f"{path}: cannot be read ({error.strerror})", "check the path") from None
    except UnicodeDecodeError as error:
        raise KilnError(f"{path}: not UTF-8: {error}", "save it as UTF-8") from None


def _lines(path: Path, file: TextIO) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(file, start=1):
        if line.strip():
            yield number, _json(line.removesuffix("\n"), f"{path}, row {number}", "each line is one {...}")


def _elements(path: Path, file: TextIO) -> Iterator[tuple[int, Any]]:
    found = _json(file.read(), str(path), "mend it; one object per line belongs into a .jsonl")
    if not isinstance(found, list):
        raise KilnError(f"{path}: a JSON {type(found).__name__}, expected a list of rows", "write [{...}, {...}]")
    return enumerate(found, start=1)


def _json(text: str, where: str, hint: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise KilnError(f"{where}: not JSON: {error}", hint) from None


def _conversation(found: Any, where: str) -> tuple[tuple[str, str], ...]:
    """Turns of [{value, from if it is there}, ...]; without `from` a user begins."""
    if not isinstance(found, list) or not all(isinstance(turn, dict) for turn in found):
        raise KilnError(f"{where}: conversations is {found!r:.60}, expected a list of {{value}}", CAPTION_KEYS)
    turns = []
    for number, turn in enumerate(found):
        said = turn.get("from", ("human", "gpt")[number % 2])
        if not isinstance(said, str) or said not in ROLES:
            raise KilnError(
                f"{where}: turn {number + 1} is from {said!r}, expected one of {', '.join(ROLES)}", "mend it"
            )
        turns.append((ROLES[said], _text(turn, "value", f"{where}, turn {number + 1}", CAPTION_KEYS)))
    spoken = [role for role, _ in turns if role != "system"]
    ordered = spoken == ["user", "assistant"] * (len(spoken) // 2) and bool(spoken)
    if not ordered or "system" in [role for role, _ in turns[1:]]:
        raise KilnError(
            f"{where}: turns of {', '.join(role for role, _ in turns)}; expected user and assistant in turn",
            "a conversation begins with a question and ends with an answer",
        )
    return tuple(turns)


def _names(row: dict[str, Any], key: str, where: str, hint: str) -> list[str]:
    """The image names under `key`: a text, or a list of at least one."""
    found = row.get(key)
    if found is None:
        raise KilnError(f"{where}: no {key}; it has {_keys(row)}", hint)
    names = [found] if isinstance(found, str) else found
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name.strip() for name in names):
        raise KilnError(f"{where}: {key} is {found!r:.60}, expected file names", hint)
    return names


def _text(row: dict[str, Any], key: str, where: str, hint: str) -> str:
    found = row.get(key)
    if found is None:
        raise KilnError(f"{where}: no {key}; it has {_keys(row)}", hint)
    if not isinstance(found, str):
        raise KilnError(f"{where}: {key} is {found!r:.60}, expected a text", hint)
    try:
        found.encode()
    except UnicodeEncodeError as error:  # JSON can write half a surrogate pair, UTF-8 cannot
        raise KilnError(f"{where}: {key} is no Unicode text: {error}", "mend the \\u.... in it") from None
    return found.strip()


def _keys(row: dict[str, Any]) -> str:
    return ", ".join(map(str, row)) or "nothing"
