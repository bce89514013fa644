"""What a log says was wrong: the part of its text that tells it, within bounds and without secrets."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

LINES, WIDTH = 30, 300  # of an excerpt
TAIL_BYTES = 200_000  # of a log that are looked at

OWN_LINE = re.compile(r"^Failed on (\S+?)(?:, Slurm job (\d+))?: peak memory (\d+) MB", re.M)  # of scripts.common.step
TRACEBACK = "Traceback (most recent call last):"
SLURM_SAYS = re.compile(r"^(?:slurmstepd\S*|srun): error: .*", re.M)
_SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSW|API_?KEY|CREDENTIAL", re.I)
_SECRET_TEXT = re.compile(r"\bhf_[A-Za-z0-9]{16,}|(?<=://)[^/@\s:]+:[^/@\s]+(?=@)")


def tail(path: str) -> str:
    """The end of a log's text; empty if it cannot be read."""
    try:
        with Path(path).open("rb") as handle:
            handle.seek(max(0, os.fstat(handle.fileno()).st_size - TAIL_BYTES))
            return handle.read().decode(errors="replace")
    except OSError:  # it may never have been written
        return ""


def excerpt(text: str) -> list[str]:
    """The last thing that a step's log says was wrong: its `Error:` and `Hint:`, or traceback, or last lines."""
    lines = [_plain(line) for line in re.split(r"[\r\n]+", text)]
    lines = [line for line in lines if line.strip() and not OWN_LINE.match(line)]
    for index in range(len(lines) - 1, -1, -1):
        if lines[index].startswith("Error: "):
            end = next((i for i in range(index, len(lines)) if lines[i].startswith("Hint: ")), len(lines) - 1)
            return _bounded(lines[index : end + 1])
        if lines[index].endswith(TRACEBACK):
            trace = _traceback(lines[index:])
            # torchrun's own, which follows that of the process that failed
            if not any("ChildFailedError" in line for line in trace):
                return _bounded(trace)
    return _bounded(lines[-10:])


def _traceback(lines: Sequence[str]) -> list[str]:
    """A traceback from its first line on to the end of the exception's message, as far as that is indented."""
    rank = re.match(r"\[rank\d+\]: ?", lines[0])  # torch's mark of several processes
    inner = [line[len(rank[0]) :] if rank and line.startswith(rank[0]) else line for line in lines]
    end = 1
    while end < len(inner) and inner[end][:1].isspace():
        end += 1
    while end + 1 < len(inner) and inner[end + 1][:1].isspace():
        end += 1
    return list(lines[: end + 1])


def _bounded(lines: Sequence[str]) -> list[str]:
    shown = [line if len(line) <= WIDTH else f"{line[:WIDTH]}..." for line in lines]
    if len(shown) <= LINES:
        return shown
    return [shown[0], f"... {len(shown) - LINES} lines left out ...", *shown[1 - LINES :]]


def _plain(line: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|[\x00-\x08\x0b-\x1f\x7f]", "", line).rstrip()


def slurm_words(text: str) -> list[str]:
    """The last things that Slurm itself wrote into a job's output."""
    return _bounded(list(dict.fromkeys(_plain(line) for line in SLURM_SAYS.findall(text)))[-4:])


def hide_secrets(text: str, environment: Mapping[str, str]) -> str:
    """`text` without the values of tokens and passwords in `environment`, and without what looks like one."""
    for name, value in environment.items():
        if _SECRET_NAME.search(name) and not name.endswith(("_PATH", "_FILE", "_DIR")) and len(value) >= 6:
            text = text.replace(value, "***")
    return _SECRET_TEXT.sub("***", text)
