"""Make a conda channel on this machine: a real CPython 3.11, taken from the one that runs this, and a real pip.

python tests/conda/channel.py FOLDER        (in .venv-conda, whose base interpreter must be a Python 3.11)

So all that environments get of conda itself is the interpreter and pip. The interpreter's shared library stays where
it is: the packages are of use on this machine alone.
"""

import argparse
import asyncio
import hashlib
import importlib.metadata
import io
import json
import os
import shutil
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from rattler.index import index_fs

BASE = Path(sys.base_prefix)
MINOR = "3.11"  # what envs/*.yaml ask for
SKIPPED = {"__pycache__", "test", "idlelib", "turtledemo", "tkinter", "site-packages", "EXTERNALLY-MANAGED"}
SKIPPED_ENDINGS = (".a", ".pyc")


class File(NamedTuple):
    """A file of a package: its place below an environment, and its content or, for a link, what it points to."""

    path: str
    content: bytes = b""
    executable: bool = False
    target: str | None = None


def interpreter() -> Iterator[File]:
    """The files of the base interpreter, without its tests and without what is installed in it."""
    yield File(f"bin/python{MINOR}", (BASE / f"bin/python{MINOR}").read_bytes(), executable=True)
    yield File("bin/python3", target=f"python{MINOR}")
    yield File("bin/python", target=f"python{MINOR}")
    folders = (BASE / f"lib/python{MINOR}", BASE / f"include/python{MINOR}")
    paths = [path for folder in folders for path in sorted(folder.rglob("*"))]
    for path in [*paths, *sorted(BASE.glob("lib/libpython3*.so*"))]:
        place = path.relative_to(BASE)
        if SKIPPED & set(place.parts) or path.suffix in SKIPPED_ENDINGS or path.is_dir():
            continue
        if path.is_symlink():
            yield File(str(place), target=str(path.readlink()))
        else:
            yield File(str(place), path.read_bytes(), executable=bool(path.stat().st_mode & 0o100))


def installed_pip() -> Iterator[File]:
    """The files of this environment's pip, without its programs, which conda makes from their names."""
    for path in importlib.metadata.distribution("pip").files:
        if ".." not in path.parts and path.suffix not in SKIPPED_ENDINGS:
            yield File(f"site-packages/{path}", path.read_binary())


def record(file: File) -> dict:
    """What a package's info/paths.json says of a file; in texts, the interpreter's place becomes the environment's."""
    if file.target is not None:
        return {"_path": file.path, "path_type": "softlink"}
    digest = hashlib.sha256(file.content).hexdigest()
    entry = {"_path": file.path, "path_type": "hardlink", "sha256": digest, "size_in_bytes": len(file.content)}
    if str(BASE).encode() in file.content and b"\0" not in file.content:
        entry |= {"prefix_placeholder": str(BASE), "file_mode": "text"}
    return entry


def write_package(folder: Path, name: str, version: str, files: Iterator[File], needs: tuple[str, ...] = ()) -> None:
    """Write a package below `folder`; one that needs a Python is `noarch`, and its programs are pip's."""
    noarch = bool(needs)
    subdir = "noarch" if noarch else "linux-64"
    held = list(files)
    index = {
        "name": name, "version": version, "build": "0", "build_number": 0, "depends": list(needs), "subdir": subdir,
        "timestamp": 1_700_000_000_000, **({"noarch": "python"} if noarch else {}),
    }  # fmt: skip
    described = {"index.json": index, "paths.json": {"paths": list(map(record, held)), "paths_version": 1}}
    if noarch:
        programs = [f"{program} = pip._internal.cli.main:main" for program in ("pip", "pip3")]
        link = {"noarch": {"type": "python", "entry_points": programs}, "package_metadata_version": 1}
        described["link.json"] = link
    held += [File(f"info/{name}", json.dumps(value).encode()) for name, value in described.items()]
    (folder / subdir).mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / subdir / f"{name}-{version}-0.tar.bz2", "w:bz2", compresslevel=1) as archive:
        for file in held:
            entry = tarfile.TarInfo(file.path)
            entry.mode = 0o755 if file.executable else 0o644
            if file.target is not None:
                entry.type, entry.linkname = tarfile.SYMTYPE, file.target
            entry.size = len(file.content)
            archive.addfile(entry, io.BytesIO(file.content))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the channel, made anew")
    folder = parser.parse_args().folder.resolve()
    version = ".".join(map(str, sys.version_info[:3]))
    if not version.startswith(f"{MINOR}."):
        sys.exit(f"Error: this is Python {version}, expected {MINOR}\nHint: make .venv-conda with python{MINOR}")
    if not (BASE / f"lib/python{MINOR}/os.py").exists() or Path("/usr") == BASE:
        sys.exit(
            f"Error: the Python in {BASE} is the system's, whose packages lie elsewhere than an environment's\n"
            f"Hint: use a Python {MINOR} of its own: pyenv's, or a `python:{MINOR}` container's"
        )
    shutil.rmtree(folder, ignore_errors=True)
    write_package(folder, "python", version, interpreter())
    write_package(folder, "pip", importlib.metadata.version("pip"), installed_pip(), needs=("python >=3.9",))
    asyncio.run(index_fs(folder))


if __name__ == "__main__":
    main()
    os._exit(0)  # py-rattler's threads may crash an interpreter that is being taken down
