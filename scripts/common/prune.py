"""What of a results folder may go: what no configuration names, what is spent, and what killed runs left.

    spent       states of trainings whose results stand
    variants    results, states, logs and benchmarks of variants that no configuration names
    rows        what steps keep of items that they have seen (folders and tables without a lock), but the newest
    leftovers   half-written files and folders (.NAME.PID.tmp, .NAME.PID.old) of processes that are gone
    unfinished  states of trainings that stopped before their end: kept, unless they are older than the user says

Nothing else is looked at, and no link is followed. A training that runs holds the lock of its state folder, and has a
heartbeat that other nodes see; while it does, its state stays. Each state is removed under its own lock.
"""

import dataclasses
import json
import os
import re
import shutil
import socket
import stat
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

from scripts.common import disk, heartbeat, locks, spent
from scripts.common.artefacts import read_json, write_json
from scripts.common.errors import KilnError

VARIANTS = "variants.json"  # below the states: the folders whose parts are named by variants
STATE = re.compile(r"[0-9a-f]{16}")  # a state folder's name: a fingerprint
LEFTOVER = re.compile(r"\.(?P<name>.+)\.(?P<pid>\d+)\.(?P<kind>tmp|old)")
WILDCARD = re.compile(r"\{variant(,[^}]*)?\}(\.|$)")  # as Snakemake writes it, with its constraint
DAY = 86400.0
LEFTOVER_DAYS = 1.0  # a job of another node may still be writing; nothing is written for longer at a time
BEAT_SECONDS = 3600.0  # a training with a younger heartbeat may run on a node whose locks are not seen here
OURS = ("vase", "busi", "rae", "coca", "biomedica", "demo", "logs", "benchmarks", "state")


Current = Mapping[str, Collection[str]]  # {pipeline: names of its runs and variants}


@dataclasses.dataclass(frozen=True)
class Found:
    """A file or folder that may go, or that is told of because it stays.

    Attributes:
        kind: see the module.
        days: since anything in it last changed.
        stays: why it is kept; None: it goes.
    """

    path: Path
    kind: str
    bytes: int
    days: float
    stays: str | None = None


def look(
    results: Path, current: Current, older_than: float | None, leftovers: bool = True, now: float | None = None
) -> list[Found]:
    """All that may go, and the unfinished states, which stay, by kind and path.

    Args:
        results: the results folder.
        current: names that are in use, of all configurations together.
        older_than: unfinished states that have not changed for so many days go, too; None: none of them.
        leftovers: look for those, too, which takes a walk through everything.
        now: seconds since 1970.
    """
    now = time.time() if now is None else now
    found = [*_variants(results, current, now)]
    gone = {one.path for one in found}
    found += [one for one in _states(results, older_than, now) if not any(p in gone for p in one.path.parents)]
    gone |= {one.path for one in found if one.stays is None}
    made = _leftovers(results, now) if leftovers else ()
    found += [one for one in made if not any(p in gone for p in one.path.parents)]
    return sorted(found, key=lambda one: (one.stays is not None, one.kind, one.path))


def remember_variants(results: Path, patterns: Sequence[str]) -> None:
    """Keep which folders have parts named by variants, for `look`, which does not know the rules.

    Args:
        patterns: paths of outputs, logs and benchmarks of all rules, relative to the results folder.
    """
    folders = set()
    for pattern in patterns:
        parts = pattern.split("/")
        at = next((i for i, part in enumerate(parts) if WILDCARD.match(part)), None)
        if at:
            folders.add("/".join(parts[:at]))
            if parts[0] not in ("logs", "benchmarks") and at == 2:
                folders |= {f"{place}/{parts[0]}/{parts[1]}" for place in ("state", "logs")}
    place, wanted = results / "state" / VARIANTS, sorted(folders)
    if not place.is_file() or read_json(place) != wanted:
        write_json(place, wanted)


def _variants(results: Path, current: Current, now: float) -> Iterator[Found]:
    """What variants have made that nobody names; where one part of a variant may be in use, all of it stays."""
    found: dict[tuple[str, str], list[Found]] = {}
    known = results / "state" / VARIANTS
    for folder in read_json(known) if known.is_file() else []:
        parts = folder.split("/")
        pipeline = parts[1] if parts[0] in ("state", "logs", "benchmarks") else parts[0]
        if pipeline not in current or not _inside(results, results / folder):
            continue
        for entry in os.scandir(results / folder):
            variant, path = entry.name.partition(".")[0], Path(entry.path)
            # a state of before there were variants is for `_states`
            if variant and variant not in current[pipeline] and not STATE.fullmatch(variant):
                number, days = measure(path, now)
                stays = _in_use(path, now) or _just_changed(days)
                found.setdefault((pipeline, variant), []).append(Found(path, "variants", number, days, stays))
    for parts in found.values():
        said = next((one.stays for one in parts if one.stays), None)
        yield from (dataclasses.replace(one, stays=said) for one in parts)


def _in_use(folder: Path, now: float) -> str | None:
    """Why nothing in `folder` may go now; None: it may."""
    for place, inner, files in os.walk(folder):
        if locks.WRITER_LOCK in files or heartbeat.NAME in files:
            inner.clear()
            if said := running(Path(place), now):
                return said
    return None


def running(state: Path, now: float) -> str | None:
    """What says that a process works in a state folder, in words; None: nothing does."""
    try:
        if locks.is_taken(state):
            return f"in use by {locks.holder(state / locks.WRITER_LOCK)}"
    except KilnError as error:
        return f"cannot tell whether it is in use: {error.message}"
    try:
        told = json.loads((state / heartbeat.NAME).read_text(encoding="utf-8"))
        age, host = now - float(told["updated"]), told["host"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if age < BEAT_SECONDS and host not in (socket.gethostname(), os.environ.get("SLURMD_NODENAME")):
        return f"it had a heartbeat on {host} {age / 60:.0f} min ago"
    return None


def _states(results: Path, older_than: float | None, now: float) -> Iterator[Found]:
    root = results / "state"
    if not _inside(results, root):
        return
    for place, inner, files in os.walk(root):
        states = [Path(place, name) for name in sorted(inner) if STATE.fullmatch(name)]
        inner[:] = sorted(name for name in inner if not STATE.fullmatch(name))
        states = [one for one in states if not one.is_symlink()]
        trained = [one for one in states if (one / locks.WRITER_LOCK).exists() or (one / heartbeat.NAME).exists()]
        rows = [one for one in states if one not in trained]
        rows += [Path(place, name) for name in sorted(files) if STATE.fullmatch(name.partition(".")[0])]
        for path in trained:
            yield _judge(results, path, older_than, now)
        yield from _older_rows(rows, now)


def _judge(results: Path, state: Path, older_than: float | None, now: float) -> Found:
    number, days = measure(state, now)
    if said := running(state, now):
        return Found(state, "running", number, days, said)
    if _stands(results, state):
        return Found(state, "spent", number, days)
    goes = older_than is not None and days >= older_than
    return Found(state, "unfinished", number, days, None if goes else "unfinished; --older-than DAYS lets it go")


def _older_rows(rows: Sequence[Path], now: float) -> Iterator[Found]:
    """All but those that changed last: settings and code of now, as far as a results folder can tell."""
    sizes = {path: measure(path, now) for path in rows}
    newest = min(sizes, key=lambda path: sizes[path][1], default=None)
    for path, (number, days) in sizes.items():
        if path != newest:
            yield Found(path, "rows", number, days, _just_changed(days))


def _just_changed(days: float) -> str | None:
    return "changed within the hour: may be in use" if days * DAY < BEAT_SECONDS else None


def _stands(results: Path, state: Path) -> bool:
    """Whether the results that a state led to were written after it last changed."""
    mark = state.parent / spent.MARK
    step = state.parent.relative_to(results / "state")
    records = [results / step / "meta.json"]
    if mark.is_file():
        records.append(Path(json.loads(mark.read_text(encoding="utf-8"))["record"]))
    changed = _changed(state)
    return any(record.is_file() and record.stat().st_mtime >= changed for record in records)


def _changed(path: Path) -> float:
    """When anything in a folder last changed, its locks and heartbeat aside, in seconds since 1970."""
    times = [0.0]
    for place, _, files in os.walk(path):
        times += [
            os.lstat(os.path.join(place, n)).st_mtime for n in files if n not in (locks.WRITER_LOCK, heartbeat.NAME)
        ]
    return max(times)


def _leftovers(results: Path, now: float) -> Iterator[Found]:
    for top in OURS:
        if not _inside(results, results / top):
            continue
        for place, inner, files in os.walk(results / top):
            for name in [*inner, *files]:
                match = LEFTOVER.fullmatch(name)
                if not match:
                    continue
                path = Path(place, name)
                if match["kind"] == "old" and not os.path.lexists(path.with_name(match["name"])):
                    said: str | None = f"the only copy of {match['name']}: rename it, or make it anew"
                    yield Found(path, "leftovers", *measure(path, now), said)
                    continue
                number, days = measure(path, now)
                young = days < LEFTOVER_DAYS or Path("/proc", match["pid"]).exists()
                yield Found(path, "leftovers", number, days, "may be in use" if young else None)
            inner[:] = [name for name in inner if not LEFTOVER.fullmatch(name)]


def _inside(results: Path, place: Path) -> bool:
    """Whether `place` is a folder below `results` without a link on the way."""
    parts = place.relative_to(results).parts
    way = [results.joinpath(*parts[: count + 1]) for count in range(len(parts))]
    return place.is_dir() and not any(one.is_symlink() for one in way)


def measure(path: Path, now: float) -> tuple[int, float]:
    """Bytes that removing a file or folder frees, and days since anything in it last changed; links are not followed.

    A file with further hard links, such as a kept result, frees nothing.
    """
    number, last = 0, 0.0
    todo = [str(path)]
    while todo:
        place = todo.pop()
        try:
            facts = os.lstat(place)
            if stat.S_ISDIR(facts.st_mode):
                todo += [entry.path for entry in os.scandir(place)]
        except FileNotFoundError:  # gone since it was listed
            continue
        number += 0 if stat.S_ISREG(facts.st_mode) and facts.st_nlink > 1 else facts.st_blocks * 512
        last = max(last, facts.st_mtime)
    return number, (now - last) / DAY


def remove(one: Found) -> str | None:
    """Remove what was found; why not, if it is in use after all."""
    if one.stays is not None:
        return one.stays
    if one.path.is_symlink() or not one.path.is_dir():
        one.path.unlink(missing_ok=True)
        return None
    if said := _in_use(one.path, time.time()):
        return said
    try:
        if one.kind in ("spent", "unfinished"):
            with locks.writer_lock(one.path, owner="prune"):
                shutil.rmtree(one.path)
        else:
            shutil.rmtree(one.path)
    except KilnError as error:
        return error.message
    except OSError as error:
        return f"{error.filename}: {error.strerror}"
    parent = one.path.parent
    left = {entry.name for entry in os.scandir(parent)}
    if one.kind in ("spent", "unfinished") and left <= {spent.MARK}:
        shutil.rmtree(parent)
    return None


def table(found: Sequence[Found], results: Path) -> str:
    """What was found, in columns."""
    lines = [("", "size", "days", "")]
    for one in found:
        name = f"{one.kind}: {one.path.relative_to(results)}"
        lines.append((name, disk.size(one.bytes), f"{one.days:.1f}", f"stays: {one.stays}" if one.stays else ""))
    widths = [max(len(line[column]) for line in lines) for column in range(3)]
    return "\n".join(
        f"{name:<{widths[0]}}  {size:>{widths[1]}}  {days:>{widths[2]}}  {note}".rstrip()
        for name, size, days, note in lines
    )
