"""Splits that others published: rows image, text, answer, label as JSON, JSON Lines or CSV."""

import csv
import io
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import pandas as pd

from scripts.common.errors import KilnError

COLUMNS = ("image", "text", "answer", "label")


def read_split(path: Path, classes: Sequence[str]) -> pd.DataFrame:
    """Columns row (int64, first row = 1), image, text, answer, label (int64) of a published file, in its order.

    In a JSON file rows are counted by element, in a JSON Lines file by line, in a CSV file below the header. Further
    columns are left alone. `image` loses a leading "./" and doubled slashes, no more.

    Args:
        path: ends in .json (a list of objects), .jsonl or .csv, in any letter case; UTF-8.
        classes: names of the labels 0, 1, ...; answers are written just so.

    Raises:
        KilnError: names file and row of what cannot be read, lacks a column or a text, has a label or an answer that is
            no class, or an answer that is not its label's, or is a second row for its image. That is an error with
            equal labels too: the image would be trained on, or scored, twice.
    """
    rows = []
    for number, values in _records(path):
        where = f"{path}, row {number}"
        missing = [name for name in COLUMNS if values.get(name) is None]
        if missing:
            raise KilnError(
                f"{where}: no {', '.join(missing)}; it has {', '.join(map(str, values)) or 'nothing'}",
                f"each row needs {', '.join(COLUMNS)}",
            )
        for name in ("image", "text", "answer"):
            if not isinstance(values[name], str) or not values[name].strip():
                raise KilnError(f"{where}: {name} is {values[name]!r}, expected a text", "mend the row")
        label = _label(values["label"], classes, where)
        if values["answer"] not in classes:
            raise KilnError(
                f"{where}: answer {values['answer']!r} is no class; expected one of {', '.join(classes)}",
                "mend the row, or write the class names (busi.list.classes, --classes) as the answers are written",
            )
        if values["answer"] != classes[label]:
            raise KilnError(
                f"{where}: answer {values['answer']!r}, but label {label}, which is {classes[label]}",
                "mend the row, or name the classes in the order of these labels",
            )
        image = PurePosixPath(values["image"]).as_posix()
        rows.append((number, image, values["text"], values["answer"], label))
    if not rows:
        raise KilnError(f"{path}: no rows", f"a split has one row per image: {', '.join(COLUMNS)}")
    frame = pd.DataFrame(rows, columns=["row", *COLUMNS])
    check_once(path, frame, frame["image"], classes)
    return frame


def _records(path: Path) -> list[tuple[int, dict]]:
    """[(row number, the row)] of a file of any of the three kinds."""
    readers = {".json": _json, ".jsonl": _json_lines, ".csv": _csv}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise KilnError(f"{path}: a split ends in {', '.join(readers)}", "rename or convert the file")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise KilnError(f"{path}: cannot be read ({error.strerror})", "check the path") from None
    except UnicodeDecodeError as error:
        raise KilnError(f"{path}: not UTF-8: {error}", "save it as UTF-8") from None
    return reader(path, text)


def _json(path: Path, text: str) -> list[tuple[int, dict]]:
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise KilnError(f"{path}: not JSON: {error}", "mend it; one object per line belongs into a .jsonl") from None
    if not isinstance(rows, list):
        raise KilnError(f"{path}: a JSON {type(rows).__name__}, expected a list of rows", "write [{...}, {...}]")
    return [(number, _object(path, number, row)) for number, row in enumerate(rows, start=1)]


def _json_lines(path: Path, text: str) -> list[tuple[int, dict]]:
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise KilnError(f"{path}, row {number}: not JSON: {error}", "each line is one {...}") from None
        rows.append((number, _object(path, number, row)))
    return rows


def _object(path: Path, number: int, row: object) -> dict:
    if not isinstance(row, dict):
        raise KilnError(f"{path}, row {number}: {row!r:.60}, expected an object", f"with {', '.join(COLUMNS)}")
    return row


def _csv(path: Path, text: str) -> list[tuple[int, dict]]:
    table = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    hint = f"its first line is {','.join(COLUMNS)}; texts that hold commas stand in double quotes"
    rows = []
    try:
        for row in table:
            rows.append(row)
    except csv.Error as error:
        raise KilnError(f"{path}, row {len(rows) + 1}: no CSV: {error}", hint) from None
    header = table.fieldnames or []
    missing = [name for name in COLUMNS if name not in header]
    if missing:
        raise KilnError(f"{path}: no column {', '.join(missing)}; it has {', '.join(header) or 'none'}", hint)
    for number, row in enumerate(rows, start=1):
        if None in row:  # where DictReader puts what is beyond the header
            raise KilnError(
                f"{path}, row {number}: {len(header) + len(row[None])} fields, but {len(header)} columns", hint
            )
    return list(enumerate(rows, start=1))


def _label(value: object, classes: Sequence[str], where: str) -> int:
    digits = isinstance(value, str) and value.strip().isdecimal()  # CSV knows texts alone
    label = int(value) if digits else value
    if type(label) is not int or not 0 <= label < len(classes):
        names = ", ".join(f"{number} {name}" for number, name in enumerate(classes))
        raise KilnError(f"{where}: label {value!r} is no class; expected a number: {names}", "mend the row")
    return label


def check_once(path: Path, frame: pd.DataFrame, images: pd.Series, classes: Sequence[str]) -> None:
    """No image (of `images`, gaps aside) has two rows in `frame` (columns row, label).

    Raises:
        KilnError: names the rows, and their labels where these differ.
    """
    doubled = images.duplicated() & images.notna()
    if not doubled.any():
        return
    image = images[doubled].iloc[0]
    one, two = frame[images == image].iloc[:2].itertuples()
    labels = [f"{label} ({classes[label]})" for label in (one.label, two.label)]
    if one.label != two.label:
        says, hint = f"the labels {labels[0]} and {labels[1]}", "find out which is right, and delete the other row"
    else:
        says, hint = f"the same label {labels[0]}", "delete one: the image would be trained on, or scored, twice"
    raise KilnError(f"{path}, rows {one.row} and {two.row}: two rows for {image}, with {says}", hint)


def match(images: pd.Series, paths: Sequence[str]) -> pd.Series:
    """The path that each image means, or NA; the index is that of `images`.

    A path is meant that is written the same, else the only one that differs in the letter case of its folders, else
    the only one that differs in letter case.
    """
    found = pd.Series(pd.NA, index=images.index, dtype=object)
    for key in (str, _folders_folded, str.casefold):
        keys = [key(path) for path in paths]
        times = Counter(keys)
        only = {name: path for name, path in zip(keys, paths, strict=True) if times[name] == 1}
        found = found.where(found.notna(), images.map(lambda image, key=key, only=only: only.get(key(image), pd.NA)))
    return found


def _folders_folded(path: str) -> str:
    parent, slash, name = path.rpartition("/")
    return parent.casefold() + slash + name


def read_matched(path: Path, classes: Sequence[str], paths: Sequence[str]) -> pd.DataFrame:
    """`read_split` with a column path: which of `paths` each image is, or NA.

    Raises:
        KilnError: as `read_split`; two rows that mean one image count as two rows for it.
    """
    frame = read_split(path, classes)
    frame["path"] = match(frame["image"], paths)
    check_once(path, frame, frame["path"], classes)
    return frame
