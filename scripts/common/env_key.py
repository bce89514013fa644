"""An environment file's packages: a key that reruns its rules when a pin changes, and whether they are these here."""

import functools
import importlib.metadata
from collections.abc import Iterable
from pathlib import Path

import yaml

from scripts.common.artefacts import sha256_text
from scripts.common.errors import KilnError

UNKEYED = {"python", "pip"}  # an upgrade of Python alone reruns nothing


@functools.cache
def env_key(path: Path) -> str:
    """Hex sha256 over the packages of a conda environment file, conda's and pip's, in any order.

    Raises:
        FileNotFoundError: there is no such file.
    """
    return sha256_text(*sorted(one for one in _packages(path) if one.split("=")[0].strip() not in UNKEYED))


def _packages(path: Path) -> set[str]:
    packages: set[str] = set()
    for entry in yaml.safe_load(path.read_text(encoding="utf-8"))["dependencies"]:
        packages.update(entry["pip"] if isinstance(entry, dict) else [entry])
    return packages


def require_majors(wanted: Iterable[tuple[str, Path]]) -> None:
    """Refuse rules whose code needs another major version of a package than this environment has.

    Args:
        wanted: (rule, its environment file).

    Raises:
        KilnError: names such rules, the package, and both versions.
    """
    rules: dict[Path, list[str]] = {}
    for rule, path in sorted(wanted):
        rules.setdefault(path, []).append(rule)
    found = [f"{', '.join(names)}: {apart}" for path, names in rules.items() if (apart := _other_majors(path))]
    if found:
        raise KilnError(
            "; ".join(found),
            "run with --sdm conda, which makes that environment; or choose a model that needs none, for busi: "
            "busi.base.model=qwen2.5-vl-3b-instruct and busi.base.family=qwen",
        )


@functools.cache
def _other_majors(path: Path) -> str:
    found = []
    for name, equals, version in (one.partition("==") for one in sorted(_packages(path))):
        try:
            here = importlib.metadata.version(name) if equals else version
        except importlib.metadata.PackageNotFoundError:
            continue  # the step that imports it says so
        if here.split(".")[0] != version.split(".")[0]:
            found.append(f"{name} {version} (here: {here})")
    return f"made for {path.name} with {', '.join(found)}" if found else ""
