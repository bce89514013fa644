"""A hash over the meaning of code: a step's module and the local modules that it imports.

Comments, docstrings, formatting and annotations do not count, so that editing them reruns nothing;
anything else in a module that a step can reach does. Modules named `settings` are left out: they
hold no algorithm, and the values that they check stand in a rule's params. The dump is ours because `ast.dump` differs
between Python minors, which would rerun everything after an upgrade.
"""

import ast
import functools
import hashlib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "scripts"
_SKIPPED_FIELDS = {"annotation", "returns", "type_comment", "type_params", "ctx", "kind", "type_ignores"}


def code_key(*modules: str, root: Path = ROOT) -> str:
    """Hex sha256 over `modules` (dotted names under `scripts`) and all that they import, transitively.

    Raises:
        ModuleNotFoundError: a named module has no file below `root`.
    """
    digest = hashlib.sha256()
    for name in sorted(_closure(modules, root)):
        digest.update(f"{name}\0{_module_key(_file_of(name, root))}\0".encode())
    return digest.hexdigest()


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
        if name.endswith(".settings"):
            continue
        seen.add(name)
        todo.extend(n for n in _imports(name, path) if _file_of(n, root))
    return seen


def _file_of(name: str, root: Path) -> Path | None:
    if name.split(".")[0] != PACKAGE:
        return None
    base = root.joinpath(*name.split("."))
    for candidate in (base.with_suffix(".py"), base / "__init__.py"):
        if candidate.is_file():
            return candidate
    return None


def _imports(name: str, path: Path) -> frozenset[str]:
    return _imports_of_file(name, path, path.stat().st_mtime_ns, path.stat().st_size)


@functools.cache
def _imports_of_file(name: str, path: Path, mtime_ns: int, size: int) -> frozenset[str]:
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found: set[str] = set()
    for node in ast.walk(_tree(path)):
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
    return frozenset(found | parents)


def _tree(path: Path) -> ast.Module:
    return _parse(path, path.stat().st_mtime_ns, path.stat().st_size)


@functools.cache
def _parse(path: Path, mtime_ns: int, size: int) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def _module_key(path: Path) -> str:
    return hashlib.sha256(meaning(_tree(path)).encode()).hexdigest()


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
