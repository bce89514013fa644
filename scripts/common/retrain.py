"""The retrain guard: which finished trainings a run would make again, why, and what they cost.

A training is finished while the record beside its results, its meta.json, stands. A dry run ends with a table of those
that would run again; a real one stops before any job if one of them is dear.
"""

import atexit
import contextlib
import difflib
import json
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from scripts.common.artefacts import recorded_hash, sha256_file, sha256_text, write_text
from scripts.common.code_key import module_keys
from scripts.common.errors import KilnError
from scripts.common.status import duration

ALL = "all"
WIDTH = 110  # of a reason
CAUSES = 4  # of a remade input that are named
HASHED_BYTES = 64 * 2**20  # an input up to this size is read to see whether it really differs


class Redone(NamedTuple):
    """A finished training that would run again; cost in hours, None where its record does not tell."""

    rule: str
    name: str
    reasons: list[str]
    gpu_hours: float | None
    wall_hours: float | None


class Codes:
    """Which modules code keys stand for: those of this run, and of earlier ones by what they left in the results.

    Args:
        folder: of files {"modules": {module: its key}, "keys": {code key: [modules]}}, one for each state of the code.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.modules: dict[str, tuple[str, ...]] = {}

    def note(self, key: str, modules: tuple[str, ...]) -> str:
        """Take note that `key` is the code key of `modules`; the key."""
        self.modules[key] = modules
        return key

    def keep(self) -> None:
        """Leave a file that says which modules all code keys of this run stand for."""
        keys = {key: module_keys(*modules) for key, modules in sorted(self.modules.items())}
        every = {name: one for found in keys.values() for name, one in found.items()}  # of one run: each has one key
        text = json.dumps({"modules": every, "keys": {key: sorted(found) for key, found in keys.items()}})
        path = self.folder / f"{sha256_text(text)[:16]}.json"
        if not path.is_file():
            write_text(path, text + "\n")

    def changed(self, old: str, new: str) -> str:
        """In words: which modules made the code key `old` become `new`."""
        before, now = self._left(old), module_keys(*self.modules[new])
        if before is None:
            return f"code changed (what it was is not noted in {self.folder})"
        names = {
            "changed": sorted(name for name in before.keys() & now.keys() if before[name] != now[name]),
            "now counts": sorted(now.keys() - before.keys()),
            "no longer counts": sorted(before.keys() - now.keys()),
        }
        return "code: " + "; ".join(f"{', '.join(some)} {verb}" for verb, some in names.items() if some)

    def _left(self, key: str) -> dict[str, str] | None:
        for path in self.folder.glob("*.json"):
            with contextlib.suppress(ValueError, KeyError):  # not ours
                kept = json.loads(path.read_text(encoding="utf-8"))
                if key in kept["keys"]:
                    return {name: kept["modules"][name] for name in kept["keys"][key]}
        return None


def read_record(job: Any) -> dict[str, Any] | None:
    """The record of a job's results; None if there is none. A damaged one is empty."""
    if not hasattr(job.output, "meta") or not Path(job.output.meta).is_file():
        return None
    with contextlib.suppress(ValueError):
        found = json.loads(Path(job.output.meta).read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return found
    return {}


def made_with(record: Mapping[str, Any]) -> tuple[dict[str, Any], str | None]:
    """Settings and code key that a result stands for: those that made it, or with which it was last accepted."""
    last = (record.get("accepted") or [record])[-1]
    return last.get("settings") or {}, last.get("code")


def asked_for(job: Any) -> tuple[dict[str, Any], str | None]:
    """Settings and code key that a job would run with."""
    return json.loads(job.params.get("settings") or "{}"), job.params.get("code")


def made_as_now(job: Any) -> bool:
    """Whether the record beside a job's results names its code and settings as they are now."""
    record = read_record(job)
    return bool(record) and made_with(record) == asked_for(job)


def cost(record: Mapping[str, Any]) -> tuple[float | None, float | None]:
    """GPU hours and hours by the clock of a training, all its attempts together; None if its record does not tell.

    GPU hours are hours times processes, as each process has one GPU; without GPUs, what trained counts as if on one.
    """
    seconds = record.get("wall_seconds")
    if not isinstance(seconds, int | float):
        return None, None
    hardware = record.get("hardware") or {}
    processes = record.get("processes") or len(hardware.get("gpus") or [0])
    return seconds / 3600 * (processes if hardware.get("gpus") else 1), seconds / 3600


class Plan:
    """What Snakemake plans, and why.

    Args:
        workflow: Snakemake's.
        codes: of this run.
    """

    def __init__(self, workflow: Any, codes: Codes):
        self.workflow, self.dag, self.codes = workflow, workflow.dag, codes
        self._own: dict[Any, list[str]] = {}

    def redone(self, trainings: Collection[str]) -> list[Redone]:
        """Finished results of the rules `trainings` that would be made again, dearest first."""
        found = []
        for job in self.again():
            record = read_record(job)
            if record is None or not any(is_rule(job, name) for name in trainings):
                continue
            found.append(Redone(job.rule.name, name_of(job), self.why(job), *cost(record)))
        return sorted(found, key=lambda one: (-(one.gpu_hours or float("inf")), one.name))

    def again(self) -> Iterator[Any]:
        """All jobs that would run."""
        return self.dag.needrun_jobs(exclude_finished=False)

    def why(self, job: Any) -> list[str]:
        """Why a job would run: its own reasons, then inputs that will be remade, and why those."""
        reasons = list(self.own_reasons(job))
        for maker, files in self.dag.dependencies[job].items():
            if self.dag.needrun(maker) and not self.only_on_demand(maker):
                causes = list(dict.fromkeys(self._causes(maker)))
                more = f", and {len(causes) - CAUSES} more" if len(causes) > CAUSES else ""
                because = f" ({'; '.join(causes[:CAUSES])}{more})" if causes else ""
                reasons.append(
                    f"input {', '.join(sorted(map(str, files)))} will be remade by {maker.rule.name}{because}"
                )
        return reasons or [str(self.dag.reason(job))]

    def own_reasons(self, job: Any) -> list[str]:
        """Why a job would run even if nothing before it did."""
        if job not in self._own:
            self._own[job] = list(self._find_own_reasons(job))
        return self._own[job]

    def only_on_demand(self, job: Any) -> bool:
        """Whether a job would run only because another that does needs what it makes for a time: temp(), a service."""
        makers = filter(self.dag.needrun, self.dag.dependencies[job])
        return not self.own_reasons(job) and all(map(self.only_on_demand, makers))

    def _causes(self, maker: Any) -> Iterator[str]:
        for job in self.dag.bfs(self.dag.dependencies, maker, stop=lambda one: not self.dag.needrun(one)):
            for reason in self.own_reasons(job):
                yield reason if job is maker else f"{job.rule.name}: {reason}"

    def _find_own_reasons(self, job: Any) -> Iterator[str]:
        reason, record = self.dag.reason(job), read_record(job)
        (old_settings, old_code), (settings, code) = made_with(record or {}), asked_for(job)
        if record:
            yield from _differences(old_settings, settings)
            if old_code and code and old_code != code:
                yield self.codes.changed(old_code, code)
        if reason.forced:
            yield "forced by the command line"
        if missing := [str(f) for f in reason.missing_output if not f.is_temp and not job.is_service]:
            yield f"missing: {', '.join(sorted(missing))}"
        if reason.incomplete_output:
            yield f"incomplete: {', '.join(sorted(map(str, reason.incomplete_output)))}"
        known = {str(one["path"]): one["sha256"] for one in (record or {}).get("inputs", {}).values()}
        known |= ((record or {}).get("accepted") or [{}])[-1].get("inputs", {})
        yield from (
            f"input {file} {_changed(Path(file), known.get(str(file)))}" for file in sorted(reason.updated_input)
        )
        if reason.input_changed:
            yield from self._other_inputs(job)
        yield from self._other_params(job, {repr(job.params.get(name)) for name in ("settings", "code")})
        if reason.code_changed:
            yield "the rule's command changed"
        if reason.software_stack_changed:
            yield "the software environment changed"

    def _other_inputs(self, job: Any) -> Iterator[str]:
        before, now = self.workflow.persistence.input(job.output[0]) or [], set(map(str, job.input))
        yield from (f"input {file} is new" for file in sorted(now - set(before)))
        yield from (f"input {file} is no longer asked for" for file in sorted(set(before) - now))

    def _other_params(self, job: Any, told: set[str]) -> Iterator[str]:
        """Params that changed, but for settings and code, which are told in full; `told` are those of now."""
        change = self.dag.reason(job).params_changed
        if not change:
            return
        new = sorted(change.only_new - told)
        olds = [text for text in sorted(change.only_old) if not _is_told(text)]
        names = {repr(value): name for name, value in job.params.items()}
        for text in new:
            old = f"{_short(olds[0])} -> " if len(olds) == len(new) == 1 else ""
            yield f"{names.get(text, 'a parameter')}: {old}{_short(text)}"
        if not new and olds:
            yield f"no longer a parameter: {', '.join(map(_short, olds))}"


def guard(
    plan: Plan, trainings: Collection[str], above: float, allowed: str | None, say: Callable[[str], None]
) -> None:
    """Tell of finished trainings that would run again; a real run does not begin if one is dear and not allowed.

    Args:
        trainings: names of rules; within a pipeline, each after those that it follows.
        above: GPU hours from which a training is dear.
        allowed: rules that may train again, parted by commas, or `all`.
        say: told the table in a dry run.

    Raises:
        KilnError: the run would redo a dear training, or `allowed` names no training.
    """
    names = {name for name in (part.strip() for part in (allowed or "").split(",")) if name}
    if unknown := sorted(names - {ALL, *trainings}):
        raise KilnError(f"allow_retrain: {unknown[0]} is no training", f"give {ALL}, or of {', '.join(trainings)}")
    redone = plan.redone(trainings)
    dear = [one for one in redone if one.gpu_hours is None or one.gpu_hours > above]
    dear = [one for one in dear if ALL not in names and not any(is_named(one.rule, name) for name in names)]
    if not redone or plan.workflow.touch:
        return
    named = [name for name in trainings if any(is_named(one.rule, name) for one in dear or redone)]
    first, rules = named[0], ",".join(named)
    keep = f"keep a result as it is: make accept RULE={first}"
    if any(word.startswith("--config") for word in sys.argv):
        keep += ' ARGS="...", with this command\'s --configfile and --config'
    keep += "".join(f"; then RULE={name}" for name in named[1:])
    redo = f"train again: the same command with allow_retrain={rules} in its --config, of which only the last counts"
    stops = f"a run stops before it redoes more than {above:g} GPU hours (confirm_gpu_hours); {redo}" if dear else ""
    if plan.workflow.dryrun:
        say("\n".join(filter(None, ["\nFinished trainings that would run again:", table(redone), keep, stops])))
    elif dear:
        raise KilnError(
            f"this run would redo finished trainings of more than {above:g} GPU hours (confirm_gpu_hours):\n"
            f"{table(redone)}\nNothing was run.",
            f"{keep}\n      {redo}",
        )


def table(redone: Iterable[Redone]) -> str:
    """A line for each training, and one for each further reason."""
    lines = [("training", "GPU hours", "wall time", "why")]
    for one in redone:
        wall = "?" if one.wall_hours is None else duration(one.wall_hours * 3600)
        for index, reason in enumerate(one.reasons):
            lines.append((one.name, _hours(one.gpu_hours), wall, reason) if index == 0 else ("", "", "", reason))
    widths = [max(len(line[i]) for line in lines) for i in range(3)]
    return "\n".join(
        f"{name:<{widths[0]}}  {hours:>{widths[1]}}  {wall:>{widths[2]}}  {why}" for name, hours, wall, why in lines
    )


def at_exit(text: str) -> None:
    """Print `text` after all that Snakemake still says."""

    def show() -> None:
        with contextlib.suppress(BrokenPipeError):
            print(text, flush=True)

    atexit.register(show)


def is_rule(job: Any, name: str) -> bool:
    """Whether a job is of rule `name`, which may have a prefix where this workflow is another's module."""
    return is_named(job.rule.name, name)


def is_named(rule: str, name: str) -> bool:
    """Whether `rule` is the name of a rule, with or without a module's prefix."""
    return rule == name or rule.endswith(f"_{name}")


def no_such_rule(name: str, rules: Collection[str]) -> KilnError:
    """The refusal of a name that is none of `rules`, with the nearest of them."""
    near = difflib.get_close_matches(name, sorted(rules), n=3)
    meant = f"did you mean {' or '.join(near)}? " if near else ""
    return KilnError(f"{name}: no rule has this name", f"{meant}`snakemake --list` names all rules")


def name_of(job: Any) -> str:
    """A job's rule with its wildcards."""
    marks = ", ".join(f"{key}={value}" for key, value in job.wildcards_dict.items())
    return f"{job.rule.name} ({marks})" if marks else job.rule.name


def _is_told(text: str) -> bool:
    """Whether a recorded parameter is settings or a code key."""
    value = text[1:-1]
    return value.startswith("{") or (len(value) == 64 and not set(value) - set("0123456789abcdef"))


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], place: str = "") -> Iterator[str]:
    for name in sorted({*old, *new}):
        before, now = old.get(name, _ABSENT), new.get(name, _ABSENT)
        if isinstance(before, Mapping) and isinstance(now, Mapping):
            yield from _differences(before, now, f"{place}{name}.")
        elif before != now:
            yield f"setting {place}{name}: {_shown(before)} -> {_shown(now)}"


_ABSENT = object()


def _shown(value: Any) -> str:
    return "none" if value is _ABSENT else _short(json.dumps(value, ensure_ascii=False))


def _short(text: str) -> str:
    return text if len(text) <= WIDTH else f"{text[:WIDTH]}..."


def _changed(file: Path, before: str | None) -> str:
    """In words, how a file that is newer than the result differs from what the result was made of."""
    if before is None or not file.is_file():
        return "is newer than the result"
    now = recorded_hash(file)
    if now is None and file.stat().st_size <= HASHED_BYTES:
        now = sha256_file(file)
    if now is None:
        return "is newer than the result"
    return "is newer than the result, its content the same" if now == before else "changed"


def _hours(value: float | None) -> str:
    return "?" if value is None else f"{value:.1f}" if value >= 0.1 else f"{value:.3f}"
