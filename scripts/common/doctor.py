"""Say what this machine has and what Kiln needs, a line each.

The exit status is 1 if something is broken that every pipeline needs (a FAIL line), else 0. Nothing is
changed, and no token or password is read or shown.
"""

import argparse
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from scripts.common.errors import KilnError

ROOT = Path(__file__).resolve().parents[2]
OK, WARN, FAIL = "ok", "warn", "FAIL"

MAIN_PACKAGES = (
    *("snakemake", "snakemake-executor-plugin-slurm", "torch", "torchvision", "transformers", "peft", "trl"),
    *("ms-swift", "open-clip-torch", "timm", "datasets", "huggingface-hub", "webdataset", "safetensors"),
    *("numpy", "pandas", "pyarrow", "h5py", "pillow", "pydantic"),
)
MIN_PYTHON = (3, 11)
MIN_DRIVER = 580  # the locked torch is built for CUDA 13, whose toolkit ships with R580
MIN_CONDA = (24, 7, 1)  # Snakemake 9 refuses older ones
LOW_DISK_GB = 20
HUB_SECONDS = 4.0
RULES_SHOWN = 6


class Line(NamedTuple):
    """One finding: its mark (ok, warn or FAIL), what it is about, and what was found."""

    mark: str
    about: str
    found: str


def require_conda() -> None:
    """Refuse to make environments without the command that makes them.

    Raises:
        KilnError: there is no `conda` among the commands.
    """
    if shutil.which("conda") is None:
        raise KilnError(
            "environments of rules are made by conda, and there is no command `conda`",
            "put conda's folder on PATH (`module load` it, or install Miniforge); or have all rules but Hulu-Med's "
            "use this environment: delete `software-deployment-method` from slurm/config.yaml, leave out --sdm",
        )


def main(argv: Sequence[str] | None = None) -> None:
    """Print all lines; ends in `SystemExit` with 1 if one of them is a FAIL."""
    parser = argparse.ArgumentParser(prog="python -m scripts.common.doctor", description=__doc__)
    parser.add_argument("--lock", type=Path, default=ROOT / "requirements.lock", help="versions to compare with")
    parser.add_argument("--results", type=Path, default=ROOT / "results", help="where results will go")
    args = parser.parse_args(argv)
    failed = 0
    for mark, about, found in examine(args.lock, args.results):
        print(f"{mark:<4}  {about:<32}{found}", flush=True)
        failed += mark == FAIL
    if failed:
        print(f"\n{failed} thing(s) to mend: `make demo` installs the locked environment")
    sys.exit(1 if failed else 0)


def examine(lock: Path, results: Path) -> Iterator[Line]:
    """All findings, in the order of printing; slow ones last."""
    yield python()
    yield from packages(lock)
    yield from gpus()
    yield Line(OK, "CPU cores", f"{len(os.sched_getaffinity(0))} usable of {os.cpu_count()}")
    yield memory()
    yield disk("disk for results", results)
    yield disk("disk for models (HF_HOME)", hf_home())
    yield conda()
    yield slurm()
    yield hub()


def python() -> Line:
    """The interpreter."""
    wanted = ".".join(map(str, MIN_PYTHON))
    if sys.version_info < MIN_PYTHON:
        return Line(FAIL, "python", f"{platform.python_version()}; Kiln needs {wanted} or newer")
    return Line(OK, "python", f"{platform.python_version()} at {sys.executable}")


def packages(lock: Path) -> Iterator[Line]:
    """The main packages against the lock file, a line each, and all others in one."""
    try:
        lines = lock.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        yield Line(FAIL, "packages", f"{lock} cannot be read ({error.strerror})")
        return
    locked = dict(re.findall(r"^([A-Za-z0-9._-]+)==([^\s;#]+)", "\n".join(lines), flags=re.MULTILINE))
    for name in MAIN_PACKAGES:
        yield package(name, locked.pop(name, None))
    others = {name: package(name, version) for name, version in locked.items()}
    wrong = [name for name, line in others.items() if line.mark != OK]
    if wrong:
        shown = ", ".join(wrong[:6]) + (", ..." if len(wrong) > 6 else "")
        yield Line(WARN, "other packages", f"{len(wrong)} of {len(others)} are missing or differ: {shown}")
    else:
        yield Line(OK, "other packages", f"all {len(others)} as locked")


def package(name: str, locked: str | None) -> Line:
    """One package; a build's suffix such as `+cu130` is no difference."""
    try:
        installed = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Line(FAIL, name, f"missing; locked is {locked or 'no version'}")
    if locked is None:
        return Line(WARN, name, f"{installed}; the lock file does not list it")
    if installed.split("+")[0] != locked.split("+")[0]:
        return Line(FAIL, name, f"{installed} differs; locked is {locked}")
    return Line(OK, name, installed)


def gpus() -> Iterator[Line]:
    """The NVIDIA driver, and each GPU with its memory."""
    try:
        import pynvml
    except ImportError:
        yield Line(FAIL, "nvidia-ml-py", "missing, so GPUs cannot be seen")
        return
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        yield Line(WARN, "NVIDIA driver", f"none ({error})")
        yield Line(WARN, "GPU", "none: everything runs on the CPU, which is enough for the demo")
        return
    try:
        yield driver(_text(pynvml.nvmlSystemGetDriverVersion()))
        count = pynvml.nvmlDeviceGetCount()
        for index in range(count):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            info = pynvml.nvmlDeviceGetMemoryInfo(handle)
            name = _text(pynvml.nvmlDeviceGetName(handle))
            yield Line(OK, f"GPU {index}", f"{name}, {info.free / 1e9:.1f} of {info.total / 1e9:.1f} GB free")
        if not count:
            yield Line(WARN, "GPU", "none: everything runs on the CPU, which is enough for the demo")
    except pynvml.NVMLError as error:
        yield Line(WARN, "GPU", f"the driver answers with an error ({error})")
    finally:
        pynvml.nvmlShutdown()


def advise_on_gpus(rules: Sequence[str], device: str, say: Callable[[str], None]) -> None:
    """Say so if `rules`, most telling ones first, ask for a GPU, and steps on this machine would see none.

    Args:
        device: as the configuration has it.
    """
    if not rules or sees_gpu():
        return
    shown = ", ".join(rules[:RULES_SHOWN]) + (f" and {len(rules) - RULES_SHOWN} more" * (len(rules) > RULES_SHOWN))
    would = "run on its CPU, many times slower" if device == "auto" else f"fail, for device = {device}"
    say(
        f"no GPU is seen on this machine: {shown} ask for one, and would {would}\n"
        "Hint: run where GPUs are, as by `--profile slurm` on a cluster; if its CPU is meant, set device=cpu "
        "(config/demo.yaml is of a size for that); `make doctor` says what this machine has"
    )


def sees_gpu() -> bool:
    """Whether a step on this machine would see an NVIDIA GPU; true as well where that cannot be told."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is not None and listed.strip() in ("", "-1", "NoDevFiles"):
        return False
    try:
        import pynvml
    except ImportError:
        return True
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return False
    try:
        return pynvml.nvmlDeviceGetCount() > 0
    except pynvml.NVMLError:
        return True
    finally:
        pynvml.nvmlShutdown()


def driver(version: str) -> Line:
    """The driver, and whether the locked torch can use it."""
    if int(version.split(".")[0]) < MIN_DRIVER:
        found = f"{version} is too old for torch's CUDA 13 wheels: install R{MIN_DRIVER} or newer"
        return Line(WARN, "NVIDIA driver", found)
    return Line(OK, "NVIDIA driver", version)


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value  # bytes in older nvidia-ml-py


def memory() -> Line:
    """The machine's RAM."""
    try:
        import psutil
    except ImportError:
        return Line(FAIL, "psutil", "missing, so memory cannot be measured")
    info = psutil.virtual_memory()
    return Line(OK, "RAM", f"{info.available / 1e9:.1f} of {info.total / 1e9:.1f} GB available")


def disk(about: str, folder: Path) -> Line:
    """Free space where `folder` is, or will be."""
    place = folder.absolute()
    try:
        while not place.exists():
            place = place.parent
        free = shutil.disk_usage(place).free / 1e9
    except OSError as error:
        return Line(FAIL, about, f"{folder} cannot be reached ({error.strerror})")
    if not os.access(place, os.W_OK):
        return Line(FAIL, about, f"{folder} cannot be written: {place} is read-only for this user")
    low = free < LOW_DISK_GB
    advice = f"; real runs want more than {LOW_DISK_GB} GB" if low else ""
    return Line(WARN if low else OK, about, f"{free:.1f} GB free at {folder}{advice}")


def hf_home() -> Path:
    """Where huggingface_hub keeps models, by its own rules."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("HF_HOME") or f"{cache}/huggingface").expanduser()


def conda() -> Line:
    """The `conda` command, which Snakemake calls to make environments."""
    version = _version("conda")
    need = "`--profile slurm` makes its environments with conda {}.{}.{} or newer".format(*MIN_CONDA)
    if version is None and shutil.which("sbatch"):
        return Line(WARN, "conda", f"not found; {need}")
    if version is None:
        return Line(OK, "conda", f"not here, nor needed here; {need}")
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:3])
    if numbers < MIN_CONDA:
        return Line(WARN, "conda", f"{version} is too old; {need}")
    return Line(OK, "conda", version)


def slurm() -> Line:
    """The Slurm commands that the profile calls."""
    commands = ("sbatch", "squeue", "scancel", "sinfo")
    missing = [name for name in commands if shutil.which(name) is None]
    if len(missing) == len(commands):
        return Line(OK, "Slurm", "not here, nor needed here; `--profile slurm` is for a cluster's login node")
    if missing:
        return Line(WARN, "Slurm", f"missing: {', '.join(missing)}; `--profile slurm` calls them")
    version = _version("sbatch")
    if version in (None, SILENT):
        return Line(WARN, "Slurm", "`sbatch --version` says nothing; `--profile slurm` calls it")
    return Line(OK, "Slurm", version)


SILENT = "0 (does not answer)"  # as a version: older than any


def _version(command: str) -> str | None:
    if shutil.which(command) is None:
        return None
    try:
        ran = subprocess.run([command, "--version"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return SILENT
    return ran.stdout.strip().splitlines()[0] if ran.stdout.strip() else SILENT


def hub() -> Line:
    """Whether the model hub can be reached; without it, everything that is retrieved already still runs."""
    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    try:
        parts = urllib.parse.urlsplit(endpoint)
    except ValueError:
        return Line(WARN, "model hub", "HF_ENDPOINT is no valid address")
    shown = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"  # a mirror's address may hold a password
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return Line(OK, "model hub", f"{shown} not asked: HF_HUB_OFFLINE is set")
    answers: list[str] = []
    # In a thread, because a look-up of the host's name knows no timeout.
    asking = threading.Thread(target=lambda: answers.append(_ask(endpoint)), daemon=True)
    asking.start()
    asking.join(HUB_SECONDS + 1)
    answer = answers[0] if answers else "no answer in time"
    if not answer:
        return Line(OK, "model hub", f"{shown} answers")
    return Line(WARN, "model hub", f"{shown} cannot be reached ({answer}): only `retrieve_*` rules need it")


def _ask(endpoint: str) -> str:
    try:
        request = urllib.request.Request(endpoint, method="HEAD", headers={"User-Agent": "kiln-doctor"})
        with urllib.request.urlopen(request, timeout=HUB_SECONDS):
            return ""
    except urllib.error.HTTPError as error:
        # Refusals count as answers of the hub itself, but a proxy's or a broken server's do not.
        return "" if error.code in (401, 404, 405) else f"HTTP {error.code}"
    except Exception as error:  # its text may hold the address of a proxy with a password, so only its kind is told
        return type(getattr(error, "reason", error)).__name__


if __name__ == "__main__":
    main()
