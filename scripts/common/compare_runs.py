"""What differs between two results folders: settings, code, data, packages, outputs and scores.

    python -m scripts.common.compare_runs results/a results/b

All of it is read from records; nothing is hashed again (`snakemake verify` does that). The folders' own names do not
count. Exit status 0, whatever differs.
"""

import argparse
import collections
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from scripts.common import run_records, step, tables
from scripts.common.artefacts import read_json, write_json
from scripts.common.run_records import Records

SCRIPTS = Path(__file__).resolve().parents[1]
SHOWN = 12  # of long lists
ABSENT = "none"
LISTS = ("manifest.parquet", "labelled.parquet")  # tables of raw files: columns path, sha256
SECTIONS = ("settings", "code", "data", "packages", "outputs", "scores")

Found = dict[str, Any]  # by the name of what differs: {"a": ..., "b": ..., and what follows from them}


def compare(a: Path, b: Path) -> dict[str, Found]:
    """What differs, by section; a section without a difference is empty.

    Raises:
        KilnError: one is no results folder, or a record in it is damaged.
    """
    first, second = run_records.read(a), run_records.read(b)
    return {
        "settings": _settings_of_both(first, second),
        "code": _code(first, second),
        "data": _lists(first, second) | _differing(_raw_inputs(first), _raw_inputs(second)),
        "packages": _differing(_packages(first), _packages(second)),
        "outputs": _outputs(first, second),
        "scores": _scores(first, second),
    }


def _differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> Found:
    """{key: {a, b}} where they differ; without the side that lacks it."""
    sides = {"a": a, "b": b}
    both = {key: {name: one[key] for name, one in sides.items() if key in one} for key in sorted(a.keys() | b.keys())}
    return {key: found for key, found in both.items() if len(found) < 2 or found["a"] != found["b"]}


def _settings_of_both(first: Records, second: Records) -> Found:
    """Without the sections of pipelines that took no part in either."""
    found = _differing(_settings(first), _settings(second))
    sections = {key.partition(".")[0] for key in found}
    took_part = {one.step.split(".")[0] for records in (first, second) for one in records.artefacts}
    idle = {name for name in sections - took_part if (SCRIPTS / name / "settings.py").is_file()}
    return {key: sides for key, sides in found.items() if key.partition(".")[0] not in idle}


def _settings(records: Records) -> dict[str, Any]:
    """{dotted key: value}, with {results} for the folder's own name."""

    def flat(place: str, value: Any) -> Iterator[tuple[str, Any]]:
        if isinstance(value, dict) and value:
            for key, inner in value.items():
                yield from flat(f"{place}.{key}" if place else str(key), inner)
        elif isinstance(value, str) and value.startswith(f"{records.name}/"):
            yield place, "{results}" + value.removeprefix(records.name)
        else:
            yield place, value

    return {key: value for key, value in flat("", run_records.read_settings(records.folder)) if key != "results"}


def _code(first: Records, second: Records) -> Found:
    """By step: code keys, and the modules behind them that differ; the git commits."""
    a, b = _code_keys(first), _code_keys(second)
    found = _differing(a, b)
    before, now = run_records.noted_modules(first.folder), run_records.noted_modules(second.folder)
    for sides in found.values():
        if len(sides) < 2:
            continue
        old = {module: key for one in sides["a"] for module, key in before.get(one, {}).items()}
        new = {module: key for one in sides["b"] for module, key in now.get(one, {}).items()}
        sides["modules"] = list(_differing(old, new)) if old and new else None
    return found | _differing({"git commit": _commits(first)}, {"git commit": _commits(second)})


def _code_keys(records: Records) -> dict[str, list[str]]:
    found: dict[str, set[str]] = collections.defaultdict(set)
    for artefact in records.artefacts:
        found[artefact.step].add(artefact.record["code"])
    return {name: sorted(keys) for name, keys in found.items()}


def _commits(records: Records) -> list[str]:
    return sorted({one.record["git_commit"] for one in records.artefacts if one.record.get("git_commit")})


def _lists(first: Records, second: Records) -> Found:
    """By table of raw files: how many there are, and how many were added, removed and changed."""
    found: Found = {}
    both = first.files | second.files
    for file in sorted(one for one in both if one.rpartition("/")[2] in LISTS and one.count("/") == 2):
        if _of_step(file).startswith("list_"):
            a, b = (_rows(records, file) for records in (first, second))
            counts = {
                "added": len(b.keys() - a.keys()),
                "removed": len(a.keys() - b.keys()),
                "changed": sum(a[path] != b[path] for path in a.keys() & b.keys()),
            }
            if any(counts.values()):
                found[file] = {"a": len(a), "b": len(b), **counts}
    return found


def _of_step(file: str) -> str:
    return file.split("/")[1]


def _rows(records: Records, file: str) -> dict[str, str]:
    if file not in records.files:
        return {}
    rows = tables.read_table(records.folder / file, ["path", "sha256"])
    return dict(zip(rows["path"], rows["sha256"], strict=True))


def _raw_inputs(records: Records) -> dict[str, str]:
    """{what an artefact read from elsewhere: sha256}."""
    return {
        f"{artefact.meta}: {name}": one["sha256"]
        for artefact in records.artefacts
        for name, one in artefact.record["inputs"].items()
        if records.below(one["path"]) is None
    }


def _packages(records: Records) -> dict[str, list[str]]:
    """{package: versions}, by all records."""
    found: dict[str, set[str]] = collections.defaultdict(set)
    for artefact in records.artefacts:
        for name, version in (artefact.record.get("packages") or {}).items():
            found[name].add(version)
    return {name: sorted(versions) for name, versions in found.items()}


def _outputs(first: Records, second: Records) -> Found:
    """By step: how many outputs there are, and how many of those in both have other bytes."""
    found: Found = {}
    a, b = _by_step(first), _by_step(second)
    for name in sorted(a.keys() | b.keys()):
        old, new = a.get(name, {}), b.get(name, {})
        other = sum(old[file] != new[file] for file in old.keys() & new.keys())
        if other or old.keys() != new.keys():
            found[name] = {"a": len(old), "b": len(new), "other bytes": other}
    return found


def _by_step(records: Records) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = collections.defaultdict(dict)
    for artefact in records.artefacts:
        if run_records.CRATE not in artefact.outputs:  # it tells times
            found[artefact.step] |= {file: facts["sha256"] for file, facts in artefact.outputs.items()}
    return found


def _scores(first: Records, second: Records) -> Found:
    """By metric: both values with their intervals, b - a, and whether the intervals overlap (None: one has none)."""
    a, b = _summary(first), _summary(second)
    found: Found = {}
    for name in sorted(a.keys() | b.keys()):
        old, new = a.get(name, {}), b.get(name, {})
        if (old.get("value"), old.get("ci95")) == (new.get("value"), new.get("ci95")):
            continue
        one = {"a": old.get("value"), "b": new.get("value"), "ci95 a": old.get("ci95"), "ci95 b": new.get("ci95")}
        if old and new:
            one["difference"] = new["value"] - old["value"]
            ranges = one["ci95 a"], one["ci95 b"]
            one["overlap"] = _overlap(*ranges) if all(ranges) else None
        found[name] = one
    return found


def _summary(records: Records) -> dict[str, dict[str, Any]]:
    path = records.folder / "summary.json"
    read = read_json(path) if path.is_file() else {}
    return {f"{pipeline}.{name}": one for pipeline, metrics in read.items() for name, one in metrics.items()}


def _overlap(a: Sequence[float], b: Sequence[float]) -> bool:
    return a[0] <= b[1] and b[0] <= a[1]


SAME = "no difference by the records; files themselves are not read, which is what `verify` does"


def text(found: Mapping[str, Found]) -> str:
    """The differences as plain text, a table for each section that has some."""
    parts = [f"{section}\n{_table(_ROWS[section](found[section]))}" for section in SECTIONS if found[section]]
    same = [section for section in SECTIONS if not found[section]]
    if not parts:
        return SAME
    return "\n\n".join([*parts, *([f"the same: {', '.join(same)}"] if same else [])])


def _table(rows: Iterable[Sequence[str]]) -> str:
    rows = list(rows)
    more = len(rows) - 1 - 4 * SHOWN
    rows = rows[: 1 + 4 * SHOWN]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    lines = ["  " + "  ".join([*map(str.ljust, row, widths), row[-1]]).rstrip() for row in rows]
    return "\n".join([*lines, *([f"  and {more} more; --json FILE has all"] if more > 0 else [])])


def _plain_rows(found: Found) -> Iterator[list[str]]:
    yield ["", "a", "b"]
    for key, sides in found.items():
        yield [key, *(_said(sides[side]) if side in sides else ABSENT for side in ("a", "b"))]


def _code_rows(found: Found) -> Iterator[list[str]]:
    yield ["step", "a", "b", "modules that differ"]
    for key, sides in found.items():
        modules = sides.get("modules", [])
        more = f" and {len(modules) - SHOWN} more" if modules and len(modules) > SHOWN else ""
        why = "not noted in code/" if modules is None else ", ".join(modules[:SHOWN]) + more
        yield [key, _keys(sides.get("a")), _keys(sides.get("b")), why]


def _keys(keys: Sequence[str] | None) -> str:
    return ", ".join(key[:12] + ("-dirty" if key.endswith("-dirty") else "") for key in keys) if keys else ABSENT


def _data_rows(found: Found) -> Iterator[list[str]]:
    yield ["", "a", "b", ""]
    for key, sides in found.items():
        if "added" in sides:
            counts = ", ".join(f"{sides[name]} {name}" for name in ("added", "removed", "changed"))
            yield [key, f"{sides['a']} files", f"{sides['b']} files", counts]
        else:
            yield [key, *(sides.get(side, ABSENT)[:12] for side in ("a", "b")), ""]


def _package_rows(found: Found) -> Iterator[list[str]]:
    yield ["", "a", "b"]
    for key, sides in found.items():
        yield [key, *(", ".join(sides.get(side, [ABSENT])) for side in ("a", "b"))]


def _output_rows(found: Found) -> Iterator[list[str]]:
    yield ["step", "a", "b", "of those in both"]
    for key, sides in found.items():
        yield [key, f"{sides['a']} files", f"{sides['b']} files", f"{sides['other bytes']} with other bytes"]


def _score_rows(found: Found) -> Iterator[list[str]]:
    yield ["metric", "a", "b", "b - a", "95 % intervals"]
    for key, one in found.items():
        said = {True: "overlap", False: "apart", None: ""}[one.get("overlap")]
        difference = f"{one['difference']:+.4g}" if "difference" in one else ""
        yield [key, *(_score(one[side], one[f"ci95 {side}"]) for side in ("a", "b")), difference, said]


def _score(value: float | None, interval: Sequence[float] | None) -> str:
    if value is None:
        return ABSENT
    return f"{value:.4g}" + (f" [{interval[0]:.4g}, {interval[1]:.4g}]" if interval else "")


def _said(value: Any) -> str:
    said = json.dumps(value, ensure_ascii=False)
    return said if len(said) <= 60 else f"{said[:57]}..."


_ROWS = {
    "settings": _plain_rows,
    "code": _code_rows,
    "data": _data_rows,
    "packages": _package_rows,
    "outputs": _output_rows,
    "scores": _score_rows,
}


def main(argv: Sequence[str] | None = None) -> None:
    made = argparse.ArgumentParser(
        prog="python -m scripts.common.compare_runs",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("a", type=Path, help="a results folder, such as results/demo")
    made.add_argument("b", type=Path, help="another one")
    made.add_argument("--json", type=Path, metavar="FILE", help="write the differences there, too, all of them")
    args = made.parse_args(argv)
    found = compare(args.a, args.b)
    if args.json:
        write_json(args.json, found)
    print(text(found))


if __name__ == "__main__":
    step.run(main)
