"""The pipeline of docs/add-a-pipeline.md, put into a copy of the project as that page says."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from workflow import copy_checkout, edit, finished, planned, run

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs/add-a-pipeline.md").read_text(encoding="utf-8")


def pieces() -> dict[str, str]:
    """{file: text} of the page's new files: the block after a line that ends with its name and a colon."""
    return dict(re.findall(r"`([\w/.]+)`:\n\n```python\n(.*?)```", PAGE, flags=re.DOTALL))


def edits() -> list[tuple[str, str, str]]:
    """(file, old, new) of the page's diffs: the file is the last that is named before."""
    found = []
    for match in re.finditer(r"```diff\n(.*?)```", PAGE, flags=re.DOTALL):
        lines = match[1].splitlines(keepends=True)
        file = re.findall(r"`(scripts/config\.py|Snakefile)`", PAGE[: match.start()])[-1]
        old = "".join(line[1:] for line in lines if line[0] == " ")
        found.append((file, old, "".join(line[1:] for line in lines)))
    return found


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    folder = copy_checkout(tmp_path_factory.mktemp("kiln"))
    for name, text in pieces().items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    (folder / "scripts/words/__init__.py").touch()
    for file, old, new in edits():
        edit(folder / file, old, new)
    return folder


@pytest.fixture(scope="module")
def made(checkout, tmp_path_factory):
    """A folder where the pipeline ran once."""
    directory = tmp_path_factory.mktemp("run")
    (directory / "data/words").mkdir(parents=True)
    (directory / "data/words/a.txt").write_text("a bird in the hand")
    (directory / "data/words/b.txt").write_text("the bird")
    assert finished(run(checkout, directory, "words").stderr) == {"words_count_words": 1, "words": 1}
    return directory


def test_the_page_has_all_pieces():
    assert set(pieces()) == {"scripts/words/settings.py", "scripts/words/count_words.py", "rules/words.smk"}
    assert [file for file, _, _ in edits()] == ["scripts/config.py"] * 2 + ["Snakefile"]


def test_it_counts(made):
    folder = made / "results/words/count_words"
    counts = pd.read_parquet(folder / "counts.parquet").set_index("word")["count"].to_dict()
    assert counts == {"a": 1, "bird": 2, "hand": 1, "in": 1, "the": 2}
    assert json.loads((folder / "summary.json").read_text()) == {"files": 2, "words": 7}
    assert json.loads((folder / "meta.json").read_text())["settings"] == {"least": 1}


def test_what_reruns(checkout, made):
    job = {"words_count_words": 1, "words": 1}
    assert planned(checkout, made, "words") == {}
    assert planned(checkout, made, "words", "--config", "set=words.count.processes=2") == {}
    assert planned(checkout, made, "words", "--config", "set=words.count.least=3") == job


def test_bad_input_is_told(checkout, tmp_path):
    (tmp_path / "data/words").mkdir(parents=True)
    (tmp_path / "data/words/a.txt").write_bytes(b"\xff\xfe")
    done = run(checkout, tmp_path, "words", check=False)
    assert done.returncode
    assert "a.txt: not UTF-8" in done.stderr
    assert "Hint: save it as UTF-8" in done.stderr
    assert not (tmp_path / "results/words/count_words/counts.parquet").exists()


def test_it_is_formatted_and_lints(checkout):
    new = [checkout / name for name in pieces()]
    smk, python = [p for p in new if p.suffix == ".smk"], [p for p in new if p.suffix == ".py"]
    config = ("--config", ROOT / "pyproject.toml")
    for command in (
        ["ruff", "check", *config, *python],
        ["ruff", "format", "--check", *config, *python],
        ["snakefmt", "--check", *config, *smk],
        ["snakemake", "--snakefile", checkout / "Snakefile", "--lint"],
    ):
        done = subprocess.run(
            [Path(sys.executable).with_name(command[0]), *command[1:]], capture_output=True, text=True, cwd=checkout
        )
        assert done.returncode == 0, done.stdout + done.stderr
