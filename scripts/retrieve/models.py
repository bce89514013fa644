"""The table of models, config/models.csv: where each comes from, and which of its files are wanted.

name      how settings and rules call it; also its folder's name
kind      hub: a model repo of the Hugging Face hub; url: one file
source    hub: owner/repo; url: https://...
revision  hub: a branch, tag or commit; empty: the default branch. Locked at first retrieval
files     names in the repo, separated by spaces; * and ? match within one folder's name
sha256    empty, or one for each name in `files` (which then has no * or ?): 64 hex digits, or
          the first 8 or more, as some publishers put them into a file's name
licence   of the weights
used_by   pipelines
"""

import csv
import difflib
import fnmatch
import re
from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar, Literal
from urllib.parse import urlsplit

from pydantic import Field, ValidationError, field_validator, model_validator

from scripts.common.errors import KilnError
from scripts.common.settings import Settings, to_json

_FILE = re.compile(r"[A-Za-z0-9_*?][A-Za-z0-9._*?+-]*(/[A-Za-z0-9_*?][A-Za-z0-9._*?+-]*)*")
_RESERVED = ("files.json", "meta.json")
_LOCAL = ("127.0.0.1", "localhost", "::1")


class Model(Settings):
    """One row of the table.

    Attributes:
        noun, place: for messages: what this is, and where its source, revision and files are said.
        repo_type: as the hub calls it.
    """

    noun: ClassVar[str] = "model"
    place: ClassVar[str] = "config/models.csv"
    repo_type: ClassVar[str] = "model"

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    kind: Literal["hub", "url"]
    source: str
    revision: str = Field("", pattern=r"^([A-Za-z0-9][A-Za-z0-9._/-]*)?$")
    files: tuple[str, ...] = Field(min_length=1)
    sha256: tuple[str, ...] = ()
    licence: str = Field(min_length=1)
    used_by: tuple[str, ...] = ()

    @field_validator("files", "sha256", "used_by", mode="before")
    @classmethod
    def _split(cls, value):
        return tuple(value.split()) if isinstance(value, str) else value

    @field_validator("files")
    @classmethod
    def _plain_names(cls, value):
        for name in value:
            if not _FILE.fullmatch(name):
                raise ValueError(f"{name!r} is not a relative path of plain letters, digits and ._*?+-")
            if name in _RESERVED:
                raise ValueError(f"{name!r} is a name that Kiln writes itself")
        return value

    @field_validator("sha256")
    @classmethod
    def _hex(cls, value):
        for digits in value:
            if not re.fullmatch(r"[0-9a-f]{8,64}", digits):
                raise ValueError(f"{digits!r} is not 8 to 64 lower-case hex digits")
        return value

    @model_validator(mode="after")
    def _fits_kind(self):
        if self.kind != "url":
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*", self.source):
                raise ValueError(f"source {self.source!r} is not owner/repo")
        else:
            _check_url(self.source)
            if self.revision:
                raise ValueError(f"revision {self.revision!r} is given, but a url has none")
            if len(self.files) != 1 or "/" in self.files[0] or _has_wildcard(self.files[0]):
                raise ValueError(f"files {' '.join(self.files)!r}: a url gives one file, so name one")
        if self.sha256 and (len(self.sha256) != len(self.files) or any(map(_has_wildcard, self.files))):
            raise ValueError("sha256 needs one value for each file, and files without * and ?")
        return self

    @property
    def title(self) -> str:
        """How messages call it."""
        return f"{self.noun} {self.name!r}"

    @property
    def asked_files(self) -> tuple[str, ...]:
        """What a lock keeps of the wanted files."""
        return self.files

    def identity(self) -> str:
        """What decides the bytes, as canonical JSON; a licence's wording does not."""
        return to_json(self.model_dump(mode="json", exclude={"licence", "used_by"}))

    def select(self, names: Iterable[str]) -> list[str]:
        """The wanted ones among a repo's `names`, sorted.

        Raises:
            KilnError: a wanted file is not there.
        """
        names = sorted(names)
        chosen = set()
        for wanted in self.files:
            found = [name for name in names if matches(name, wanted)]
            if not found:
                near = difflib.get_close_matches(wanted, names, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"it holds: {', '.join(names[:20])}"
                raise KilnError(f"{self.title}: {self.source} has no file {wanted!r}", hint)
            chosen.update(found)
        clash = chosen.intersection(_RESERVED)
        if clash:
            raise KilnError(
                f"{self.title}: {self.source} has a file {min(clash)!r}, a name that Kiln writes itself",
                f"name the wanted files in {self.place} one by one, without it",
            )
        return sorted(chosen)


def read_table(path: Path) -> dict[str, Model]:
    """The models of the table at `path`, by name.

    Raises:
        KilnError: the file is missing, or a column, a value or a repeated name is wrong; names row and value.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        raise KilnError(f"{path}: no such file", "it comes with Kiln; check the path") from None
    except UnicodeDecodeError as error:
        raise KilnError(f"{path}: not UTF-8: {error}", "save it as UTF-8") from None
    reader = csv.reader(lines)
    header = next(reader, [])
    _check_header(path, header)
    models: dict[str, Model] = {}
    for cells in reader:
        if not cells:
            continue
        where = f"{path}, row {reader.line_num}"
        if len(cells) != len(header):
            raise KilnError(
                f"{where}: {len(cells)} values for {len(header)} columns: {','.join(cells)}",
                "separate values by commas, and files by spaces",
            )
        model = _read_row(where, {key: cell.strip() for key, cell in zip(header, cells, strict=True)})
        if model.name in models:
            raise KilnError(f"{where}: name = {model.name!r} is there twice", "give each row its own name")
        models[model.name] = model
    return models


def find(models: dict[str, Model], name: str, path: Path) -> Model:
    """The model called `name`.

    Raises:
        KilnError: there is none; suggests the nearest spelling.
    """
    if name in models:
        return models[name]
    near = difflib.get_close_matches(name, models, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"it has: {', '.join(models)}"
    raise KilnError(f"{path} has no model {name!r}", hint)


def _check_header(path: Path, header: list[str]) -> None:
    columns = list(Model.model_fields)
    for name in header:
        if name not in columns:
            near = difflib.get_close_matches(name, columns, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else "remove it"
            raise KilnError(f"{path}, row 1: unknown column {name!r}; expected: {', '.join(columns)}", hint)
    missing = [name for name in columns if name not in header]
    if missing or len(header) != len(columns):
        wrong = f"column {missing[0]!r} is missing" if missing else "a column is there twice"
        raise KilnError(f"{path}, row 1: {wrong}", f"the first row is: {','.join(columns)}")


def _read_row(where: str, row: dict[str, str]) -> Model:
    try:
        return Model.model_validate(row)
    except ValidationError as error:
        wrong = []
        for one in error.errors():
            text = one["msg"].removeprefix("Value error, ")
            key = one["loc"][0] if one["loc"] else None
            wrong.append(f"{key} = {row[key]!r}: {text}" if key else text)
        message = f"{where} (name {row['name']!r}): {'; '.join(wrong)}"
        raise KilnError(message, "scripts/retrieve/models.py says what each column holds") from None


def _check_url(url: str) -> None:
    parts = urlsplit(url)
    if re.search(r"[^\x21-\x7e]", url) or not parts.hostname:
        raise ValueError(f"source {url!r} is not a url")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ValueError("source has a user name, a query or a fragment; such urls hold secrets or pass away")
    # Plain http only to this machine: anywhere else, whoever sits between could change the first retrieval.
    if parts.scheme != "https" and not (parts.scheme == "http" and parts.hostname in _LOCAL):
        raise ValueError(f"source {url!r} is not https")


def _has_wildcard(name: str) -> bool:
    return "*" in name or "?" in name


def matches(name: str, wanted: str) -> bool:
    """Whether the file `name` is what `wanted` asks for; * and ? match within one folder's name."""
    parts, patterns = name.split("/"), wanted.split("/")
    return len(parts) == len(patterns) and all(map(fnmatch.fnmatchcase, parts, patterns))
