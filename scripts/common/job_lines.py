"""Snakemake's terminal output as one line for each finished job; its log file keeps all that it says.

`show` changes how Snakemake's own terminal handler filters and words records. A logger plugin would have to be an
installed package, and a handler of our own would have to know which messages of Snakemake's users must not miss.
"""

import logging
import re
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from scripts.common import heartbeat, progress, status
from scripts.common.artefacts import read_json

STREAM = "DefaultStreamHandler"  # Snakemake's name of its terminal handler; a plugin that writes there replaces it
METRICS_SHOWN = 2
FIRST_SILENCE, LONGEST_SILENCE = 60, 1800  # seconds after which the running jobs are named; doubles while nothing ends

COMMAND_FAILED = re.compile(r"CalledProcessError in file .*\n.*returned non-zero exit status", re.DOTALL)
_EVENTS = {"workflow_started", "resources_info", "shellcmd", "job_started", "group_info", "progress"}
_MESSAGES = (
    "Assuming unrestricted shared filesystem",
    "Building DAG of jobs",
    "Conda environments: ignored",
    "DAG of jobs will be updated",
    "Execute ",
    "Group jobs: inactive",
    "Select jobs to execute",
    "Service job ",
    "Singularity containers: ignored",
    "Terminating service job",
    "Updating checkpoint dependencies",
    "Using shell:",
    "Waiting at most ",
)


class Lines(logging.Formatter):
    """Formatter and filter of a terminal handler.

    Args:
        inner: words what is not a job that begins or ends, such as errors.
        total: number of jobs of this run, which may grow.
        applies: whether this run is one to be calm about; else everything is left as it is.
        results: folder of logs/ and state/, where a training's heartbeats lie as its log does.
    """

    def __init__(
        self, inner: logging.Formatter, total: Callable[[], int], applies: Callable[[], bool], results: Path
    ) -> None:
        super().__init__()
        self._results = results
        self._inner, self._total, self._applies = inner, total, applies
        self._running: dict[int, tuple[float, dict[str, Any]]] = {}
        self._done = 0
        self._spoke = threading.Event()

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the terminal shows a record; jobs that begin are noted and not shown."""
        if not self._applies():
            return True
        facts, event = vars(record), _event(record)
        if event == "job_info":
            self._running[facts["jobid"]] = record.created, facts
            return False
        if record.levelno > logging.INFO:
            # a step's whole command, which the report at the end of the run has, too
            return not (event == "error" and COMMAND_FAILED.search(record.getMessage()))
        return event not in _EVENTS and not str(record.msg).startswith(_MESSAGES)

    def format(self, record: logging.LogRecord) -> str:
        """One line for a finished job and for the plan; all else as Snakemake words it."""
        event = _event(record)
        if self._applies() and event == "job_finished":
            self._spoke.set()
            return self._finished(record)
        if self._applies() and event == "job_error" and vars(record)["jobid"] in self._running:
            self._spoke.set()
            return self._failed(record)
        if self._applies() and event == "run_info":
            return f"Jobs: {self._total()}. --printshellcmds shows each in full, as Snakemake's log file does."
        return self._inner.format(record)

    def _finished(self, record: logging.LogRecord) -> str:
        started, facts = self._running.pop(vars(record)["job_id"], (record.created, {}))
        self._done += 1
        total = str(self._total())
        result = outcome(facts.get("output") or [])
        line = f"{self._done:>{len(total)}}/{total} {duration(record.created - started):>8}  {_what(facts, record)}"
        return f"{line} -> {result}" if result else line

    def _failed(self, record: logging.LogRecord) -> str:
        started, facts = self._running.pop(vars(record)["jobid"])
        logs = ", ".join(map(str, vars(record).get("log") or []))
        line = f" FAILED {duration(record.created - started):>6}  {_what(facts, record)}"
        return f"{line} -> see {logs}" if logs else line

    def running(self) -> str:
        """The jobs that run, each with its duration and how far its log or heartbeat says it is."""
        now, jobs = time.time(), list(self._running.values())
        return ", ".join(f"{facts['rule_name']} ({self._so_far(started, now, facts)})" for started, facts in jobs)

    def _so_far(self, started: float, now: float, facts: dict[str, Any]) -> str:
        logs = [Path(path) for path in facts.get("log") or []]
        told = [_trained(self._results, path, started) or progress.last(path) for path in logs]
        return ", ".join([duration(now - started), *filter(None, told)])

    def name_running(self, say: Callable[[str], None]) -> None:
        """Never return, and name the running jobs after each silence; for a daemon thread."""
        silence = FIRST_SILENCE
        while True:
            if self._spoke.wait(silence):
                self._spoke.clear()
                silence = FIRST_SILENCE
            elif jobs := self.running():
                say(f"running: {jobs}")
                silence = min(2 * silence, LONGEST_SILENCE)


def _what(facts: dict[str, Any], record: logging.LogRecord) -> str:
    name = facts.get("rule_name", str(record.msg))
    return f"{name}: {facts['rule_msg']}" if facts.get("rule_msg") else name


def _trained(results: Path, log: Path, since: float) -> str:
    """How far the training of a log is, by its newest heartbeat, if that is not older than `since`; else empty."""
    try:
        state = results / "state" / log.relative_to(results / "logs").with_suffix("")
        found = [read_json(path) for path in state.glob(f"*/{heartbeat.NAME}")]
        told = max((one for one in found if one["updated"] >= since), key=lambda one: one["updated"])
        steps = f"step {told['step']:,}" + (f" of {told['steps']:,}" if told["steps"] else "")
        left = f"{status.duration(told['eta_seconds'])} left" if told["eta_seconds"] else ""
        return ", ".join(filter(None, [steps, left, told["phase"] if told["phase"] != "training" else ""]))
    except Exception:  # no training, one that has not begun or was just over, or a file of another form
        return ""


def _event(record: logging.LogRecord) -> str:
    return str(vars(record).get("event") or "")


def duration(seconds: float) -> str:
    """A duration in words: `3 s`, `4 min`, `2.5 h`."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5970 else f"{seconds / 3600:.1f} h"


def outcome(outputs: Sequence[str]) -> str:
    """What a job's records say came out: its first headline metrics, else how many items, and how many were rejected,
    quarantined, or are of no vase; nothing if they do not.

    Never raises: a record that cannot be read is no reason to stop a run.
    """
    found = [_first(outputs, "metrics.json", _metrics) or _first(outputs, "meta.json", _items)]
    return ", ".join(filter(None, [*found, _first(outputs, "summary.json", _left_out)]))


def _first(outputs: Sequence[str], name: str, words: Callable[[dict], str]) -> str:
    for path in (Path(one) for one in outputs if one.endswith(name)):
        try:
            if found := words(read_json(path)):
                return found
        except Exception:  # of another form, say, or removed by another rule
            continue
    return ""


def _metrics(record: dict) -> str:
    shown = list(record.get("summary", {}).items())[:METRICS_SHOWN]
    return ", ".join(f"{name} {one['value']:.3g}{_against(one)}" for name, one in shown)


def _against(one: dict) -> str:
    if one.get("baseline") is None:
        return ""
    return f" ({one['baseline_kind'].replace('_', ' ')} {one['baseline']:.3g})"


def _items(record: dict) -> str:
    count = record.get("items")
    return f"{count:,} item{'s' * (count != 1)}" if count is not None else ""


def _left_out(summary: dict) -> str:
    parts = [summary, *(part for part in summary.values() if isinstance(part, dict))]
    words = {"rejected": "rejected", "quarantined": "quarantined", "unmatched_names": "of no vase by their names"}
    counts = {words[name]: sum(part.get(name, 0) for part in parts) for name in words}
    return ", ".join(f"{count:,} {name}" for name, count in counts.items() if count)


def show(
    logger: logging.Logger, settings: Any, total: Callable[[], int], applies: Callable[[], bool], results: Path
) -> Lines | None:
    """Have Snakemake's terminal handler show `Lines`.

    Nothing is done, and None returned, if the user asked for another amount (`--quiet`, `--verbose`,
    `--printshellcmds`, `--debug-dag`), in a dry run, or where a logger plugin writes to the terminal.

    Args:
        settings: Snakemake's output settings.
    """
    handler = next((one for one in logger.handlers if one.name == STREAM), None)
    asked = (settings.quiet, settings.verbose, settings.printshellcmds, settings.debug_dag, settings.dryrun)
    if handler is None or handler.formatter is None or any(asked):
        return None
    lines = Lines(handler.formatter, total, applies, results)
    handler.addFilter(lines.filter)
    handler.setFormatter(lines)
    return lines
