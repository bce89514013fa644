"""Every message that docs/troubleshooting.md quotes stands in the code: ours in scripts/, others in their package."""

import ast
import importlib.util
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
OURS, OTHERS = PAGE.split("## Other programs' messages")
ANY = "…"
PACKAGES = {"Snakemake": "snakemake", "huggingface_hub": "huggingface_hub", "transformers": "transformers.utils"}


def rows(text: str) -> list[list[str]]:
    """The cells of a page's tables, without heads."""
    found = [re.split(r" \| ", line.strip("| \n")) for line in text.splitlines() if line.startswith("| `")]
    return [row for row in found if row]


def quoted(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def texts(tree: ast.AST) -> set[str]:
    """All strings of a program but docstrings, in which `…` stands for what is put in."""
    said = (ast.Constant, ast.JoinedStr, ast.BinOp)
    alone = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    return {_text(node) for node in ast.walk(tree) if isinstance(node, said) and node not in alone}


def _text(node: ast.AST) -> str:
    if isinstance(node, ast.Constant):
        return re.sub(r"\{[^{}]*\}", ANY, node.value) if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        return "".join(one.value if isinstance(one, ast.Constant) else ANY for one in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _text(node.left) + _text(node.right)
    return ANY


@cache
def messages(folder: Path) -> frozenset[str]:
    files = folder.rglob("*.py")
    return frozenset().union(*(texts(ast.parse(path.read_text(encoding="utf-8"))) for path in files))


def stands_in(quote: str, said: frozenset[str]) -> bool:
    """Whether a string has the words of the quote, in order; between them, where the quote has `…`, anything."""
    pattern = re.compile(".*".join(re.escape(part) for part in quote.split(ANY)), re.DOTALL)
    return any(pattern.search(one) for one in said)


OUR_QUOTES = [quoted(row[0])[0] for row in rows(OURS)]
OTHER_QUOTES = [(row[1], quote) for row in rows(OTHERS) for quote in quoted(row[0])]


def test_the_page_quotes_enough():
    assert len(OUR_QUOTES) == len(set(OUR_QUOTES)) >= 40
    assert len(OTHER_QUOTES) >= 10
    for quote in OUR_QUOTES:
        assert len(re.findall(r"\w", quote)) >= 7, f"{quote}: too little to be looked for"


@pytest.mark.parametrize("quote", OUR_QUOTES)
def test_a_message_of_ours_stands_in_the_code(quote):
    assert stands_in(quote, messages(ROOT / "scripts"))


@pytest.mark.parametrize("program,quote", [one for one in OTHER_QUOTES if one[0] in PACKAGES])
def test_a_message_of_a_package_stands_in_it(program, quote):
    folder = Path(importlib.util.find_spec(PACKAGES[program]).origin).parent
    assert stands_in(quote, messages(folder))


def test_what_nobody_says_is_seen():
    program = '"""no docstring"""\nraise Error(f"{path}: no weights ({kind})" + " of ours", "give some")'
    said = frozenset(texts(ast.parse(program)))
    assert stands_in("…: no weights (…) of ours", said)
    assert not stands_in("…: no weight (…)", said)
    assert not stands_in("no weights of ours", said)
    assert not stands_in("no docstring", said)


@pytest.mark.parametrize("row", rows(PAGE), ids=lambda row: row[0][:40])
def test_a_row_says_why_and_what_to_do(row):
    assert len(row) == (4 if row in rows(OTHERS) else 3)
    assert all(len(cell) > 3 for cell in row)


@pytest.mark.parametrize(
    "key", sorted(set(re.findall(r"`((?:vase|busi|rae|coca|biomedica)\.[a-z_.]+?)(?:=[^`]*)?`", PAGE)))
)
def test_a_key_that_the_page_names_is_one(key):
    from scripts.config import Config, section

    section(Config(), key)
