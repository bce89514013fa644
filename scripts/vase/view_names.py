"""How file names say which vase and which view of it they show. Free of heavy imports: plans look at names, too."""

import re
from collections.abc import Iterable

from scripts.common.errors import KilnError


def compile_pattern(pattern: str) -> re.Pattern:
    """The view pattern, checked.

    Raises:
        KilnError: it is no regular expression, or lacks the groups `vase` and `view`.
    """
    hint = "set vase.list.view_pattern to an expression with (?P<vase>...) and (?P<view>...), or to null"
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise KilnError(f"vase.list.view_pattern {pattern!r} is not a regular expression: {error}", hint) from None
    lacking = {"vase", "view"} - set(compiled.groupindex)
    if lacking:
        raise KilnError(f"vase.list.view_pattern {pattern!r} has no group {' or '.join(sorted(lacking))}", hint)
    return compiled


def require_match(paths: Iterable[str], pattern: str | None) -> None:
    """Refuse a pattern that names the vase of none of the files; the first that it names ends the search.

    Raises:
        KilnError: it names none, or is not a view pattern.
    """
    if pattern is None:
        return
    compiled, first, count = compile_pattern(pattern), None, 0
    for path in paths:
        found = compiled.search(path.rpartition("/")[2])
        if found and found["vase"]:  # an optional group may be absent or empty
            return
        first, count = first or path, count + 1
    raise KilnError(
        f"vase.list.view_pattern {pattern!r} matches none of {count} file names, such as {first!r}",
        "fit the pattern to your file names, or set it to null: then each file is a vase of its own",
    )
