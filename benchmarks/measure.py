"""What the benchmarks share: clocks, programs in processes of their own, ratios, and the machine's name."""

import argparse
import contextlib
import importlib.metadata
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch

from scripts.common.artefacts import write_json

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")


class Done(NamedTuple):
    """A program's last line of output, read as JSON, its wall time with start and imports, and its peak memory.

    `held` is what all its processes hold together, anonymous or shared among them, as (time.monotonic(), MB) four times
    a second; pages of files, which the kernel drops as it needs, do not count.
    """

    found: Any
    seconds: float
    held: list[tuple[float, float]]

    @property
    def peak_mb(self) -> float:
        """The most that was held."""
        return max(mb for _, mb in self.held)


def processor() -> str:
    """The CPU's name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def facts(args: argparse.Namespace, packages: Sequence[str]) -> dict[str, Any]:
    """What the figures were measured on and with: machine, options, versions."""
    where = processor() if args.device == "cpu" else torch.cuda.get_device_name(args.device)
    found: dict[str, Any] = {"machine": where, "cpu": processor(), "cores": os.cpu_count()}
    found |= {name: str(value) for name, value in vars(args).items()}
    return found | {name: importlib.metadata.version(name) for name in packages}


def run_parts(
    args: argparse.Namespace,
    parts: Mapping[str, Callable[[argparse.Namespace, Path], Any]],
    packages: Sequence[str],
    place: Path | None = None,
) -> None:
    """Run the parts of a benchmark, or `args.only`, each in a new folder, and print and keep what they find.

    Args:
        args: with `only` (name of a part, or None), `output` (file, or None), and what the parts read.
        packages: whose versions are told.
        place: where the folders are made; None: where temporary ones are.
    """
    found = facts(args, packages)
    print(json.dumps(found, indent=1))
    with tempfile.TemporaryDirectory(dir=place) as folder:
        for name in [args.only] if args.only else parts:
            own = Path(folder) / name
            own.mkdir()
            found[name] = parts[name](args, own)
            print(name, json.dumps(found[name], indent=1), flush=True)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        write_json(args.output, found)


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Wall time of one call, with the GPU's queue empty at both ends."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def program(code: str, environment: Mapping[str, str] | None = None, most_seconds: float = math.inf) -> Done:
    """Run Python code in a process of its own; a failure, or more than `most_seconds`, ends the benchmark.

    What was written before is on the disk when it starts, so that no program pays for another's files.
    """
    os.sync()
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as said:
        start = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-c", code], stdout=out, stderr=said, cwd=ROOT, env={**os.environ, **(environment or {})}
        )
        held = []
        while process.poll() is None:
            held.append((time.monotonic(), _held_mb(process.pid)))
            if time.perf_counter() - start > most_seconds:
                process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.25)
        seconds = time.perf_counter() - start
        texts = []
        for stream in (out, said):
            stream.seek(0)
            texts.append(stream.read().decode(errors="replace"))
    if seconds > most_seconds:
        sys.exit(f"a program did not end within {most_seconds:.0f} s:\n{code}\n{texts[1][-3000:]}")
    if process.returncode:
        sys.exit(f"a program failed with status {process.returncode}:\n{code}\n{texts[1][-3000:]}")
    return Done(json.loads(texts[0].strip().splitlines()[-1]), seconds, held)


def _held_mb(pid: int) -> float:
    kilobytes = 0
    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(pid)
        for process in (parent, *parent.children(recursive=True)):
            with contextlib.suppress(OSError):  # it has just ended
                lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
                kilobytes += sum(int(line.split()[1]) for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:")))
    return kilobytes / 1024


def kept_bytes(compute: Callable[[], object], weights: Iterable[torch.Tensor]) -> int:
    """What autograd keeps for the backward pass of `compute`, each storage once, those of `weights` left out."""
    sizes = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = (storage.nbytes(), tensor)  # kept, so that no address is used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        compute()
    left_out = {one.untyped_storage().data_ptr() for one in weights}
    return sum(size for pointer, (size, _) in sizes.items() if pointer not in left_out)


def interleave(ways: Mapping[str, Callable[[], float]], runs: int) -> dict[str, list[float]]:
    """Seconds that each way reports, `runs` times in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for run in range(runs):
        for name, way in ways.items():
            seconds[name].append(way())
        shown = ", ".join(f"{name} {values[-1]:.3g} s" for name, values in seconds.items())
        print(f"run {run + 1} of {runs}: {shown}", file=sys.stderr, flush=True)
    return seconds


def ratio(theirs: Sequence[float], ours: Sequence[float]) -> dict[str, float]:
    """Ratio of the medians, and the smallest and largest of paired runs."""
    paired = [a / b for a, b in zip(theirs, ours, strict=True)]
    return {
        "ratio": statistics.median(theirs) / statistics.median(ours),
        "ratio_min": min(paired),
        "ratio_max": max(paired),
    }
