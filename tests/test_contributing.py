"""What contributors and citing users rely on: the hooks before a commit, and CITATION.cff."""

import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
(REPO,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
HOOKS = {hook["id"]: hook for hook in REPO["hooks"]}
CLEAN = {"ruff-check": "scripts/envs.py", "ruff-format": "scripts/envs.py", "snakefmt": "workflow/Snakefile"}
BROKEN = {"ruff-check": ("import os\n", ".py"), "ruff-format": ("x  =  1\n", ".py"), "snakefmt": ("rule  a:\n", ".smk")}
STALE = {"config": ("config/schema.json", "scripts/config.py"), "envs": ("envs/tables.yaml", "requirements.lock")}


def hook(name: str, folder: Path, *files: str) -> subprocess.CompletedProcess:
    """Run a hook as pre-commit would, in a folder that has .venv."""
    command = [*shlex.split(HOOKS[name]["entry"]), *files]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)


def test_hooks_are_local_and_each_is_tried_below():
    assert REPO["repo"] == "local" and set(HOOKS) == {*BROKEN, *STALE}
    for one in HOOKS.values():
        assert one["language"] == "system" and one["entry"].startswith(".venv/bin/") and "rev" not in one


@pytest.mark.parametrize("name", BROKEN)
def test_a_linter_lets_clean_files_pass_and_refuses_others(name, tmp_path):
    done = hook(name, ROOT, CLEAN[name])
    assert done.returncode == 0, done.stdout + done.stderr
    text, ending = BROKEN[name]
    (tmp_path / ".venv").symlink_to(ROOT / ".venv")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / f"broken{ending}").write_text(text)
    assert hook(name, tmp_path, f"broken{ending}").returncode != 0


@pytest.mark.slow
@pytest.mark.parametrize("name", STALE)
def test_generated_files_that_are_stale_are_refused(name, tmp_path):
    generated, source = STALE[name]
    for path in (generated, source):
        assert re.search(HOOKS[name]["files"], path), f"{path} does not call the hook"
    assert hook(name, ROOT).returncode == 0
    for part in ("scripts", "config", "envs", "rules", "docs"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
    for part in ("requirements.lock", "requirements.in", "pyproject.toml"):
        shutil.copy(ROOT / part, tmp_path)
    (tmp_path / ".venv").symlink_to(ROOT / ".venv")
    assert hook(name, tmp_path).returncode == 0
    with (tmp_path / generated).open("a") as handle:
        handle.write("\n# edited by hand\n")
    assert hook(name, tmp_path).returncode != 0


def test_hooks_are_among_what_make_lint_runs():
    lint = (ROOT / "Makefile").read_text().partition("\nlint:")[2].partition("\n\n")[0]
    for one in HOOKS.values():
        program = one["entry"].removeprefix(".venv/bin/").removesuffix(" --force-exclude")
        assert f"$(BIN)/{program}" in lint, program


def test_the_citation_has_this_version_and_what_the_format_asks_for():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert str(cited["version"]) == project["version"] and cited["license"] == project["license"]
    assert {"cff-version", "message", "title", "authors"} <= set(cited)
    pipelines = [one["notes"].removeprefix("pipeline ") for one in cited["references"]]
    assert set(pipelines) == {path.stem for path in (ROOT / "docs").glob("*.md") if _is_pipeline(path)}
    for one in cited["references"]:
        assert {"type", "title", "authors"} <= set(one)
        assert re.fullmatch(r"https://github\.com/[\w-]+/[\w.-]+", one["repository-code"])


def test_every_original_of_the_migration_pages_is_cited_at_the_commit_that_was_read():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())["references"]
    known = {(one["notes"].removeprefix("pipeline "), one["repository-code"], one["commit"]) for one in cited}
    original = re.compile(r"\]\((https://github\.com/[^)]+)\)\s+at\s+([0-9a-f]{7})")
    found = {
        (path.stem, *one)
        for path in (ROOT / "docs/migration").glob("*.md")
        for one in original.findall(path.read_text())
    }
    assert len(found) >= 5 and found <= known


def _is_pipeline(path: Path) -> bool:
    return path.read_text().startswith("# Pipeline ")
