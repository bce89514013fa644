"""The beginning of a results folder's README.md: what this is, which run made it, how to make and check it again."""

import os
import re
import shlex
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from scripts.common.artefacts import git_commit
from scripts.report.drawn import uses_drawn_data

ROOT = Path(__file__).resolve().parents[2]
DRAWN = (
    "Its data are drawn, its models tiny: the numbers show that every step runs; they compare with no published one."
)
INDEX = "index.html"


def introduction(config: Mapping[str, Any], configfiles: Sequence[Path], argv: Sequence[str]) -> str:
    """Markdown about the run that ends now, in the working directory that it ran in.

    Args:
        config: the resolved configuration.
        configfiles: the files that it was read from.
        argv: the run's command line; one that is not Snakemake's is not quoted.
    """
    results, here = Path(config["results"]), Path.cwd()
    called = "snakemake" in argv[0]
    again = shlex.join(["snakemake", *argv[1:]])
    folder = os.path.relpath(results, ROOT) if here == ROOT else str(results.absolute())
    files = ", ".join(f"`{os.path.relpath(file, here)}`" for file in configfiles) or "the defaults"
    code, when = git_commit() or "of no git repository", time.strftime("%Y-%m-%d at %H:%M")
    page = f"[{INDEX}]({INDEX}): the numbers with their baselines, pictures, time and memory"
    if not (results / INDEX).is_file():
        page = "not made yet; the target `report` makes it"
    made = [name for name in config["pipelines"] if (results / name).is_dir()]
    lines = [
        f"# {results}",
        "",
        f"What Kiln made of its settings. {DRAWN if uses_drawn_data(config) else ''}".rstrip(),
        "",
        f"- front page: {page}",
        f"- last run: ended on {when}, in `{here}`, by code `{code}`",
        f"- pipelines: {', '.join(made) or 'none yet'}",
        f"- settings: {files}; all values, with the defaults: [config.yaml](config.yaml)",
        "",
    ]
    if called:
        lines += [f"To make it again, in `{here}` (what is up to date stays as it is):", "", *_fence(again)]
    lines += [f"To check that every file is as it was made, in `{ROOT}`:", ""]
    return "\n".join(lines + _fence(f"python -m scripts.report.verify_results {shlex.quote(folder)}"))


def _fence(command: str) -> list[str]:
    return ["```bash", command, "```", ""]


def rows_of(tree: str, results: Path, pipelines: Collection[str]) -> str:
    """Markdown without the table's rows for those `pipelines` of which nothing lies in `results`."""
    absent = "|".join(re.escape(name) for name in pipelines if not (results / name).is_dir())
    return re.sub(rf"^\| `(?:{absent})/.*\n", "", tree, flags=re.MULTILINE) if absent else tree
