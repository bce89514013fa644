"""A user's own `loss_terms` in place of `losses.loss_terms`."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from scripts.common import plugins
from scripts.common.errors import KilnError

HINT = "define loss_terms(**tensors) -> {name: scalar tensor}, as in scripts/coca/losses.py"


def load(path: Path) -> Callable[..., dict[str, Tensor]]:
    """The function `loss_terms` of a user's file, its results checked at each call.

    Raises:
        KilnError: no such file or function; when called, anything but scalars by name.
    """
    found = getattr(plugins.load(path, "coca.train.loss_plugin", HINT), "loss_terms", None)
    if not callable(found):
        raise KilnError(f"{path}: no function loss_terms", HINT)

    def terms(**tensors) -> dict[str, Tensor]:
        made = found(**tensors)
        if not isinstance(made, dict) or not made or not all(torch.is_tensor(x) and x.ndim == 0 for x in made.values()):
            raise KilnError(f"{path}: loss_terms({', '.join(tensors)}) gave {_show(made)}", HINT)
        return made

    return terms


def _show(made: object) -> str:
    if isinstance(made, dict) and made:
        shapes = (list(x.shape) if torch.is_tensor(x) else type(x).__name__ for x in made.values())
        return ", ".join(f"{name}: {shape}" for name, shape in zip(made, shapes, strict=True))
    return repr(made)[:80]
