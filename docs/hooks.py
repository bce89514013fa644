"""For the site alone: files outside docs/ that pages link to come along, so that the links of a code host hold there.

Markdown among `PAGES` becomes a page; any other file is copied as it is, below `files/`.
"""

import os
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    "benchmarks/README.md": "benchmarks.md",
    "CHANGELOG.md": "changes.md",
    "CONTRIBUTING.md": "contributing.md",
    "config/README.md": "config.md",
}
LINK = re.compile(r"\]\((?!\w+:|#)([^)#\s]+)")


def _source(page: str) -> str:
    """The repository's path of a page of the site."""
    return next((source for source, made in PAGES.items() if made == page), f"docs/{page}")


def _target(page: str, link: str) -> str:
    """The repository's path that a link of a page leads to."""
    return os.path.normpath(os.path.join(os.path.dirname(_source(page)), link))


def _place(path: str) -> str:
    """Where a file of the repository lies on the site."""
    return PAGES.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else f"files/{path}")


def on_files(files, config):
    """Add the pages from elsewhere, and what pages link to."""
    for path, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / path)))
    linked = {
        _target(page.src_uri, link)
        for page in files.documentation_pages()
        for link in LINK.findall(page.content_string)
    }
    for path in sorted(linked - PAGES.keys()):
        if not path.startswith("docs/") and (ROOT / path).is_file():  # what is not there stays a broken link: it fails
            files.append(File.generated(config, _place(path), abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown, page, **_):
    """Links lead to where things lie on the site."""
    own = page.file.src_uri
    start = os.path.dirname(own) or "."
    return LINK.sub(lambda link: f"]({os.path.relpath(_place(_target(own, link[1])), start)}", markdown)
