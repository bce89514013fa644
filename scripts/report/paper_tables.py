"""The tables config/paper_targets.csv (published numbers) and config/paper_costs.csv (what they cost to reproduce).

paper_targets.csv:
  pipeline, metric   whose, and which of its metrics; see `METRICS`
  model, split, n    what was scored, on what, and how many items
  value, unit        as published; `share` is out of 1. Empty where protocol is none
  better             higher or lower
  protocol           how to tell whether ours compares: see scripts/report/paper_protocols.py; none: no number is known
  settings           where the published training differs from the defaults: section.key=value, separated by spaces
  unknown            what a comparison would need and the source is not known to say; parted by semicolons
  source             paper, repository at a commit, or issue

paper_costs.csv: pipeline, quantity (gpus, gpu_hours, disk_gb), value, basis (published, measured, estimated), and how
it was found.
"""

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import Field, ValidationError, field_validator, model_validator

from scripts import config
from scripts.common.errors import KilnError
from scripts.common.settings import Settings, parse_overrides
from scripts.report.summarise import PIPELINES

_CAPTIONS = {
    "similarity": ("retrieval", "caption_similarity"),
    **{f"r{k}": ("retrieval", "caption", "from_generated", "recall", f"{k}") for k in (1, 5, 10)},
    "lexical_overlap": ("greedy", "caption", "lexical_overlap"),
}
_SUMMARY = {
    "vase": ("classifier_accuracy", "accepted_quality", "best_view_quality", "sft_accuracy", "image_grounding",
             "grpo_reward"),
    "busi": ("balanced_accuracy",),
    "rae": [f"{encoder}_{score}" for encoder in type(config.Config().rae.encoders).model_fields
            for score in ("rfid", "psnr", "ssim", "lpips")],
    "coca": ("retrieval_r5", "caption_diagnosis_accuracy"),
    "biomedica": ("recall_at_5", "hybrid_over_local"),
}  # fmt: skip
# {pipeline: {metric: where it stands in metrics.json}}
METRICS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    pipeline: {name: ("summary", name) for name in names}
    | {
        f"{model}_caption_{name}": ("models", model, *place)
        for model in ("base", "sft", "grpo")
        for name, place in _CAPTIONS.items()
        if pipeline == "vase"
    }
    for pipeline, names in _SUMMARY.items()
}
QUANTITIES = ("gpus", "gpu_hours", "disk_gb")


class Target(Settings):
    """A published number, or that there is none."""

    pipeline: Literal[PIPELINES]
    metric: str
    model: str = Field(min_length=1)
    split: str = Field(min_length=1)
    n: int | None = Field(gt=0)
    n_is: Literal["", "stated", "inferred"]
    value: float | None
    unit: Literal["", "share", "dB"]
    better: Literal["higher", "lower"]
    protocol: Literal["none", "rae_released", "rae_trained", "vase_captions"]
    settings: str
    unknown: str
    source: str = Field(min_length=1)

    @property
    def published_n(self) -> str:
        """Its n in words: one that the source does not say was inferred from its numbers."""
        return f"{self.n} (inferred)" if self.n_is == "inferred" else str(self.n or "")

    @field_validator("n", "value", mode="before")
    @classmethod
    def _empty(cls, value):
        return None if value == "" else value

    @model_validator(mode="after")
    def _fits(self):
        known = METRICS[self.pipeline]
        if self.metric not in known:
            raise ValueError(f"metric = {self.metric!r} is none of {self.pipeline}'s: {', '.join(known)}")
        if (self.value is None) != (self.protocol == "none") or (self.n is None) != (self.protocol == "none"):
            raise ValueError("value and n are numbers where a number is published, and empty where protocol is none")
        if (self.n is None) != (self.n_is == ""):
            raise ValueError("n_is says of n whether the source states it or it was inferred from the source's numbers")
        if self.protocol != "none" and not self.protocol.startswith(f"{self.pipeline}_"):
            raise ValueError(f"protocol = {self.protocol!r} is not of pipeline {self.pipeline}")
        try:
            parse_overrides(self.settings)
        except KilnError as error:
            raise ValueError(error.message) from None
        return self


class Cost(Settings):
    """What reproducing a pipeline's numbers takes."""

    pipeline: Literal[PIPELINES]
    quantity: Literal[QUANTITIES]
    value: float = Field(ge=0)
    basis: Literal["published", "measured", "estimated"]
    how: str = Field(min_length=1)


Row = TypeVar("Row", bound=Settings)


def read_targets(path: Path) -> list[Target]:
    """The published numbers, in the order of the file.

    Raises:
        KilnError: names file, row, value, and what was expected.
    """
    return [row for _, row in _read(path, Target)]


def read_costs(path: Path) -> dict[str, dict[str, Cost]]:
    """{pipeline: {quantity: cost}}, each quantity of each pipeline.

    Raises:
        KilnError: names file, row, value, and what was expected; or what is missing.
    """
    found: dict[str, dict[str, Cost]] = {pipeline: {} for pipeline in PIPELINES}
    for number, row in _read(path, Cost):
        if row.quantity in found[row.pipeline]:
            raise KilnError(
                f"{path}, row {number}: {row.quantity} of {row.pipeline} is there twice", "keep one of the two rows"
            )
        found[row.pipeline][row.quantity] = row
    for pipeline, have in found.items():
        missing = [name for name in QUANTITIES if name not in have]
        if missing:
            raise KilnError(f"{path}: no {', '.join(missing)} of {pipeline}", "add a row for each")
    return found


def _read(path: Path, model: type[Row]) -> list[tuple[int, Row]]:
    """(line, row) of each row of a table whose columns are the fields of `model`."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        raise KilnError(f"{path}: no such file", "it comes with Kiln; check the path") from None
    except UnicodeDecodeError as error:
        raise KilnError(f"{path}: not UTF-8: {error}", "save it as UTF-8") from None
    columns, reader = list(model.model_fields), csv.reader(lines)
    header = next(reader, [])
    if header != columns:
        raise KilnError(f"{path}, row 1: {','.join(header)}; expected {','.join(columns)}", "name the columns so")
    found = []
    for cells in reader:
        where = f"{path}, row {reader.line_num}"
        if len(cells) != len(columns):
            raise KilnError(
                f"{where}: {len(cells)} values for {len(columns)} columns: {','.join(cells)}",
                "separate values by commas; put one that holds a comma in double quotes",
            )
        try:
            row = {name: cell.strip() for name, cell in zip(columns, cells, strict=True)}
            found.append((reader.line_num, model.model_validate(row)))
        except ValidationError as error:
            raise KilnError(f"{where}: {_said(error, row)}", "scripts/report/paper_tables.py says what goes") from None
    return found


def _said(error: ValidationError, row: Mapping[str, str]) -> str:
    said = []
    for one in error.errors():
        text = one["msg"].removeprefix("Value error, ")
        said.append(f"{one['loc'][0]} = {row[one['loc'][0]]!r}: {text}" if one["loc"] else text)
    return "; ".join(said)
