"""Retrieve wanted files of a data set of the Hugging Face hub.

Writes them, files.json ({name: {bytes, sha256}}) and the record of the run into the output folder, which appears whole
or not at all. The first retrieval locks commit and hashes; a later one gets the same bytes or fails. Files that are
there already with the locked bytes are not downloaded again, and when all are, no network is needed.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from scripts.common import step
from scripts.retrieve import files, models

MODULE = "scripts.retrieve.dataset"


class DataSet(models.Model):
    """What is wanted of a data set's repo: as a row of the table of models, named by its source."""

    noun: ClassVar[str] = "data set"
    place: ClassVar[str] = "section rae.dataset of the configuration"
    repo_type: ClassVar[str] = "dataset"

    name: str
    kind: Literal["dataset"] = "dataset"
    optional: tuple[str, ...] = Field((), description="files that need not be there")
    licence: str = "see source"

    @model_validator(mode="before")
    @classmethod
    def _named_by_source(cls, values):
        return {"name": values.get("source", ""), **values}

    @property
    def asked_files(self) -> tuple[str, ...]:
        """See `Model`."""
        return (*self.files, *self.optional)

    def select(self, names: Iterable[str]) -> list[str]:
        """See `Model`; with what is there of the optional files."""
        names = list(names)
        more = {name for name in names for wanted in self.optional if models.matches(name, wanted)}
        return sorted({*super().select(names), *more})


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = step.parser(__doc__, DataSet)
    parser.add_argument("--lock", type=Path, required=True, help="the lock (datasets.lock.json)")
    files.add_options(parser)
    args = parser.parse_args(argv)
    data_set = step.read_settings(args)
    record = step.record(args, MODULE, data_set, {})
    files.retrieve(args, data_set, record, MODULE)


if __name__ == "__main__":
    step.run(main)
