"""For the site alone: files outside docs/ that pages link to come along, so that the links of a code host hold there.

Markdown among `PAGES` becomes a page; any other file is copied as it is, below `files/`.
"""

import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
PAGES = {"benchmarks/README.md": "benchmarks.md", "CHANGELOG.md": "changes.md"}
OUTSIDE = re.compile(r"\]\(\.\./([^)#\s]+)")


def _copy(path: str) -> str:
    """Where a file of the repository lies on the site, beside the pages."""
    return PAGES.get(path) or f"files/{path}"


def on_files(files, config):
    """Add the pages from elsewhere, and what pages link to."""
    linked = {path for page in files.documentation_pages() for path in OUTSIDE.findall(page.content_string)}
    for path in sorted(linked | PAGES.keys()):
        if (ROOT / path).is_file():  # what is not there stays a broken link, which fails the build
            files.append(File.generated(config, _copy(path), abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown, page, **_):
    """Links out of docs/ lead to the copies."""
    if page.file.src_uri in PAGES.values():
        return markdown
    return OUTSIDE.sub(lambda link: f"]({_copy(link[1])}", markdown)
