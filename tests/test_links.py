"""Every link between files of the project leads to a file, and to a heading of it, as a code host reads them."""

import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(path for place in (".", "docs", "benchmarks") for path in (ROOT / place).glob("*.md"))
LINK = re.compile(r"(?<!\\)\]\(([^()\s]+)\)")


def prose(text: str) -> str:
    """Without blocks of code, whose lines are no headings and no links."""
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


@cache
def anchors(path: Path) -> set[str]:
    """Anchors of a page's headings: lower case, hyphens for spaces, no punctuation; a number for what comes again."""
    found: dict[str, int] = {}
    for heading in re.findall(r"^#+ +(.+)$", prose(path.read_text(encoding="utf-8")), flags=re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        found[slug] = found.get(slug, -1) + 1
    return {f"{slug}-{n}" if n else slug for slug, most in found.items() for n in range(most + 1)}


def broken(page: Path) -> list[str]:
    """Links of a page that lead nowhere."""
    found = []
    for link in LINK.findall(prose(page.read_text(encoding="utf-8"))):
        path, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", link):
            continue
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            found.append(link)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_link_leads_nowhere(page):
    assert broken(page) == []


def test_a_broken_link_is_seen(tmp_path):
    (tmp_path / "a.md").write_text(
        "# One, two\n\n## One, two\n\n[a](b.md) [b](#one-two-1) [c](#two) [d](a.md#one-two)\n"
    )
    assert broken(tmp_path / "a.md") == ["b.md", "#two"]
