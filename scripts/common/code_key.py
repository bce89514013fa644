"""A hash over the meaning of code: a step's module and the local modules that it imports.

Comments, docstrings, formatting and annotations do not count, so that editing them reruns nothing;
anything else in a module that a step can reach does. Modules named `settings` are left out: they
hold no algorithm, and the values that they check stand in a rule's params. So are the modules of `CALM`. The dump is
ours because `ast.dump` differs between Python minors, which would rerun everything after an upgrade.
"""

import ast
import contextlib
import functools
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from scripts.common.artefacts import write_text
from scripts.common.errors import KilnError

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "scripts"
# Modules that decide no number and no byte of an output but how a picture looks, so that editing them reruns nothing:
# neither they nor what only they import counts for a step that imports them. A module belongs here only by that rule.
# Rules that no training follows name the looks of their pictures themselves, and draw them anew.
CALM = frozenset(
    f"{PACKAGE}.common.{name}"
    for name in (
        "adopt",  # waits for Slurm jobs
        "cluster_guard",  # refuses to start
        "code_key",  # names code; what a key stands for is what is compared
        "disk",  # refuses to start, or to write
        "doctor",  # looks at the machine
        "errors",  # the wording of refusals
        "failures",  # tells of failed jobs
        "file_times",  # of files, not their content
        "heartbeat",  # tells how far a training is
        "launch",  # starts processes
        "locks",  # keeps others out
        "log_text",  # shortens logs
        "plots",  # looks of pictures
        "progress",  # shows how far a loop is; what it yields is what it was given
        "sheets",  # looks of pictures
        "slurm",  # asks Slurm
        "spent",  # removes states of trainings that are done
        "status",  # prints a table of trainings
        "step",  # a command line: what it parses stands in the rule's params, what it writes is its meta.json
        "supervision",  # signals, time and stalls
        "trackers",  # copies of numbers for TensorBoard and W&B
        "workers",  # starts processes
    )
)
_met: dict[str, "Facts"] = {}  # of this process, by name and content
KEPT = ROOT / PACKAGE / "__pycache__/code_keys.json"
_SKIPPED_FIELDS = {"annotation", "returns", "type_comment", "type_params", "ctx", "kind", "type_ignores"}


def code_key(*modules: str, root: Path = ROOT) -> str:
    """Hex sha256 over `modules` (dotted names under `scripts`) and all that they import, transitively.

    Raises:
        ModuleNotFoundError: a named module has no file below `root`.
    """
    digest = hashlib.sha256()
    for name, key in module_keys(*modules, root=root).items():
        digest.update(f"{name}\0{key}\0".encode())
    return digest.hexdigest()


def module_keys(*modules: str, root: Path = ROOT) -> dict[str, str]:
    """{module: hex sha256 over its meaning}, sorted, of all modules that count for `code_key` of the same arguments.

    Raises:
        ModuleNotFoundError: a named module has no file below `root`.
    """
    return {name: _facts(name, _file_of(name, root)).key for name in sorted(_closure(modules, root))}


def _closure(modules: tuple[str, ...], root: Path) -> set[str]:
    seen: set[str] = set()
    todo = list(modules)
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        path = _file_of(name, root)
        if path is None:
            raise ModuleNotFoundError(f"no module {name} below {root}")
        if name.endswith(".settings") or (name in CALM and name not in modules):
            continue
        seen.add(name)
        todo.extend(n for n in _facts(name, path).imports if _file_of(n, root))
    return seen


def _file_of(name: str, root: Path) -> Path | None:
    if name.split(".")[0] != PACKAGE:
        return None
    base = root.joinpath(*name.split("."))
    for candidate in (base.with_suffix(".py"), base / "__init__.py"):
        if candidate.is_file():
            return candidate
    return None


class Facts(NamedTuple):
    """What decides code keys of a module: the local modules that it imports, were they there, and its own key."""

    imports: frozenset[str]
    key: str


def _facts(name: str, path: Path) -> Facts:
    return _facts_at(name, path, path.stat().st_mtime_ns, path.stat().st_size)


@functools.cache
def _facts_at(name: str, path: Path, mtime_ns: int, size: int) -> Facts:
    source = path.read_bytes()
    digest = hashlib.sha256(f"{name}\0{path.name}\0".encode() + source).hexdigest()
    _met[digest] = _kept().get(digest) or _parsed(name, path, source)
    return _met[digest]


def _parsed(name: str, path: Path, source: bytes) -> Facts:
    tree = ast.parse(source, filename=str(path))
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found: set[str] = set()
    for node in _statements(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, base] if base else parents)
            found.add(base)
            found.update(f"{base}.{alias.name}" for alias in node.names)
    parents = {".".join(n.split(".")[:i]) for n in found | {name} for i in range(1, n.count(".") + 1)}
    local = frozenset(n for n in found | parents if n.split(".")[0] == PACKAGE)
    return Facts(local, hashlib.sha256(meaning(tree).encode()).hexdigest())


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    """All statements below one; expressions, most of a tree, hold none."""
    for field in ("body", "orelse", "handlers", "finalbody", "cases"):
        below = getattr(node, field, ())
        for one in below if isinstance(below, list) else ():
            yield one
            yield from _statements(one)


def keep() -> None:
    """Leave what is known of the modules met so far, so that the next process parses those alone that changed.

    That is a second of a command. Like bytecode, it lies in a `__pycache__`, and may be deleted or unwritable.
    """
    if _met.keys() <= _kept().keys():
        return
    modules = {digest: [sorted(facts.imports), facts.key] for digest, facts in sorted(_met.items())}
    with contextlib.suppress(OSError, KilnError):  # a checkout that this user cannot write
        write_text(KEPT, json.dumps({"by": _self(), "modules": modules}))


@functools.cache
def _kept() -> dict[str, Facts]:
    try:
        left = json.loads(KEPT.read_text(encoding="utf-8"))
        found = {digest: Facts(frozenset(imports), str(key)) for digest, (imports, key) in left["modules"].items()}
        return found if left["by"] == _self() else {}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):  # there is none, or it is damaged
        return {}


def _self() -> str:
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()


def meaning(node: ast.AST, in_class: bool = False) -> str:
    """A text that two syntax trees share exactly when they mean the same to a running program."""
    if isinstance(node, ast.AnnAssign) and node.value is not None and not in_class:
        return f"Assign(targets=[{meaning(node.target)}],value={meaning(node.value)})"  # in a class: a field
    in_class = isinstance(node, ast.ClassDef)
    parts = []
    for field, value in ast.iter_fields(node):
        if field in _SKIPPED_FIELDS or value is None or value == []:
            continue
        if field == "body" and isinstance(value, list):
            value = _without_docstring(value)
        if isinstance(node, ast.JoinedStr):
            value = [part for part in value if getattr(part, "value", None) != ""]  # 3.12 alone adds empty ends
        parts.append(f"{field}={_dump(value, in_class)}")
    return f"{type(node).__name__}({','.join(parts)})"


def _dump(value, in_class: bool) -> str:
    if isinstance(value, ast.AST):
        return meaning(value, in_class)
    if isinstance(value, list):
        return f"[{','.join(_dump(item, in_class) for item in value)}]"
    return ascii(value)  # repr escapes what this Python's Unicode tables do not know yet


def _without_docstring(body: list) -> list:
    return [
        node
        for node in body
        if not (
            isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        )
    ]
