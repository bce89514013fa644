"""docs/configuration.md says of every key what the models say."""

import re
from typing import Literal

import pytest
from markdown_it import MarkdownIt
from pydantic import Field

from scripts import config_page
from scripts.common.settings import Settings, execution
from scripts.config import Config


class Inner(Settings):
    """An inner section."""

    share: float = Field(0.5, gt=0, le=1, description="of *.tar | <all>")
    names: tuple[str, ...] = Field(tuple("abcdefghijklmnop"), description="many")


class Outer(Settings):
    """The whole."""

    kind: Literal["a", "b"] = Field("a", description="which")
    workers: int | None = execution(None, ge=0, description="processes")
    inner: Inner = Inner()
    calm: Inner = execution(Inner(share=1.0), description="decides nothing")


def tables(markdown: str) -> dict[str, dict[str, list[str]]]:
    """{section: {key: its cells as a reader sees them}} of a page."""
    found: dict[str, dict[str, list[str]]] = {}
    section, row = "", []
    tokens = MarkdownIt().enable("table").parse(markdown)
    for place, token in enumerate(tokens):
        if token.type == "heading_open":
            section = seen(tokens[place + 1])
        elif token.type == "tr_open":
            row = []
        elif token.type == "td_open":
            row.append(seen(tokens[place + 1]))
        elif token.type == "tr_close" and row:
            found.setdefault(section, {})[row[0]] = row[1:]
    return found


def seen(inline) -> str:
    return "".join(one.content for one in inline.children if not one.type.startswith("html"))


def test_types_bounds_defaults_and_kinds():
    page = tables(config_page.page(Outer()))
    assert page["Top level"]["kind"] == ["a, b", "a", "which", "numerics"]
    assert page["Top level"]["workers"] == ["whole number or null, ≥ 0", "null", "processes", "execution"]
    assert page["inner"]["share"] == ["number, > 0, ≤ 1", "0.5", "of *.tar | <all>", "numerics"]
    assert page["inner"]["names"] == ["list of text", "a and 15 more", "many", "numerics"]


def test_a_section_of_execution_is_execution_throughout_with_its_own_defaults():
    page = tables(config_page.page(Outer()))
    assert page["calm"]["share"][1:] == ["1.0", "of *.tar | <all>", "execution"]


@pytest.fixture(scope="module")
def page():
    return tables(config_page.page(Config()))


def leaves(values: Settings, place: str = ""):
    for name, field in type(values).model_fields.items():
        value = getattr(values, name)
        if isinstance(value, Settings):
            yield from leaves(value, f"{place}.{name}" if place else name)
        else:
            yield place or "Top level", name, field


def test_every_key_is_there_and_has_a_meaning(page):
    keys = [(place, name, field.description) for place, name, field in leaves(Config())]
    assert len(keys) > 300
    assert [one for one in keys if not one[2]] == []
    for place, name, words in keys:
        assert page[place][name][2] == re.sub("`", "", words)


def test_bars_in_a_default_do_not_end_the_cell():
    class Pattern(Settings):
        """A pattern."""

        pattern: str = Field("^(a|b)$", description="either")

    assert tables(config_page.page(Pattern()))["Top level"]["pattern"] == ["text", "^(a|b)$", "either", "numerics"]
