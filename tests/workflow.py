"""Running the real workflow from a copy of the checkout, whose code a test may edit."""

import collections
import contextlib
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from scripts.common import records

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("Snakefile", "rules", "scripts", "envs", "slurm", "config/models.csv", "config/paper_targets.csv",
          "config/paper_costs.csv", "docs/results.md")  # fmt: skip


def copy_checkout(folder: Path) -> Path:
    """A copy of what the workflow needs, without the user's own config.yaml."""
    for name in COPIED:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target, ignore=shutil.ignore_patterns("*.pyc*", "*.tmp"))
        else:
            shutil.copy(ROOT / name, target)
    return folder


def copies(folders: Sequence[Path], place: Path) -> tuple[Path, ...]:
    """Copies of `folders` below `place`, under their own names, as if their results had been made there."""
    made = tuple(Path(shutil.copytree(folder, place / folder.name, symlinks=True)) for folder in folders)
    for one in made:
        with contextlib.chdir(one):
            records.take_over(Path("results"), Path(".snakemake/metadata"))
    return made


def edit(path: Path, old: str, new: str) -> None:
    """Replace the first `old` in a file, which must be there."""
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def command(checkout: Path, directory: Path, *arguments: str) -> list[str]:
    """The command line of Snakemake for a checkout, run in `directory`, which tells of its jobs in full."""
    snakemake = [sys.executable, "-m", "snakemake", "--snakefile", str(checkout / "Snakefile"), "--printshellcmds"]
    return [*snakemake, "--directory", str(directory), "--cores", "2", *arguments]


def run(checkout: Path, directory: Path, *arguments: str, check: bool = True) -> subprocess.CompletedProcess:
    """Run Snakemake from a folder that is neither the checkout nor the run's."""
    done = subprocess.run(
        command(checkout, directory, *arguments), capture_output=True, text=True, cwd=directory.parent, timeout=900
    )
    if check and done.returncode:
        raise AssertionError(f"snakemake failed:\n{(done.stdout + done.stderr)[-6000:]}")
    return done


def planned(checkout: Path, directory: Path, *arguments: str) -> dict[str, int]:
    """{rule: jobs} that a dry run plans; named targets are left out."""
    done = run(checkout, directory, "--dry-run", *arguments)
    return count_jobs(done.stdout + done.stderr)


def count_jobs(text: str) -> dict[str, int]:
    """{rule: jobs} of the first job table in Snakemake's output."""
    jobs: dict[str, int] = collections.Counter()
    _, found, table = text.partition("Job stats:")
    for line in table.splitlines() if found else []:
        if line.startswith("total"):
            break
        if match := re.fullmatch(r"(\w+)\s+(\d+)", line.strip()):
            jobs[match[1]] = int(match[2])
    targets = (
        "all",
        "biomedica",
        "busi",
        "coca",
        "coca_predictions",
        "rae",
        "paper",
        "rae_evaluate_published",
        "report",
        *(f"reproduce_{name}" for name in ("biomedica", "busi", "coca", "rae", "vase")),
        "vase",
        "vase_images",
        "vase_quality",
    )
    return {rule: n for rule, n in jobs.items() if rule not in targets}


def finished(text: str) -> dict[str, int]:
    """{rule: jobs} that Snakemake's output says it finished."""
    return dict(collections.Counter(re.findall(r"Finished jobid: \d+ \(Rule: (\w+)\)", text)))
