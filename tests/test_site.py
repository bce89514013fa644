"""The documentation as a site: whole, by itself, and the same as on a code host. Skipped before `make docs`."""

import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

ROOT = Path(__file__).resolve().parents[1]
MKDOCS = ROOT / ".venv-docs/bin/mkdocs"
PAGES = sorted(path for path in (ROOT / "docs").glob("*.md"))
COUNTED = ("table", "tr", "ul", "ol", "li", "pre", "h1", "h2", "h3")

pytestmark = pytest.mark.skipif(not MKDOCS.exists(), reason="no .venv-docs: make docs")


class Page(HTMLParser):
    """What the article of a page holds, and what the whole page loads."""

    def __init__(self, text: str):
        super().__init__()
        self.counts = dict.fromkeys(COUNTED, 0)
        self.loaded: list[str] = []
        self.within = "<article" not in text
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.within = self.within or tag == "article"
        if tag in COUNTED and self.within:
            self.counts[tag] += 1
        if tag in ("script", "img", "iframe", "source") and values.get("src"):
            self.loaded.append(values["src"])
        if tag == "link" and values.get("rel") in ("stylesheet", "preconnect", "icon"):
            self.loaded.append(values["href"])

    def handle_endtag(self, tag):
        if tag == "article":
            self.within = False


def build(root: Path, site: Path) -> subprocess.CompletedProcess:
    command = [MKDOCS, "build", "--config-file", root / "mkdocs.yml", "--site-dir", site]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    done = build(ROOT, folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def copy(tmp_path: Path) -> Path:
    root = tmp_path / "kiln"
    root.mkdir()
    for name in ("docs", "config", "benchmarks", "scripts"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__", "output"))
    for name in ("mkdocs.yml", "CHANGELOG.md", "CONTRIBUTING.md"):
        shutil.copy(ROOT / name, root / name)
    return root


def test_every_page_is_there(site):
    assert {path.stem for path in site.glob("*.html")} >= {path.stem for path in PAGES} | {"benchmarks", "changes"}
    assert not list(site.rglob("hooks.py"))


def test_files_outside_docs_come_along_as_they_are(site):
    for name in ("config/default.yaml", "config/models.csv", "scripts/coca/losses.py"):
        assert (site / "files" / name).read_bytes() == (ROOT / name).read_bytes()
    assert 'href="files/config/default.yaml"' in (site / "configuration.html").read_text()
    assert 'href="benchmarks.html"' in (site / "hardware.html").read_text()


def test_nothing_is_loaded_from_other_hosts(site):
    for path in site.glob("*.html"):
        assert [one for one in Page(path.read_text()).loaded if "//" in one] == [], path.name
    for path in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import )[\"']?https?:", path.read_text()), path.name


@pytest.mark.parametrize("path", [*PAGES, ROOT / "benchmarks/README.md"], ids=lambda path: f"{path.stem}.md")
def test_a_page_has_the_same_lists_tables_and_blocks_as_on_a_code_host(site, path):
    markdown = re.sub(r"<!--.*?-->", "", path.read_text(), flags=re.S)
    host = Page(MarkdownIt("gfm-like", {"linkify": False}).render(markdown)).counts
    own = "benchmarks" if path.stem == "README" else path.stem
    assert Page((site / f"{own}.html").read_text()).counts == host


@pytest.mark.parametrize(
    "text", ["[x](nowhere.md)", "[x](#nowhere)", "[x](vase.md#nowhere)", "[x](../config/nowhere.yaml)"]
)
def test_a_broken_link_fails(tmp_path, text):
    root = copy(tmp_path)
    page = root / "docs/busi.md"
    page.write_text(f"{page.read_text()}\n{text}\n")
    done = build(root, tmp_path / "site")
    assert done.returncode == 1
    assert "nowhere" in done.stdout + done.stderr


def test_a_page_that_the_navigation_lacks_fails(tmp_path):
    root = copy(tmp_path)
    (root / "docs/lonely.md").write_text("# Lonely\n")
    done = build(root, tmp_path / "site")
    assert done.returncode == 1
    assert "lonely.md" in done.stdout + done.stderr
