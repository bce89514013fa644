"""A key of an environment file's packages: what reruns its rules when a pin changes, with conda or without."""

import functools
from pathlib import Path

import yaml

from scripts.common.artefacts import sha256_text

UNKEYED = {"python", "pip"}  # an upgrade of Python alone reruns nothing


@functools.cache
def env_key(path: Path) -> str:
    """Hex sha256 over the packages of a conda environment file, conda's and pip's, in any order.

    Raises:
        FileNotFoundError: there is no such file.
    """
    packages: set[str] = set()
    for entry in yaml.safe_load(path.read_text(encoding="utf-8"))["dependencies"]:
        packages.update(entry["pip"] if isinstance(entry, dict) else [entry])
    kept = sorted(one for one in packages if one.split("=")[0].strip() not in UNKEYED)
    return sha256_text(*kept)
