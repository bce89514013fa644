"""The conda environments, one per dependency family: exact pins of the lock, with all that they need.

A family may have pins of its own, envs/<family>.txt, resolved from envs/<family>.in as that file says: packages that
the one environment of demo and tests cannot hold, since they ask for other versions or for a compiler.

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
TABLES = [
    "filelock", "joblib", "numpy", "pandas", "pillow", "pyarrow", "pydantic", "pyyaml", "scipy", "threadpoolctl",
    "tqdm",
]  # fmt: skip
VISION = [
    *TABLES, "accelerate", "huggingface-hub", "matplotlib", "mplfonts", "nvidia-ml-py", "psutil", "safetensors",
    "scikit-learn", "tensorboard", "torch", "torchvision",
]  # fmt: skip
VLM = [*VISION, "bitsandbytes", "peft", "tokenizers", "transformers"]
FAMILIES = {
    "tables": TABLES,
    "vision": VISION,
    "clip": [*VISION, "open-clip-torch"],
    "vlm": VLM,
    "swift": [*VLM, "ms-swift", "msgspec", "open-clip-torch", "qwen-vl-utils", "rapidfuzz", "sacrebleu"],
    "rae": [*VISION, "datasets", "lpips", "timm", "torch-fidelity", "transformers"],
    "coca": [*VISION, "h5py", "rouge-score", "sacrebleu", "tokenizers", "transformers"],
    "streaming": [*VISION, "huggingface-hub", "open-clip-torch", "requests", "webdataset"],
    "deepspeed": VLM,
    "hulumed": [],
    "hulumed_deepspeed": [],
    "retrieve": ["filelock", "hf-xet", "huggingface-hub", "pydantic", "pyyaml", "requests"],
    "report": [
        *TABLES,
        "docutils",
        "fonttools",
        "jinja2",
        "matplotlib",
        "mplfonts",
        "psutil",
        "pygments",
        "rocrate",
        "snakemake",
    ],  # fmt: skip
}


def read_pins(path: Path) -> dict[str, str]:
    """{canonical name: version} of a file of pins, such as requirements.lock."""
    lines = path.read_text(encoding="utf-8").splitlines()
    pins = (line.partition("==") for line in lines if "==" in line and not line.startswith("#"))
    return {canonicalize_name(name): version for name, _, version in pins}


def closure(names: list[str], lock: dict[str, str]) -> dict[str, str]:
    """`names` and all that they require on this platform, as pins {canonical name: version} of the lock.

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
    return {name: lock[name] for name, _ in seen}


def pins_of(family: str, lock: dict[str, str]) -> dict[str, str]:
    """The pins of a family: what it takes from the lock, and its own.

    Raises:
        ValueError: one package has two versions.
    """
    pins, own = closure(FAMILIES[family], lock), ROOT / f"envs/{family}.txt"
    for name, version in (read_pins(own) if own.exists() else {}).items():
        if pins.setdefault(name, version) != version:
            raise ValueError(f"{own} pins {name}=={version}, the lock {pins[name]}: resolve it anew (envs/{family}.in)")
    return pins


def texts() -> dict[Path, str]:
    """{file: text} of all environments."""
    lock = read_pins(ROOT / "requirements.lock")
    made = {}
    for family in FAMILIES:
        pins = "".join(f"      - {name}=={version}\n" for name, version in sorted(pins_of(family, lock).items()))
        own = f", envs/{family}.txt" if (ROOT / f"envs/{family}.txt").exists() else ""
        head = f"# Generated from scripts/envs.py{own} and requirements.lock by `make config`; do not edit.\n"
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
