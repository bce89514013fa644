"""What we ask Slurm, by its own commands; no Python library for it is among our packages."""

import os
import re
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

from scripts.common.errors import KilnError

SECONDS = 60  # Slurm's commands themselves wait for a slurmctld that restarts, for less than this
_LOGS = "/.snakemake/slurm_logs/"
_FIELDS = ("JobID", "State", "Reason", "NodeList", "WorkDir", "StdOut", "Comment")
_SACCT = ("JobIDRaw", "State", "ExitCode", "NodeList", "Partition", "Account", "QOS", "Elapsed", "Timelimit", "ReqMem",
          "MaxRSS")  # fmt: skip


class Job(NamedTuple):
    """A job of Snakemake's in the queue: `reason` says why one waits, `node` is empty until it runs."""

    id: str
    state: str
    reason: str
    node: str
    folder: str
    log: str
    comment: str

    def __str__(self) -> str:
        rule = self.comment.removeprefix("rule_").replace("_wildcards_", " ")
        return f"{self.id}  {rule}  {self.state}  {self.node or self.reason}"


def jobs_of(directory: Path, started_in: Path) -> list[Job]:
    """This user's jobs, queued or running, that a Snakemake working in `directory` submitted.

    A job's log tells that folder. Where `--slurm-logdir` puts logs elsewhere, the job only tells the folder that
    Snakemake was `started_in`.

    Raises:
        KilnError: Slurm does not answer.
    """
    form = ",".join(f"{field}:|" for field in _FIELDS)  # ended by a bar and not cut to a width
    command = ["squeue", "--noheader", "--user", str(os.getuid()), "--Format", form]
    done = _run(command)
    if done.returncode:
        raise KilnError(
            f"{' '.join(command[:2])}: Slurm does not answer: {done.stderr.strip()}",
            "run this where Slurm's commands work, and again when they do",
        )
    jobs = [Job(*line.removesuffix("|").split("|", len(_FIELDS) - 1)) for line in done.stdout.splitlines()]
    return [job for job in jobs if _belongs(job, directory, started_in)]


def _belongs(job: Job, directory: Path, started_in: Path) -> bool:
    if _LOGS in job.log:
        return Path(job.log.partition(_LOGS)[0]) == directory
    return job.comment.startswith(("rule_", "group_")) and Path(job.folder) == started_in


def refused(account: str | None, partition: str | None) -> str | None:
    """Which of the two Slurm does not know for this user, "account" or "partition"; None if it names neither.

    Other refusals of this job of one minute, as by a partition for GPU jobs alone, say nothing of these two.
    """
    asked = [f"--{name}={value}" for name, value in (("account", account), ("partition", partition)) if value]
    done = _run(["sbatch", "--test-only", *asked, "--time=1", "--mem=1", "--wrap=true"])
    found = re.search(r"invalid (account|partition)", done.stderr, re.IGNORECASE) if done.returncode else None
    return found[1].lower() if found else None


def partitions() -> list[str]:
    """The partitions that this user sees."""
    return sorted(set(_run(["sinfo", "--noheader", "--format=%R"]).stdout.split()))


def accounts(user: str) -> list[str]:
    """The accounts of a user; none where Slurm keeps no accounts."""
    asked = ["sacctmgr", "--noheader", "--parsable2", "list", "associations", f"user={user}", "format=account"]
    return sorted(set(_run(asked).stdout.split()))


def min_job_age() -> int | None:
    """Seconds for which squeue still shows a job that has ended; None if Slurm does not say."""
    found = re.search(r"^MinJobAge\s*=\s*(\d+)", _run(["scontrol", "show", "config"]).stdout, re.MULTILINE)
    return int(found[1]) if found else None


def ask_controller(job: str) -> dict[str, Any]:
    """What Slurm's controller knows of a job, which is nothing some minutes after its end.

    Keys, each only where it is known: state, signal, node, partition, account, limit (words), asked_mb.
    """
    return parse_scontrol(_run(["scontrol", "show", "job", "--oneliner", job]).stdout)


def ask_accounting(job: str) -> dict[str, Any]:
    """What Slurm's accounting knows of a job, where there is any; keys as of `ask_controller`, and peak_mb."""
    command = ["sacct", "--parsable2", "--noheader", "--units=M", f"--format={','.join(_SACCT)}", f"--jobs={job}"]
    return parse_sacct(_run(command).stdout, job)


def parse_scontrol(text: str) -> dict[str, Any]:
    """The facts in a line of `scontrol show job --oneliner`; keys as of `ask_controller`."""
    fields = dict(re.findall(r"(?:^|\s)([A-Z][\w:/]*)=(\S+)", text))
    mine = {
        "state": fields.get("JobState"),
        "signal": _signal(fields.get("ExitCode", "")),
        "node": fields.get("NodeList"),
        "partition": fields.get("Partition"),
        "account": fields.get("Account"),
        "limit": fields.get("TimeLimit"),
        "asked_mb": _megabytes(fields.get("MinMemoryNode", "")),
    }
    return {key: value for key, value in mine.items() if value and value != "(null)"}


def parse_sacct(text: str, job: str) -> dict[str, Any]:
    """The facts in what `sacct --parsable2` prints in the columns that `ask_accounting` asks for; keys as there.

    A job's peak is the sum over its steps: Snakemake's own, which stays, and the rule's.
    """
    rows = [dict(zip(_SACCT, line.split("|"), strict=False)) for line in text.splitlines()]
    rows = [row for row in rows if row["JobIDRaw"].split(".")[0] == job]
    whole = next((row for row in rows if row["JobIDRaw"] == job), {})
    peaks = [_megabytes(row.get("MaxRSS", "")) or 0.0 for row in rows if row is not whole]
    mine = {
        "state": whole.get("State", "").split(" ")[0],  # it may go on: CANCELLED by 1000
        "signal": max((_signal(row.get("ExitCode", "")) or 0 for row in rows), default=0),
        "node": whole.get("NodeList"),
        "partition": whole.get("Partition"),
        "account": whole.get("Account"),
        "limit": whole.get("Timelimit"),
        "asked_mb": _megabytes(whole.get("ReqMem", "")),
        "peak_mb": sum(peaks),
    }
    return {key: value for key, value in mine.items() if value}


def _signal(exit_code: str) -> int | None:
    found = re.fullmatch(r"\d+:(\d+)", exit_code)
    return int(found[1]) or None if found else None


def _megabytes(text: str) -> float | None:
    found = re.fullmatch(r"([\d.]+)([KMGT]?)[nc]?", text)
    try:
        return float(found[1]) * 1024.0 ** ("KMGT".index(found[2] or "M") - 1) if found else None
    except ValueError:  # several dots
        return None


def _run(command: list[str]) -> subprocess.CompletedProcess:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, stdin=subprocess.DEVNULL)
    except FileNotFoundError:
        return subprocess.CompletedProcess(command, 127, "", f"there is no {command[0]} here")
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 124, "", f"no answer within {SECONDS} s")
