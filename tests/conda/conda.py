"""A stand-in for `conda`, with the commands that Snakemake calls: a real solve and installation from one channel.

The channel is .venv-conda/channel (channel.py), whatever channels a file names. Pip sections are installed by uv with
hard links from its one cache, since ten environments with CUDA would fill a disk; short ones by the environment's own
pip, as conda does it.
"""

import argparse
import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path

import rattler
import yaml

HERE = Path(__file__).resolve().parent
CHANNEL = Path(sys.prefix) / "channel"
CACHE = Path(sys.prefix) / "packages"  # unpacked packages of the channel
VERSION = "24.7.1"  # the oldest that Snakemake takes
CHANNELS = {"conda-forge", "nodefaults"}
SHORT = 30  # pins up to which a pip section is installed by pip


async def install(specs: list[str], prefix: Path) -> None:
    """Solve `specs` over the channel and install the result.

    Raises:
        rattler.exceptions.SolverError: no packages of the channel answer them.
    """
    found = await rattler.solve(
        [CHANNEL.as_uri()], specs, platforms=["linux-64", "noarch"], virtual_packages=rattler.VirtualPackage.detect()
    )
    await rattler.install(found, prefix, cache_dir=CACHE, show_progress=False)


def install_pip_section(pins: list[str], prefix: Path) -> None:
    """Install a pip section, by pip if it is short, else by uv."""
    requirements = prefix / "conda-meta/pip.txt"
    requirements.write_text("\n".join(pins) + "\n", encoding="utf-8")
    python = f"{prefix}/bin/python"
    if len(pins) <= SHORT:
        command = [python, "-m", "pip", "install", "--quiet", "--requirement", str(requirements)]
    else:
        uv = [f"{sys.prefix}/bin/uv", "pip", "install", "--quiet", "--link-mode", "hardlink"]
        command = [*uv, "--python", python, "--requirement", str(requirements)]
    subprocess.run(command, check=True, env={k: v for k, v in os.environ.items() if not k.startswith("PYTHON")})


def create(file: Path, prefix: Path) -> None:
    """Make the environment of a file."""
    asked = yaml.safe_load(file.read_text(encoding="utf-8"))
    if not set(asked["channels"]) <= CHANNELS:
        sys.exit(f"Error: channels {asked['channels']}, expected some of {sorted(CHANNELS)}")
    specs = [part for part in asked["dependencies"] if isinstance(part, str)]
    pins = [pin for part in asked["dependencies"] if isinstance(part, dict) for pin in part["pip"]]
    asyncio.run(install(specs, prefix))
    if pins:
        install_pip_section(pins, prefix)


def main() -> None:
    words = sys.argv[1:]
    match words:
        case ["--version"]:
            print(f"conda {VERSION}")
        case ["info", "--json"]:
            print(json.dumps({"conda_prefix": str(HERE), "platform": "linux-64", "conda_version": VERSION}))
        case ["config", "--get", "channel_priority", "--json"]:
            print(json.dumps({"get": {"channel_priority": "strict"}}))
        case ["clean", "-y", "--tarballs"]:
            pass  # the channel's packages are the cache
        case ["env", "create", *options]:
            parser = argparse.ArgumentParser(prog="conda env create")
            parser.add_argument("--file", type=Path, required=True)
            parser.add_argument("--prefix", type=Path, required=True)
            parser.add_argument("--quiet", "--no-default-packages", action="store_true")
            asked = parser.parse_args(options)
            create(asked.file, asked.prefix)
        case _:
            sys.exit(f"Error: conda {' '.join(words)} is not among what the tests' conda knows")


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # py-rattler's threads may crash an interpreter that is being taken down
