"""A user's own Python file in place of a function of ours."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from scripts.common.errors import KilnError


def load(path: Path, key: str, hint: str) -> ModuleType:
    """The module in file `path`, run once more at each call.

    Args:
        key: setting that names it, for messages.
        hint: what is expected of it.

    Raises:
        KilnError: no such .py file, or one that cannot be imported.
    """
    if path.suffix != ".py" or not path.is_file():
        raise KilnError(f"{path}: no such plugin", f"{key} is the path of a .py file")
    spec = importlib.util.spec_from_file_location(f"kiln_{key.replace('.', '_')}_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look themselves up there
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise KilnError(f"{path}: cannot be imported ({type(error).__name__}: {error})", hint) from error
    return module
