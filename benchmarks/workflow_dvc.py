"""DVC, from an environment of its own (`make dvc`), on the same files."""

import os
from pathlib import Path

from benchmarks.workflow_runs import ROOT, Run, program

DVC = ROOT / ".venv-dvc/bin/dvc"
STAGE = "stages:\n  list:\n    cmd: find data -type f | sort > listed.txt\n    deps: [data]\n    outs: [listed.txt]\n"


def run(folder: Path, *arguments: str) -> Run:
    """A command of DVC in its repository."""
    return program([str(DVC), *arguments], folder)


def prepare(data: Path, folder: Path) -> None:
    """A repository with a copy of `data` that is tracked nowhere yet, and one stage that reads it."""
    folder.mkdir()
    run(folder, "init", "--no-scm", "--quiet")
    run(folder, "config", "core.analytics", "false")
    (folder / "dvc.yaml").write_text(STAGE)
    follow(data, folder)


def follow(data: Path, folder: Path) -> None:
    """Link what `data` has and the repository has not."""
    for path in (p for p in data.rglob("*") if p.is_file()):
        link = folder / "data" / path.relative_to(data)
        if not link.exists():
            link.parent.mkdir(parents=True, exist_ok=True)
            os.link(path, link)
