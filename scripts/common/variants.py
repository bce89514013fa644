"""Variants: named changes to how a pipeline trains, each with its seeds, whose results stand side by side.

    variants:
      low: {autoencoder: {lr: 1.0e-4}, seeds: [0, 1, 2]}

A variant has the form of its pipeline's section, and holds what it changes. `main` is the section itself and is always
there. A variant with one seed is one run; each further seed is another, with that seed in all its trainings. What is
made before the first change is shared: of several runs that agree so far, the first one's results serve all.
"""

import re
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, Self, TypeVar

from pydantic import Field, field_validator, model_validator

from scripts.common.errors import KilnError
from scripts.common.settings import Settings, merge, of_kind, validate

MAIN = "main"
RUN = r"[A-Za-z][A-Za-z0-9_]*(-\d+)?"  # what the name of a run looks like


class Run(NamedTuple):
    """One training of all that a pipeline trains: its name, and its settings."""

    name: str
    variant: str
    settings: Settings


class VariedSettings(Settings):
    """Base of the section of a pipeline that has variants.

    Attributes:
        stages: {stage: sections that its steps read and those of earlier stages do not}, in the order of the DAG;
            variants may change these sections, and no others.
        seeded: the trainings' seeds, such as `train.seed`.
    """

    stages: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    seeded: ClassVar[tuple[str, ...]] = ()
    variants: dict[str, dict[str, Any]] = Field(
        {MAIN: {}}, description="name: {section: {key: value}, seeds: [..]}; trained and scored beside `main`"
    )

    @field_validator("variants", mode="before")
    @classmethod
    def _with_main(cls, given):
        return {MAIN: {}, **given} if isinstance(given, Mapping) else given

    @model_validator(mode="after")
    def _runs_are_possible(self) -> Self:
        runs(self)
        return self


S = TypeVar("S", bound=VariedSettings)


def runs(section: S) -> dict[str, Run]:
    """{name: run} of all variants and seeds, that of `main` first.

    A run is named by its variant where it keeps the section's own seeds, else `<variant>-<seed>`, so that further
    seeds leave what is there alone.

    Raises:
        KilnError: a name, a list of seeds or a change is not possible.
    """
    found = {}
    for variant, changes in section.variants.items():
        changes = dict(changes)
        seeds = changes.pop("seeds", [])
        _check(section, variant, changes, seeds)
        varied = _changed(section, variant, changes)
        own = set(_seeds(varied))
        for seed in seeds or [None]:
            kept = seed is None or own == {seed}
            name = variant if kept else f"{variant}-{seed}"
            found[name] = Run(name, variant, varied if kept else _changed(varied, name, _with_seed(varied, seed)))
    return found


def serving(section: S, stage: str) -> dict[str, str]:
    """{run: the run whose results of a stage serve it}: the first with the same numerics up to and in that stage."""
    names = list(section.stages)
    read = [one for name in names[: names.index(stage) + 1] for one in section.stages[name]]
    first: dict[str, str] = {}
    serves = {}
    for name, run in runs(section).items():
        key = repr([of_kind(getattr(run.settings, one), "numerics") for one in read])
        serves[name] = first.setdefault(key, name)
    return serves


def _check(section: VariedSettings, variant: str, changes: Mapping[str, Any], seeds: Any) -> None:
    if not re.fullmatch(RUN.removesuffix(r"(-\d+)?"), variant):
        raise KilnError(f"variant {variant!r}: not a name", "use letters, digits and _, and start with a letter")
    if not isinstance(seeds, list | tuple) or not all(type(one) is int and one >= 0 for one in seeds):
        raise KilnError(f"variant {variant}: seeds = {seeds!r}", "give whole numbers from 0 in a list: seeds=[0,1,2]")
    if len(set(seeds)) < len(seeds):
        raise KilnError(f"variant {variant}: seeds = {seeds!r} names one twice", "give each once")
    if variant == MAIN and changes:
        raise KilnError(
            f"variant {MAIN} changes {', '.join(changes)}; it is the configuration itself, and has seeds alone",
            "change the section, or name another variant",
        )
    allowed = [one for sections in section.stages.values() for one in sections]
    shared = [name for name in changes if name in type(section).model_fields and name not in allowed]
    if shared:
        raise KilnError(
            f"variant {variant} changes {', '.join(shared)}, which all variants share",
            f"variants may change {', '.join(allowed)}; for the rest give another `results` folder",
        )


def _changed(section: S, name: str, changes: Mapping[str, Any]) -> S:
    if not changes:
        return section
    plain = {**section.model_dump(mode="json"), "variants": {MAIN: {}}}
    return validate(type(section), merge(plain, changes), f"variant {name}").model_copy(
        update={"variants": section.variants}
    )


def _seeds(section: VariedSettings) -> list[int]:
    found = []
    for dotted in section.seeded:
        place: Any = section
        for part in dotted.split("."):
            place = getattr(place, part)
        found.append(place)
    return found


def _with_seed(section: VariedSettings, seed: int) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    for dotted in section.seeded:
        *parts, last = dotted.split(".")
        place = changes
        for part in parts:
            place = place.setdefault(part, {})
        place[last] = seed
    return changes
