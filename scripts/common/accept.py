"""Keeping finished results though what made them has changed: the decision is written into their meta.json.

    make accept RULE=rae_train_autoencoder ARGS="--configfile config/mine.yaml"

It is a dry run of Snakemake, which runs no job, with KILN_ACCEPT naming the rule. Afterwards neither the rule's jobs
nor those after them run again because of what was accepted; a later change shows as ever.
"""

import datetime
import os
import shlex
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from scripts.common.artefacts import input_hash, sha256_file, write_json
from scripts.common.errors import KilnError
from scripts.common.retrain import Plan, asked_for, is_rule, name_of, read_record

VARIABLE = "KILN_ACCEPT"


def accept(plan: Plan, rule: str, say: Callable[[str], None]) -> None:
    """Keep the results of all jobs of `rule` that would run again.

    Args:
        say: told what was kept.

    Raises:
        KilnError: this is no dry run; there is no such rule; jobs before it are still to run; its results are not
            all there, or not what their record says; or another Snakemake works in this folder.
    """
    if not plan.workflow.dryrun:
        raise KilnError(f"{VARIABLE}={rule}: results are accepted in a dry run alone", f"make accept RULE={rule}")
    jobs = [job for job in plan.dag.jobs if is_rule(job, rule)]
    if not jobs:
        hint = f"add a target that needs it: make accept RULE={rule} TARGET=..."
        raise KilnError(f"{rule}: no job of this rule is planned here", hint)
    again = [job for job in jobs if plan.dag.needrun(job)]
    if not again:
        say(f"\n{rule}: no result of it would be made again, so there is nothing to accept")
        return
    if plan.workflow.persistence.locked:
        raise KilnError("another Snakemake works in this folder", "wait until it ends, then accept")
    for job in again:
        _check(plan, job)
    lines = [f"\nKept, and noted in the record of each ({len(again)}):"]
    later: dict[str, int] = {}
    for job in again:
        reasons = plan.why(job)
        later |= _keep(job, reasons)
        plan.workflow.async_run(plan.workflow.persistence.finished(job))
        lines += [f"  {name_of(job)}: {job.output.meta}", *(f"    {reason}" for reason in reasons)]
    if later:
        _pass_on(plan, again, later)
    say("\n".join(lines))


def _check(plan: Plan, job: Any) -> None:
    """Raise KilnError unless the job's results can stand for what would be made now."""
    record = read_record(job)
    missing = [str(file) for file in job.output if not Path(file).is_file()]
    if record is None or missing:
        raise KilnError(
            f"{name_of(job)}: there is no finished result to keep; missing: {', '.join(missing) or 'its record'}",
            "run it",
        )
    waiting = [
        other
        for other in plan.dag.bfs(plan.dag.dependencies, job)
        if other is not job and plan.dag.needrun(other) and not plan.only_on_demand(other)
    ]
    if waiting:
        makers = plan.dag.dependencies[job].items()
        wanted = sorted({str(f) for maker, files in makers if maker in waiting for f in files})
        rules = ", ".join(sorted({other.rule.name for other in waiting}))
        raise KilnError(
            f"{name_of(job)}: still to run before it: {rules}; what they make may differ from what is there",
            f"run them first, then accept: {_command(wanted)}",
        )
    for file in map(Path, job.output):
        known = record.get("outputs", {}).get(file.name)
        if known and (known["bytes"] != file.stat().st_size or known["sha256"] != sha256_file(file)):
            raise KilnError(
                f"{file}: not what its record {job.output.meta} says: it was changed after it was made",
                "put the old file back, or let it be made again",
            )


def _keep(job: Any, reasons: Iterable[str]) -> dict[str, int]:
    """Write the decision into the record; {file: its new time in ns} of what inputs were newer than."""
    meta, record = Path(job.output.meta), read_record(job)
    before = meta.stat().st_mtime_ns
    settings, code = asked_for(job)
    inputs = {str(file): input_hash(Path(file)) for file in job.input if Path(file).is_file()}
    decision = {
        "when": datetime.datetime.now(datetime.UTC).isoformat(),
        "reasons": list(reasons),
        "settings": settings,
        "code": code,
        "inputs": inputs,
    }
    write_json(meta, record | {"accepted": [*record.get("accepted", []), decision]})
    os.utime(meta, ns=(before, before))  # else all that reads the record would run again
    newest = max((_time(Path(file)) for file in job.input if Path(file).exists() and not file.is_ancient), default=0)
    return _make_as_new(job, newest)


def _make_as_new(job: Any, time: int) -> dict[str, int]:
    """Nothing that a job made is older than `time`, in ns; {file: time} of what was."""
    older = [path for path in _made_by(job) if _time(path) < time]
    for path in older:
        os.utime(path, ns=(time, time))
    return {str(path): time for path in older}


def _pass_on(plan: Plan, accepted: Iterable[Any], later: dict[str, int]) -> None:
    """Results made of what has a later time now get it too, unless another input of theirs is newer than they are."""
    todo, seen = list(accepted), set(accepted)
    while todo:
        for job in plan.dag.depending[todo.pop(0)]:
            if job in seen or not _made_by(job) or plan.workflow.async_run(_has_other_news(plan, job, later)):
                continue
            newest = max((later[file] for file in map(str, job.input) if file in later), default=0)
            if moved := _make_as_new(job, newest):
                later |= moved
                seen.add(job)
                todo.append(job)


async def _has_other_news(plan: Plan, job: Any, later: dict[str, int]) -> bool:
    """Whether an input without a new time is newer than what was made of it, and has other content."""
    oldest = min(map(_time, _made_by(job)))
    for file in job.input:
        if str(file) in later or file.is_ancient or not Path(file).exists() or _time(Path(file)) <= oldest:
            continue
        known = plan.workflow.persistence.input_checksums(job, file)
        if len(known) != 1 or not await file.is_same_checksum(known.pop(), plan.dag.max_checksum_file_size):
            return True
    return False


def _made_by(job: Any) -> list[Path]:
    """The files of a job that Snakemake compares with its inputs: outputs, and the benchmark."""
    return [path for path in map(Path, filter(None, [*job.output, job.benchmark])) if path.exists()]


def _time(path: Path) -> int:
    return max(path.lstat().st_mtime_ns, path.stat().st_mtime_ns)


def _command(targets: Iterable[str]) -> str:
    """The command of this run, as a real one and for other targets."""
    words = [word for word in sys.argv[1:] if word not in ("--dry-run", "-n", "--quiet")]
    if words and not words[0].startswith("-"):
        words = words[1:]  # the pipeline, as `make accept` names it
    names = ("-c", "-j", "--profile")
    cores = [] if any(word.startswith(names) or word.startswith("--cores") for word in words) else ["--cores", "all"]
    return shlex.join(["snakemake", *targets, *words, *cores])
