"""Our reward, or a user's in its place, in ms-swift's registry `orms` and as a plain function.

ms-swift calls a reward with the completions and, as keywords, every column of the data set: lists, one item for each
completion. Ours reads the columns reference, dimension and facts.
"""

import asyncio
import inspect
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scripts.common import plugins
from scripts.common.errors import KilnError
from scripts.vase.rewards import Reward
from scripts.vase.settings import RewardSettings

CONTENT, FORMAT = "external_vase_acc", "external_vase_format"
Scorer = Callable[[list[str], dict[str, list]], list[float]]
_HINT = f"see {CONTENT} under `The reward` in docs/vase.md"


def register(values: RewardSettings) -> None:
    """Put `external_vase_acc`, the content, and `external_vase_format` into ms-swift's registry.

    Raises:
        KilnError: no usable `values.plugin`.
    """
    from swift.rewards import ORM, orms

    make = _maker(values)
    reward = Reward(values)

    class VaseContent(ORM):
        def __init__(self, args=None, **kwargs):
            super().__init__(args, **kwargs)
            self.scorer = make(args)

        def __call__(self, completions, **columns) -> list[float]:
            return self.scorer(completions, columns)

    class VaseFormat(ORM):
        def __call__(self, completions, **columns) -> list[float]:
            return [reward.format(text) for text in completions]

    orms[CONTENT], orms[FORMAT] = VaseContent, VaseFormat


def load_scorer(values: RewardSettings) -> Scorer:
    """The content reward without a trainer: (completions, {column: values}) -> one finite number each.

    Raises:
        KilnError: no usable `values.plugin`; when called, a missing column or rewards that are no numbers.
    """
    return _maker(values)(None)


def _maker(values: RewardSettings) -> Callable[[Any], Scorer]:
    """What makes a scorer from the trainer's arguments, or None."""
    if values.plugin:
        return _users(Path(values.plugin))
    reward = Reward(values)

    def score(completions: list[str], columns: dict[str, list]) -> list[float]:
        references, dimensions = (_column(columns, name, len(completions)) for name in ("reference", "dimension"))
        facts = columns.get("facts") or [""] * len(completions)
        rows = zip(completions, references, dimensions, facts, strict=True)
        return [reward.content(*row).value for row in rows]

    return lambda args: score


def _column(columns: dict[str, list], name: str, count: int) -> list:
    found = columns.get(name)
    if found is None or len(found) != count:
        raise KilnError(
            f"{CONTENT}: {count} completions, but {'no' if found is None else len(found)} values of {name}",
            "make the rows by rule vase_build_dataset",
        )
    return found


def _users(path: Path) -> Callable[[Any], Scorer]:
    registry = _registry()
    ours = registry.pop(CONTENT, None)
    try:
        module = plugins.load(path, "vase.reward.plugin", _HINT)
        registered = _registry().pop(CONTENT, None)
    finally:
        if ours is not None:
            registry[CONTENT] = ours
    found = registered or getattr(module, CONTENT, None)
    if not callable(found):
        raise KilnError(
            f"{path}: no {CONTENT}; expected an ORM class, registered or of that name, or a function",
            f"define {CONTENT}(responses, references) -> list of floats",
        )

    def make(args: Any) -> Scorer:
        if registered or inspect.isclass(found):
            orm = found(args=args)
            return lambda completions, columns: _checked(path, orm(completions, **columns), len(completions))

        def score(completions: list[str], columns: dict[str, list]) -> list[float]:
            made = found(completions, _column(columns, "reference", len(completions)))
            return _checked(path, made, len(completions))

        return score

    return make


def _registry() -> dict[str, Any]:
    """ms-swift's registry where it is imported already: a plugin without it should not wait for its import."""
    return getattr(sys.modules.get("swift.rewards.orm"), "orms", {})


def _checked(path: Path, made: Any, count: int) -> list[float]:
    """The rewards that a plugin gave, as floats."""
    if inspect.isawaitable(made):  # of an AsyncORM
        made = asyncio.run(_wait(made))
    try:
        found = list(made)
    except TypeError:
        raise KilnError(f"{path}: {CONTENT} gave {made!r}, expected {count} numbers", _HINT) from None
    if len(found) != count:
        raise KilnError(f"{path}: {CONTENT} gave {len(found)} values for {count} completions", _HINT)
    return [_number(path, one) for one in found]


async def _wait(made: Any) -> Any:
    return await made


def _number(path: Path, one: Any) -> float:
    try:
        value = math.nan if isinstance(one, str) else float(one)
    except (TypeError, ValueError, OverflowError):
        value = math.nan
    if not math.isfinite(value):
        raise KilnError(f"{path}: {CONTENT} gave {one!r}; a reward must be a finite number", _HINT)
    return value
