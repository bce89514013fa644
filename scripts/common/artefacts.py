"""Atomic files, and the records beside them: `meta.json` and `files.json`.

A file appears under its final name whole or not at all. Every artefact has a `meta.json` that says
which settings, inputs, code and packages made it, how long that took and what it needed.
"""

import contextlib
import datetime
import errno
import functools
import glob
import hashlib
import importlib.metadata
import json
import os
import platform
import resource
import shutil
import socket
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from scripts.common.errors import KilnError
from scripts.common.file_times import SKEW_SECONDS, refuse_future, seconds_ahead
from scripts.common.heartbeat import seconds_so_far

PACKAGES = (  # those that compute, of all environments
    "accelerate", "bitsandbytes", "datasets", "deepspeed", "h5py", "lpips", "ms-swift", "numpy", "open-clip-torch",
    "pandas", "peft", "pillow", "pyarrow", "qwen-vl-utils", "rapidfuzz", "rouge-score", "sacrebleu", "safetensors",
    "scikit-learn", "scipy", "timm", "tokenizers", "torch", "torch-fidelity", "torchvision", "transformers", "trl",
    "webdataset",
)  # fmt: skip


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary sibling to write to; it becomes `path` when the block ends well, else it is removed.

    Raises:
        KilnError: the disk is full, or the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):  # it is not there, or its folder cannot be entered
            temporary.unlink()
        if isinstance(error, OSError):
            raise explain_os_error(error, path) from error
        raise


def explain_os_error(error: OSError, path: Path) -> Exception:
    """A full disk or a read-only folder as a `KilnError`; any other error as it is."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = shutil.disk_usage(_existing(path)).free
        return KilnError(
            f"{path}: the disk is full ({free / 1e6:.0f} MB free)",
            "free space or point `results` at another disk; nothing half-written was left, so run again",
        )
    if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
        return KilnError(
            f"{path}: cannot be written ({error.strerror})",
            "make the results folder writable, or set `results` to a folder that is",
        )
    return error


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path


def _sync(path: Path) -> None:
    with path.open("rb") as handle:
        os.fsync(handle.fileno())


def write_text(path: Path, text: str) -> None:
    """`text` as UTF-8, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Indented JSON with a final newline, atomically, never whole in memory; NaN is refused."""
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.writelines(json.JSONEncoder(indent=2, ensure_ascii=False, allow_nan=False).iterencode(value))
        file.write("\n")


def read_json(path: Path) -> Any:
    """The JSON in `path`.

    Raises:
        KilnError: the file is missing or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise KilnError(f"{path}: no such file", "run the rule that makes it") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise KilnError(f"{path}: not JSON: {error}", "delete it and run again, or mend it") from None


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def sha256_text(*parts: str) -> str:
    """Hex sha256 over texts, each ended by a zero byte so that parts cannot run together."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()


@contextlib.contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder that replaces `folder` when the block ends well.

    Readers see the old folder or the new one, but for the instant between two renames. `folder` has one writer at a
    time, so what another left, killed before it could remove it, goes.
    """
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        for left in folder.parent.glob(f".{glob.escape(folder.name)}.*.tmp"):
            shutil.rmtree(left, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
        shutil.rmtree(old, ignore_errors=True)
        if os.path.lexists(folder):
            os.rename(folder, old)
        try:
            os.rename(temporary, folder)
        except OSError:
            if os.path.lexists(old):
                os.rename(old, folder)
            raise
        if old.is_symlink():
            old.unlink()
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise explain_os_error(error, folder) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def link_folder(folder: Path, links: Mapping[str, Path], records: Mapping[str, Mapping] | None = None) -> None:
    """Replace `folder` by relative symbolic links {name in it: target}, and a `files.json` of them.

    A name may hold subfolders; targets are never copied. `records` gives what `files.json` says of
    each name (bytes, sha256), taken from a manifest so that nothing is read again.
    """
    link_rows(folder, ((name, links[name], (records or {}).get(name, {})) for name in sorted(links)))


def link_rows(folder: Path, rows: Iterable[tuple[str, Path | str, Mapping]]) -> None:
    """`link_folder` of (name, target, record), in order of name; memory does not grow with their number."""
    final = folder.parent.resolve() / folder.name  # the folder itself is replaced, even where it is a link
    before = str(folder) if folder.is_dir() and not folder.is_symlink() else None
    with atomic_folder(folder) as temporary, (temporary / "files.json").open("w", encoding="utf-8") as listing:
        way = functools.cache(lambda above, place: os.path.relpath(above, os.path.normpath(f"{final}/{place}")))
        made, between = set(), "\n"
        listing.write("{")
        for name, target, record in rows:
            if name == "files.json":
                raise ValueError("files.json is the listing's own name")
            place = os.path.dirname(name)
            if place not in made:
                (temporary / place).mkdir(parents=True, exist_ok=True)
                made.add(place)
            above, file = os.path.split(os.path.abspath(target))
            leads_to = os.path.normpath(f"{way(above, place)}/{file}")
            _link(leads_to, f"{temporary}/{name}", before and f"{before}/{name}")
            # json itself writes indented text ten times as slowly
            lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in record.items())
            listing.write(f"{between} {json.dumps(name)}: " + (f"{{\n{lines}\n }}" if lines else "{}"))
            between = ",\n"
        listing.write("}\n" if between == "\n" else "\n}\n")


def _link(leads_to: str, place: str, before: str | None) -> None:
    """A symbolic link at `place`: that at `before` if it leads there too, since disks are slow to find new inodes."""
    try:
        if before and os.readlink(before) == leads_to:
            os.link(before, place, follow_symlinks=False)
            return
    except OSError as error:  # none was there, or this disk has no second names of links
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
    os.symlink(leads_to, place)


def describe_files(paths: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """{name: {bytes, sha256}} of finished files."""
    return {p.name: {"bytes": p.stat().st_size, "sha256": sha256_file(p)} for p in paths}


def write_listing(folder: Path) -> list[Path]:
    """Write `files.json` of all files below `folder`, by their relative paths; those files, sorted."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    listing = {str(p.relative_to(folder)): {"bytes": p.stat().st_size, "sha256": sha256_file(p)} for p in files}
    (folder / "files.json").write_text(json.dumps(listing, indent=1) + "\n", encoding="utf-8")
    return files


def record_of(path: Path) -> tuple[dict[str, Any], int] | None:
    """{bytes, sha256} of `path` as the step that made it recorded them, and the mtime of that record in ns; or None."""
    for meta in (path.with_name(f"{path.stem}.meta.json"), path.with_name("meta.json")):
        try:
            record = json.loads(meta.read_text(encoding="utf-8"))["outputs"][path.name]
            return {"bytes": record["bytes"], "sha256": record["sha256"]}, meta.stat().st_mtime_ns
        except (OSError, ValueError, KeyError, TypeError):
            continue  # none, or a meta.json that is not of ours
    return None


def recorded_hash(path: Path) -> str | None:
    """The sha256 of `path` as the step that made it recorded it, without reading `path` again.

    None if there is no record, or if `path` has another size or is younger than its record.
    """
    facts, found = path.stat(), record_of(path)
    if found and found[0]["bytes"] == facts.st_size and found[1] >= facts.st_mtime_ns:
        return found[0]["sha256"]
    return None


def input_hash(path: Path) -> str:
    """The recorded sha256 of an upstream artefact, else that of the file's bytes."""
    return recorded_hash(path) or sha256_file(path)


def git_commit() -> str | None:
    """Commit of this checkout, with `-dirty` when it has changes; None outside git."""
    root = Path(__file__).resolve().parents[2]
    command = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def package_versions() -> dict[str, str]:
    """Installed versions of the packages that decide numbers; absent ones are left out."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def _hardware() -> dict[str, Any]:
    facts: dict[str, Any] = {"host": socket.gethostname(), "machine": platform.machine(), "cpus": os.cpu_count()}
    torch = _loaded_torch()
    if torch is not None:
        facts["threads"] = torch.get_num_threads()
        if torch.cuda.is_available():
            facts["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return facts


def _loaded_torch():
    import sys

    return sys.modules.get("torch")  # a step without torch must not import it to be described


class Record:
    """The `meta.json` of one run of a step, started when the step starts and written last.

    Args:
        step: dotted name of the step.
        settings: the numerics that it ran with.
        inputs: {name: path}; each is recorded with its upstream hash.
        code: code key of the step.

    Raises:
        KilnError: an input lies in the future, so that Snakemake would refuse what is made from it, at the end.
    """

    def __init__(self, step: str, settings: Mapping[str, Any], inputs: Mapping[str, Path], code: str):
        self.started = time.time()
        self.clock = time.monotonic()
        self.facts: dict[str, Any] = {}
        self.step, self.settings, self.code = step, dict(settings), code
        for path in inputs.values():
            refuse_future(path)
        self.inputs = {name: {"path": str(p), "sha256": input_hash(p)} for name, p in inputs.items()}
        self.earlier_seconds = 0.0

    def carries_on(self, state: Path) -> None:
        """Count what earlier attempts at this training took; to be called before it trains.

        Args:
            state: its state folder, by fingerprint.
        """
        self.earlier_seconds = seconds_so_far(state)

    def write(self, meta: Path, outputs: Iterable[Path], items: int | None = None) -> None:
        """Write `meta` for the finished `outputs`; `items` gives a throughput in items per second."""
        seconds = self.earlier_seconds + time.monotonic() - self.clock
        self._wait_for_clock()
        self_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        child_kb = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
        torch = _loaded_torch()
        cuda = torch is not None and torch.cuda.is_available()
        write_json(
            meta,
            {
                "step": self.step,
                "settings": self.settings,
                "inputs": self.inputs,
                "outputs": describe_files(outputs),
                "code": self.code,
                "git_commit": git_commit(),
                "packages": package_versions(),
                "hardware": _hardware(),
                "started": datetime.datetime.fromtimestamp(self.started, datetime.UTC).isoformat(),
                "wall_seconds": round(seconds, 3),
                "processes": int(os.environ.get("WORLD_SIZE", 1)),
                "peak_rss_mb": round(max(self_kb, child_kb) / 1024, 1),
                "peak_vram_mb": round(torch.cuda.max_memory_allocated() / 2**20, 1) if cuda else None,
                "items": items,
                "items_per_second": round(items / seconds, 2) if items and seconds else None,
                **self.facts,
            },
        )

    def _wait_for_clock(self) -> None:
        """A machine's clock may be behind another's: wait until what is made here is younger than its inputs."""
        ahead = [
            seconds_ahead(path) for path in map(Path, (one["path"] for one in self.inputs.values())) if path.exists()
        ]
        time.sleep(min(SKEW_SECONDS, max([0.0, *ahead])))
