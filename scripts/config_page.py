"""docs/configuration.md, from the settings models: a table of keys for each section."""

import html
import json
from collections.abc import Iterator
from typing import Any

from scripts.common.keys import LONG, as_code, bounds, type_text
from scripts.common.settings import Settings, is_execution

INTRO = """# Configuration

<!-- generated from the settings models by `make config`; do not edit -->

Your values go into `config/config.yaml`, as few as you like, in the form of
[config/default.yaml](../config/default.yaml), where the defaults below stand as YAML. Editors complete and check keys
from `config/schema.json`. On the command line: `--config set="rae.autoencoder.lr=1e-4 device=cpu"`, or `--configfile
FILE`. Later ones win: defaults, `config/config.yaml`, `--configfile` and `--config`, and last its `set`. An unknown key
or a value that is not allowed stops before any job, with the nearest name that there is.

**Kind.** A key of kind *numerics* decides numbers: changing it reruns the steps that read it, and what follows them
([what reruns](reruns.md)). A file or folder that it names counts by what lies there, not by its path. A key of kind
*execution* (workers, devices, intervals) decides none and reruns nothing.

Defaults of the pipelines' sections are the published values, where there are any. Long ones are cut here.
"""


def page(config: Settings) -> str:
    """The page, as Markdown: a section for each model below `config`, whose values are the defaults."""
    return INTRO + "".join(_section(*one) for one in _sections(config, "", None, False))


def _sections(values: Settings, place: str, words: str | None, execution: bool) -> Iterator[tuple]:
    """`values` and the models below it, each with its dotted place and what it is said to be; depth first."""
    yield values, place, words, execution
    for name, field in type(values).model_fields.items():
        inner = getattr(values, name)
        if isinstance(inner, Settings):
            deeper = execution or is_execution(field)
            yield from _sections(inner, f"{place}.{name}" if place else name, field.description, deeper)


def _section(values: Settings, place: str, words: str | None, execution: bool) -> str:
    heading = f"{'##' if place.count('.') == 0 else '###'} `{place}`" if place else "## Top level"
    doc = (type(values).__doc__ or "").strip().partition("\n")[0]
    lines = [f"\n{heading}\n", f"{doc}{f' ({words})' if words else ''}\n" if place else "Keys outside every section.\n"]
    rows = [
        f"| `{name}` | {type_text(field.annotation)}{bounds(field)} | {_default(getattr(values, name))} | "
        f"{_cell(field.description or '')} | {'execution' if execution or is_execution(field) else 'numerics'} |"
        for name, field in type(values).model_fields.items()
        if not isinstance(getattr(values, name), Settings)
    ]
    if rows:
        lines += ["| key | type | default | meaning | kind |", "|---|---|---|---|---|", *rows, ""]
    return "\n".join(lines)


def _default(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False) if not isinstance(value, str) else value
    if len(text) <= LONG:
        return as_code(text or '""')
    if isinstance(value, tuple | list):
        return f"{as_code(value[0])} and {len(value) - 1} more"
    return f"{as_code(text[:LONG])} …"


def _cell(text: str) -> str:
    """Words with code in backticks: no other character of theirs is markup."""
    return html.escape(text, quote=False).replace("|", "&#124;").replace("*", r"\*")
