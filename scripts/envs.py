"""The conda environments, one per dependency family: exact pins of the lock, with all that they need.

python -m scripts.envs --write    makes envs/*.yaml anew (run in the locked environment)
python -m scripts.envs --check    fails when one is stale
"""

import argparse
import importlib.metadata
import sys
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
TABLES = ["filelock", "joblib", "numpy", "pandas", "pillow", "pyarrow", "pydantic", "pyyaml", "scipy", "tqdm"]
VISION = [
    *TABLES, "accelerate", "huggingface-hub", "matplotlib", "mplfonts", "nvidia-ml-py", "psutil", "safetensors",
    "scikit-learn", "tensorboard", "torch", "torchvision",
]  # fmt: skip
FAMILIES = {
    "tables": TABLES,
    "vision": VISION,
    "clip": [*VISION, "open-clip-torch"],
    "retrieve": ["filelock", "hf-xet", "huggingface-hub", "pydantic", "pyyaml", "requests"],
    "report": [*TABLES, "pygments", "snakemake"],
}


def read_lock() -> dict[str, str]:
    """{canonical name: version} of requirements.lock."""
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    pins = (line.partition("==") for line in lines if "==" in line and not line.startswith("#"))
    return {canonicalize_name(name): version for name, _, version in pins}


def closure(names: list[str], lock: dict[str, str]) -> list[str]:
    """`names` and all that they require on this platform, as sorted pins of the lock.

    Raises:
        KeyError: a package is not in the lock.
    """
    seen: set[tuple[str, str]] = set()
    todo = [(canonicalize_name(name), "") for name in names]
    while todo:
        name, extra = todo.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        for text in importlib.metadata.requires(name) or []:
            need = Requirement(text)
            if need.marker is None or need.marker.evaluate({"extra": extra}):
                wanted = canonicalize_name(need.name)
                todo += [(wanted, one) for one in ("", *need.extras)]
    return [f"{name}=={lock[name]}" for name in sorted({name for name, _ in seen})]


def texts() -> dict[Path, str]:
    """{file: text} of all environments."""
    lock = read_lock()
    made = {}
    for family, names in FAMILIES.items():
        pins = "".join(f"      - {pin}\n" for pin in closure(names, lock))
        head = "# Generated from scripts/envs.py and requirements.lock by `make config`; do not edit.\n"
        channels = "channels:\n  - conda-forge\n  - nodefaults\n"
        made[ROOT / f"envs/{family}.yaml"] = (
            f"{head}{channels}dependencies:\n  - python=3.11\n  - pip\n  - pip:\n{pins}"
        )
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    choice = parser.add_mutually_exclusive_group(required=True)
    choice.add_argument("--write", action="store_true", help="write envs/*.yaml")
    choice.add_argument("--check", action="store_true", help="fail when one is stale")
    if parser.parse_args().write:
        for path, text in texts().items():
            path.write_text(text, encoding="utf-8")
        return
    stale = [path for path, text in texts().items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    if stale:
        names = ", ".join(path.name for path in stale)
        sys.exit(f"Error: stale in envs/: {names}\nHint: run `make config`")


if __name__ == "__main__":
    main()
