"""Whether numbers are of the demo's drawn data."""

from collections.abc import Mapping
from typing import Any


def uses_drawn_data(config: Any) -> bool:
    """Whether a resolved configuration has a value below the demo's own folder, {results}/demo/."""
    drawn = f"{config['results']}/demo/"
    todo = [config]
    while todo:
        value = todo.pop()
        if isinstance(value, str) and value.startswith(drawn):
            return True
        todo += value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else []
    return False
