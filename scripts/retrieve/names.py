"""How settings name a model: as in config/models.csv, or by the path of its folder or file."""

import difflib
import os
from collections.abc import Collection

from scripts.common.errors import KilnError


def is_listed(name: str, listed: Collection[str]) -> bool:
    """Whether `name` is one of `listed`; else it is a path, which a rule may have yet to make.

    Raises:
        KilnError: a bare name that is neither listed nor there: it is misspelt.
    """
    if name in listed or os.sep in name or os.path.exists(name):
        return name in listed
    near = difflib.get_close_matches(name, listed, n=1)
    names = f"did you mean {near[0]!r}?" if near else f"names are {', '.join(listed)}."
    raise KilnError(
        f"model {name!r} is neither a name in config/models.csv nor a file or folder",
        f"{names} A path that is still to be made is given as ./{name}",
    )
