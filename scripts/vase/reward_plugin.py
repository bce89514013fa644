"""The rewards of GRPO in ms-swift's registry: ours, or a user's own.

`external_vase_acc` is the content reward, `external_vase_format` the format part. ms-swift hands an `ORM` the
completions and, as lists of the same length, the columns of the dataset: here `reference`, `dimension` and `facts`.
"""

import importlib.util
import inspect
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

from scripts.common.errors import KilnError
from scripts.vase.rewards import Reward
from scripts.vase.settings import RewardSettings

CONTENT, FORMAT = "external_vase_acc", "external_vase_format"
Scorer = Callable[[Sequence[str], dict[str, list]], list[float]]


def load_scorer(values: RewardSettings) -> Scorer:
    """The content reward as a function of completions and columns {name: one value for each completion}.

    Raises:
        KilnError: a user's plugin cannot be loaded; or, when it is called, does not give one finite number each.
    """
    reward = Reward(values)
    if values.plugin:
        return _checked(_users(Path(values.plugin).expanduser(), reward), values.plugin)

    def score(completions: Sequence[str], columns: dict[str, list]) -> list[float]:
        rows = zip(completions, columns["reference"], columns["dimension"], columns["facts"], strict=True)
        return [reward.content(*row).value for row in rows]

    return score


def register(values: RewardSettings) -> None:
    """Put both rewards into ms-swift's registry, under their names for `--reward_funcs`.

    Raises:
        KilnError: see `load_scorer`.
    """
    from swift.rewards import ORM, orms

    scorer, reward = load_scorer(values), Reward(values)

    class ExternalVaseAcc(ORM):
        def __call__(self, completions, **columns) -> list[float]:
            return scorer(completions, columns)

    class ExternalVaseFormat(ORM):
        def __call__(self, completions, **_) -> list[float]:
            return [reward.format(text) for text in completions]

    orms[CONTENT], orms[FORMAT] = ExternalVaseAcc, ExternalVaseFormat


def _users(path: Path, reward: Reward) -> Scorer:
    """What a user's file has: an ORM class in the registry or under the name, or a plain function of that name."""
    module = _load(path)
    found = getattr(module, CONTENT, None)
    if found is None or inspect.isclass(found):
        from swift.rewards import orms

        found = found or orms.get(CONTENT)
        if found is None:
            raise KilnError(
                f"{path}: no {CONTENT}",
                f"define a function {CONTENT}(responses, references), or an ORM: orms[{CONTENT!r}] = YourClass",
            )
        try:
            orm = found(args=None)  # as ms-swift makes one
        except TypeError:
            orm = found()
        return lambda completions, columns: orm(completions, **columns)
    return lambda completions, columns: found([reward.extract(text) for text in completions], columns["reference"])


def _load(path: Path) -> ModuleType:
    if not path.is_file():
        raise KilnError(f"{path}: no such file (vase.reward.plugin)", "give the path of a .py file")
    spec = importlib.util.spec_from_file_location(f"kiln_reward_{path.stem}", path)
    if spec is None:
        raise KilnError(f"{path}: not a Python file (vase.reward.plugin)", "give the path of a .py file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise KilnError(f"{path}: cannot be imported ({type(error).__name__}: {error})", "mend the plugin") from error
    return module


def _checked(scorer: Scorer, plugin: str) -> Scorer:
    def score(completions: Sequence[str], columns: dict[str, list]) -> list[float]:
        try:
            found = [float(value) for value in scorer(completions, columns)]
        except (TypeError, ValueError) as error:
            raise KilnError(f"{plugin}: the reward gave no numbers ({error})", "return a list of floats") from error
        if len(found) != len(completions):
            raise KilnError(
                f"{plugin}: {len(found)} rewards for {len(completions)} completions", "return one number for each"
            )
        for text, value in zip(completions, found, strict=True):
            if not math.isfinite(value):
                raise KilnError(f"{plugin}: the reward of {text[:80]!r} is {value}", "return finite numbers")
        return found

    return score
