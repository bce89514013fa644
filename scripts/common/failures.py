"""What failed, why, and the command that shows it again: the report at the end of a run that failed.

`Watch` listens to Snakemake's own logger. It gets the records that a logger plugin would, with nothing to install;
Snakemake's log file is no substitute: it lacks a job's resources and attempt, and most of itself under `--quiet`.
"""

import concurrent.futures
import dataclasses
import logging
import os
import re
import shlex
import signal
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scripts.common import slurm
from scripts.common.log_text import OWN_LINE, SLURM_SAYS, TRACEBACK, WIDTH, excerpt, hide_secrets, slurm_words, tail

IN_FULL = 5  # failed rules; of the others a line each
NEAR = 0.9  # of the memory asked for, from which a killed job probably ran out of it

_STATUS = re.compile(r"returned non-zero exit status (\d+)")
_TORCHRUN = re.compile(r"Signal (\d+) \(SIG\w+\) received by PID")
_NO_MEMORY = re.compile(r"exceeded (?:step|job|memory)[ \w]*limit|oom.?kill", re.I)


@dataclasses.dataclass
class Failure:
    """A job that failed, as Snakemake told of it; `asked` are its resources, `status` is known of local jobs only."""

    rule: str
    wildcards: Mapping[str, str]
    attempt: int
    started: float
    asked: Mapping[str, Any]
    threads: int
    command: str | None
    conda: str | None
    logs: Sequence[str]
    message: str | None
    job: str | None = None
    outputs: Sequence[str] = ()
    group: str | None = None
    status: int | None = None
    slurm: concurrent.futures.Future | None = None

    @property
    def name(self) -> str:
        """The rule with its wildcards."""
        marks = ", ".join(f"{key}={value}" for key, value in self.wildcards.items())
        return f"{self.rule} ({marks})" if marks else self.rule


class Watch(logging.Handler):
    """Collects a run's failed jobs from the records of Snakemake's logger, to which it is added."""

    def __init__(self) -> None:
        super().__init__()
        self.failed: dict[int, Failure] = {}
        self._begun: dict[int, tuple[float, Mapping[str, str], Mapping[str, Any], int]] = {}
        self._attempts: dict[int, int] = {}
        self._status: dict[int | None, int] = {}  # by thread: a local job's error and exit status come from one
        self._groups: dict[int, tuple[str, str | None, list[str]]] = {}
        # Slurm forgets a job minutes after its end, so it is asked at once; not in this thread, which must not wait.
        self._asking = concurrent.futures.ThreadPoolExecutor(max_workers=1)

    def emit(self, record: logging.LogRecord) -> None:
        """Take note of one record of Snakemake's."""
        try:
            self._take(record)
        except Exception:  # as logging's own handlers: what is wrong here is told and stops nothing
            self.handleError(record)

    def _take(self, record: logging.LogRecord) -> None:
        facts = vars(record)
        event = str(facts.get("event") or "")
        if event == "job_info":
            number = facts["jobid"]
            # the resources change with the next attempt
            resources = dict(facts["resources"].items())
            self._begun[number] = (record.created, dict(facts["wildcards"]), resources, facts["threads"])
            self._attempts[number] = self._attempts.get(number, 0) + 1
        elif event == "job_finished":
            self.failed.pop(facts["job_id"], None)
        elif event == "group_error":
            member = (facts["groupid"], facts.get("external_jobid"), list(facts["aux_logs"]))
            self._groups.update({info["jobid"]: member for info in facts["job_error_info"]})
        elif event == "job_error":
            self._note(facts)
        elif record.levelno >= logging.ERROR and (found := _STATUS.findall(record.getMessage())):
            self._status[record.thread] = int(found[-1])

    def _note(self, facts: Mapping[str, Any]) -> None:
        number = facts["jobid"]
        started, wildcards, asked, threads = self._begun.get(number, (facts["created"], {}, {}, 1))
        group, job, logs = self._groups.pop(number, (None, None, []))
        job = facts["aux"].get("external_jobid") or job
        failure = Failure(
            rule=facts["rule_name"],
            wildcards=wildcards,
            attempt=self._attempts.get(number, 1),
            started=started,
            asked=asked,
            threads=threads,
            command=facts["shellcmd"],
            conda=facts["conda_env"],
            logs=[*facts["log"], *logs],
            message=facts["rule_msg"],
            job=job,
            outputs=facts["output"],
            group=group,
        )
        if job:
            failure.slurm = self._asking.submit(slurm.ask_controller, job)
        else:
            failure.status = self._status.pop(facts["thread"], None)
        self.failed.pop(number, None)
        self.failed[number] = failure

    def report(self, folder: Path) -> str:
        """What to tell of the jobs that failed and did not succeed in a later attempt; empty if there are none.

        Never raises: what went wrong in here must not hide what went wrong in the run.

        Args:
            folder: the working directory of the run.
        """
        try:
            return hide_secrets(_report(_who_failed(list(self.failed.values())), folder), os.environ)
        except Exception as error:
            return f"There is no report of what failed ({type(error).__name__}: {error}); see the messages above."


def _who_failed(failures: list[Failure]) -> list[Failure]:
    """Without the members of a group that were told to have failed only because another member did."""
    kept = []
    for group in dict.fromkeys((failure.group, failure.job) for failure in failures):
        members = [failure for failure in failures if (failure.group, failure.job) == group]
        if group[0] is None:
            kept += members
            continue
        text = tail(members[0].logs[-1]) if members[0].logs else ""
        blamed = [m for m in members if f"Error in rule {m.rule}:" in text and ", ".join(m.outputs) in text]
        # One that was killed could not be blamed: it is the last that wrote to its log.
        kept += blamed or [max(members, key=lambda m: max((_written(log) for log in m.logs[:1]), default=0.0))]
    return kept


def _report(failures: Sequence[Failure], folder: Path) -> str:
    if not failures:
        return ""
    count = f"{len(failures)} job{'s' * (len(failures) > 1)} failed"
    parts = [f"{count}; the first {IN_FULL}:" if len(failures) > IN_FULL else f"{count}:"]
    parts += [_in_full(failure, folder) for failure in failures[:IN_FULL]]
    if others := failures[IN_FULL:]:
        parts.append("\n".join(["The others:", *(f"  {_in_a_line(failure)}" for failure in others)]))
    return "\n\n".join(parts)


def _in_a_line(failure: Failure) -> str:
    said = excerpt(_log_text(failure)) or ["nothing said"]
    job = f"Slurm job {failure.job}, " if failure.job else ""
    why = next((line for line in said if line.startswith("Error: ")), said[-1])
    return f"{failure.name}: {job}{why.strip()}"[:WIDTH]


def _in_full(failure: Failure, folder: Path) -> str:
    known = slurm.ask_accounting(failure.job) | failure.slurm.result() if failure.job and failure.slurm else {}
    text = _log_text(failure)
    machine = tail(failure.logs[-1]) if failure.job and failure.logs else ""  # what Slurm and Snakemake say there
    job = f", Slurm job {failure.job}" if failure.job else ""
    group = f" of group {failure.group}" if failure.group else ""
    places = [found for found in OWN_LINE.finditer(text) if found[2] == (failure.job or found[2])]
    node = known.get("node") or (places[-1][1] if places else None if failure.job else socket.gethostname())
    state = known.get("state")
    status = failure.status
    if status is None and (statuses := _STATUS.findall(machine)):
        status = int(statuses[-1])
    number = known.get("signal") or (status - 128 if status and 128 < status < 128 + signal.NSIG else None)
    if number is None and (killed := _TORCHRUN.findall(text)):
        number = int(killed[-1])
    peaks = [*(float(found[3]) for found in places), known.get("peak_mb", 0.0)]
    peak = max(peaks) or None
    asked = known.get("asked_mb") or failure.asked.get("mem_mb")
    asked = float(asked) if isinstance(asked, int | float) else None
    said, words = excerpt(text), slurm_words(machine)
    if said and (said[0].startswith("Error: ") or said[0].endswith(TRACEBACK)) and not _near(peak, asked):
        number = None  # the other processes are killed when one has failed
    ended = f": {state}" if state else ""
    if state == "FAILED" and _NO_MEMORY.search("\n".join(SLURM_SAYS.findall(machine))):
        state = "OUT_OF_MEMORY"  # as clusters without cgroups do not call it
    why = reason(state, number, peak, asked, known.get("limit") or _minutes(failure.asked.get("runtime")))
    memory = f"peak {peak:.0f} MB" if peak is not None else "peak unknown"
    lines = [
        f"{failure.name}{group}" + (f", attempt {failure.attempt}" if failure.attempt > 1 else ""),
        f"  ran on {node or 'an unknown node'}{job}{ended}",
        f"  memory: {memory}{f' of {asked:.0f} MB asked for' if asked else ''}",
    ]
    if why:
        lines.append(f"  cause: {why}")
    if not said and not words:
        said = excerpt(machine)
    stale = bool(said) and 0 < _written(failure.logs[0]) < failure.started
    if stale:
        lines.append("  its log was last written to before this attempt began:")
    lines += [f"    {line}" for line in said]
    if not said and not words:
        lines.append("  its log says nothing")
    lines += [f"    {line}" for line in words if line not in said]
    lines += [f"  log: {log}" for log in failure.logs]
    if command := by_hand(failure, known, folder):
        lines.append(f"  by hand:\n{command}")
    return "\n".join(lines)


def reason(state: str | None, number: int | None, peak: float | None, asked: float | None, limit: str | None) -> str:
    """Why a job ended that had no error of its own, as far as that can be told; else nothing.

    Args:
        state: Slurm's state of the job.
        number: the signal that killed it.
        peak, asked: memory in MB.
        limit: its time limit, in words.
    """
    more_memory = "give its resource class more `mem_mb`"
    if state == "OUT_OF_MEMORY":
        return f"out of memory: {more_memory}"
    if state == "TIMEOUT":
        return f"out of time ({limit or 'its limit'}): give its resource class more `runtime`"
    if state == "CANCELLED":
        return "cancelled"
    if state in ("PREEMPTED", "NODE_FAIL", "BOOT_FAIL", "DEADLINE"):
        return f"ended by Slurm ({state})"
    if number == signal.SIGKILL:
        if peak is None or asked is None:
            return f"killed by signal 9: probably out of memory; if so, {more_memory}"
        if _near(peak, asked):
            return f"killed by signal 9, near its request: probably out of memory; {more_memory}"
        return "killed by signal 9 below its request: by hand, or as its machine was full (`dmesg` there tells)"
    if number:
        return f"killed by signal {number} ({signal.Signals(number).name})" if number in _signals() else ""
    return ""


def _near(peak: float | None, asked: float | None) -> bool:
    return bool(peak and asked and peak >= NEAR * asked)


def _signals() -> set[int]:
    return {int(one) for one in signal.Signals}


def _log_text(failure: Failure) -> str:
    return tail(failure.logs[0]) if failure.logs else ""


def _written(path: str) -> float:
    try:
        return os.stat(path).st_mtime
    except OSError:
        return 0.0


def by_hand(failure: Failure, known: Mapping[str, Any], folder: Path) -> str | None:
    """One shell command that runs the failed step again as Snakemake did: in its folder, environment and allocation."""
    if not failure.command:
        return None
    command = failure.command.strip()
    before, _, after = command.rpartition(" 2>&1 | tee ")
    if before and len(_words(after)) == 1:
        command = before
    start = [f"cd {shlex.quote(str(folder))}"]
    if failure.conda:
        start.append(f'source "$(conda info --base)/bin/activate" {shlex.quote(failure.conda)}')
    if failure.job:
        if not _is_simple(command):
            command = f"bash -c {shlex.quote(command)}"
        command = f"{_allocation(failure, known)} {command}"
    return " && ".join([*start, command])


def _words(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError:
        return []


def _is_simple(command: str) -> bool:
    """Whether a command is one program with its arguments, which srun takes as it is."""
    try:
        words = list(shlex.shlex(command, posix=False, punctuation_chars=True))
    except ValueError:
        return False
    return words[:1] == ["env"] and "\n" not in command and not any(set(word) <= set("();<>|&$`") for word in words)


def _allocation(failure: Failure, known: Mapping[str, Any]) -> str:
    asked = failure.asked
    nodes, tasks = asked.get("nodes") or 1, asked.get("tasks") or 1
    options = {
        "partition": known.get("partition") or asked.get("slurm_partition"),
        "account": known.get("account") or asked.get("slurm_account"),
        "qos": asked.get("qos"),
        "constraint": asked.get("constraint"),
        "nodes": nodes,
        "ntasks": tasks,
        "cpus-per-task": asked.get("cpus_per_task") or failure.threads,
        "mem": asked.get("mem_mb"),
        "time": asked.get("runtime"),
    }
    if gpus := asked.get("gpu"):
        options["gpus"] = f"{asked['gpu_model']}:{gpus}" if asked.get("gpu_model") else gpus
    flags = [f"--{name}={shlex.quote(str(value))}" for name, value in options.items() if value]
    extra = [str(asked["slurm_extra"])] if asked.get("slurm_extra") else []
    # A step on several nodes calls srun itself: it gets an allocation to do so in.
    return " ".join(["salloc" if nodes > 1 or asked.get("mpi") else "srun", *flags, *extra])


def _minutes(value: Any) -> str | None:
    return f"{value} minutes" if isinstance(value, int | float) else None
