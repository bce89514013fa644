"""Code keys: what changes them, what does not, and that every Python gives the same."""

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scripts.common.code_key import CALM, code_key, module_keys

GOLDEN = "2b134f5c33b365b81edf99302fbb1a7f1eb1fba28bae0753018783e750f7e4c6"

# Every kind of statement that 3.11 knows, among them what Pythons disagree about: f-strings, text that older
# Unicode tables call unprintable, numbers in odd notations.
TREE = {
    "scripts/__init__.py": "",
    "scripts/p/__init__.py": '"""A package."""\nLEVEL = 3\n',
    "scripts/p/step.py": '''
        """A step."""
        from __future__ import annotations

        import os, sys as system
        from dataclasses import dataclass, field
        from typing import NamedTuple

        from scripts.common import helper
        from . import near
        from .near import *

        LIMIT: int = 1_000
        odd = (0x1F, 0b11, 1e-7, 1.0, 3j, -0.0, 10**400, b"\\x00\\xff", ..., None, True)
        text = "caf\\u00e9 \\U0001fae8 \\u0378" 'joined' u"kind" r"\\d"


        @dataclass(frozen=True)
        class Point(NamedTuple if LIMIT else object, metaclass=type):
            """A point."""

            x: int
            y: float = 0.5
            z = field(default=1)

            @property
            async def far(self, /, a: int, *args: int, b=2, c, **kwargs: str) -> bool:
                """Whether it is far."""
                async with self as one, helper.open() as two:
                    await one
                async for i in two:
                    yield i
                return None


        def f(x, y=(1, 2), *, z: float = 3.0) -> str:
            global LIMIT
            total: float = 0
            try:
                for i, *rest in enumerate(x):
                    while (n := i) < 3:
                        n += 1
                        continue
                    else:
                        break
            except* (ValueError, OSError) as error:
                raise RuntimeError from error
            finally:
                del x
            assert total, f"{total=} {x!r:>{y}} {{}} {z:.2f}" f"{'nested'}"
            match y:
                case {"a": 1, **others} | [1, *_] if others:
                    pass
                case Point(x=0) | None | -1.5 | "s":
                    import scripts.common.late
                case _:
                    nonsense = lambda a, *b: [c for c in b if c for d in c]
            with open(os.devnull) as handle, (handle):
                return {**z, "k": x[1:2, ::3, ...]} if not total else {*x, ~total @ 3, *[1]}
            return (yield from (a for a in x)), 1 < 2 <= 3 != 4 is not None not in y
    ''',
    "scripts/p/near.py": "VALUE = 'é'\n",
    "scripts/common/__init__.py": "",
    "scripts/common/helper.py": "from scripts.common import deep\n\n\ndef open():\n    return deep.NUMBER\n",
    "scripts/common/deep.py": "NUMBER = 7\n",
    "scripts/common/late.py": "WHEN = 'late'\n",
    "scripts/common/unrelated.py": "NUMBER = 7\n",
    "scripts/q/__init__.py": "",
    "scripts/q/step.py": "import scripts.common.unrelated\n",
}


def write(root: Path, tree: dict[str, str]) -> Path:
    for name, text in tree.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text), encoding="utf-8")
    return root


def key_of(folder: Path, source: str, **others: str) -> str:
    """Key of module `scripts.m` with this source, beside other modules: `a__b` is `scripts/a/b.py`, `a__` a package."""
    files = {"scripts/__init__.py": "", "scripts/m.py": source}
    for name, text in others.items():
        place = name.replace("__", "/") + ("__init__.py" if name.endswith("__") else ".py")
        files[f"scripts/{place}"] = text
    write(folder, files)
    return code_key("scripts.m", root=folder)


@pytest.fixture
def key(tmp_path_factory):
    return lambda source, **others: key_of(tmp_path_factory.mktemp("tree"), source, **others)


BASE = '''
"""Doc."""
import os
from typing import Final

SCALE = 2.0
NAME = "a"


def f(x, y=1, *, z=None):
    """Double."""
    total = x * SCALE + y
    for i in range(3):
        total += i
    return total if z is None else -total


class A:
    """A class."""

    size: int = 3

    def g(self):
        return self.size
'''


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"""Doc."""', '"""Another docstring,\nof two lines."""'),
        ('"""Doc."""\n', ""),
        ('    """Double."""\n', ""),
        ('    """A class."""\n', '    """Another."""\n'),
        ("SCALE = 2.0", "SCALE = 2.0  # a comment"),
        ("SCALE = 2.0", "# a line of its own\nSCALE = 2.0"),
        ("SCALE = 2.0", "SCALE: Final[float] = 2.0"),
        ("SCALE = 2.0", "SCALE = (\n    2.0\n)"),
        ("SCALE = 2.0", "SCALE = 2.00"),
        ("SCALE = 2.0", "SCALE = 2.0  # type: float"),
        ("SCALE = 2.0", "SCALE = 2.0; "),
        ('NAME = "a"', "NAME = 'a'"),
        ('NAME = "a"', 'NAME = "" "a"'),
        ('NAME = "a"', 'NAME = u"a"'),
        ('NAME = "a"', 'NAME = "\\x61"'),
        ("def f(x, y=1, *, z=None):", "def f(x: int, y: float = 1, *, z: str | None = None) -> float:"),
        ("def f(x, y=1, *, z=None):", "def f(\n    x,\n    y=1,\n    *,\n    z=None,\n):"),
        ("total = x * SCALE + y", "total = (x * SCALE) + y"),
        ("total = x * SCALE + y", "total: float = x * SCALE + y"),
        ("total = x * SCALE + y", "total = x * SCALE + y\n    'a text that nothing uses'"),
        ("total += i", "total \\\n            += i"),
        ("size: int = 3", "size: float = 3"),
        ("\n\n\n", "\n\n\n\n\n"),
        ("def g(self):", "def g(self) -> int:"),
    ],
)
def test_what_means_the_same_keeps_the_key(key, old, new):
    assert old in BASE
    assert key(BASE.replace(old, new)) == key(BASE)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("SCALE = 2.0", "SCALE = 2.5"),
        ("SCALE = 2.0", "SCALE = 2"),
        ("SCALE = 2.0", "SCALE = -2.0"),
        ("SCALE = 2.0", 'SCALE = "2.0"'),
        ("SCALE = 2.0", "SCALE = None"),
        ("SCALE = 2.0", "SCALE = True"),
        ("SCALE = 2.0", "SCALE = 2.0,"),
        ("SCALE = 2.0", "SCALE: float"),
        ("SCALE = 2.0", "SCALE = [[]]"),
        ('NAME = "a"', 'NAME = "b"'),
        ('NAME = "a"', 'NAME = b"a"'),
        ('NAME = "a"', 'NAME = "a "'),
        ('NAME = "a"', 'NAME = f"{a}"'),
        ("y=1", "y=2"),
        ("*, z=None", "z=None"),
        ("x, y=1, *", "y, x=1, *"),
        ("def f(x, y=1, *, z=None):", "@functools.cache\ndef f(x, y=1, *, z=None):"),
        ("def f(", "async def f("),
        ("x * SCALE", "x / SCALE"),
        ("x * SCALE + y", "x * (SCALE + y)"),
        ("x * SCALE + y", "y + x * SCALE"),
        ("total += i", "total -= i"),
        ("range(3)", "range(4)"),
        ("z is None", "z is not None"),
        ("z is None", "z == None"),
        ("else -total", "else total"),
        ("import os", "import sys"),
        ("import os", "import os as sys"),
        ("import os\n", "import os\nimport sys\n"),
        ("from typing import Final", "from typing import ClassVar"),
        ("class A:", "class A(dict):"),
        ("size: int = 3", "size: int = 4"),
        ("size: int = 3", "size = 3"),  # of a dataclass, this is no field any more
        ("size: int = 3", "size: int"),
        ("return self.size", "return self.sizes"),
        ("        total += i\n", "        pass\n"),
        ("    for i in range(3):\n        total += i\n", "    for i in range(3):\n        pass\n    total += i\n"),
    ],
)
def test_any_other_edit_changes_the_key(key, old, new):
    assert old in BASE
    assert key(BASE.replace(old, new)) != key(BASE)


CONSTANTS = st.one_of(
    st.integers(),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(),
    st.binary(),
    st.booleans(),
    st.none(),
    st.just(...),
)


def same(a, b) -> bool:
    """Equal and of one type, with -0.0 another value than 0.0."""
    return type(a) is type(b) and repr(a) == repr(b)


@settings(deadline=None)
@given(CONSTANTS, CONSTANTS)
def test_constants_share_a_key_exactly_when_they_are_the_same(tmp_path_factory, a, b):
    folder = tmp_path_factory.mktemp("tree")
    keys = [key_of(folder / name, f"X = f({value!r}, k={value!r})\n") for name, value in (("a", a), ("b", b))]
    assert (keys[0] == keys[1]) == same(a, b)


@pytest.mark.parametrize(
    "statement",
    [
        "import scripts.h",
        "import scripts.h as other",
        "from scripts import h",
        "from scripts.h import X",
        "from scripts.h import X as Y",
        "from scripts.h import *",
        "from . import h",
        "from .h import X",
        "def f():\n    import scripts.h",
        "def f():\n    from .h import X",
        "class A:\n    def g(self):\n        if self:\n            from scripts import h",
        "try:\n    import scripts.h\nexcept ImportError:\n    pass",
        "import scripts.between",
        "from scripts.package import anything",
        "import scripts.package.inner",
    ],
)
def test_imports_are_followed(key, statement):
    def with_value(value):
        return key(
            f"{statement}\n",
            h=f"X = {value}\n",
            between="from .h import X\n",
            package__="from ..h import X\n",
            package__inner="",
        )

    assert with_value(1) == with_value("1  # still one")
    assert with_value(1) != with_value(2)


def test_relative_imports_from_a_package_and_its_parent(key):
    def with_value(value):
        modules = {"p__": "from .inner import Y\n", "p__inner": "from ..h import X\n", "h": f"X = {value}\n"}
        return key("import scripts.p\n", **modules)

    assert with_value(1) != with_value(2)


def test_a_package_init_counts(key):
    assert key("import scripts.p.inner\n", p__inner="", p__="X = 1\n") != key(
        "import scripts.p.inner\n", p__inner="", p__="X = 2\n"
    )


def test_what_is_not_imported_does_not_count(key):
    assert key("import os\n", other="X = 1\n") == key("import os\n", other="X = 2\n")
    assert key("import os\n", other="X = 1\n") == key("import os\n")


def test_settings_modules_are_left_out(key):
    def with_settings(text):
        return key("from scripts.p.settings import S\n", p__="", p__settings=text)

    assert with_settings("X = 1\n") == with_settings("X = 2\n")


def test_calm_modules_and_what_only_they_import_are_left_out(key):
    def with_texts(step, beyond, shared):
        return key(
            "import scripts.common.step\nimport scripts.common.shared\n",
            common__="",
            common__step=f"import scripts.common.beyond, scripts.common.shared\n{step}",
            common__beyond=beyond,
            common__shared=shared,
        )

    assert with_texts("X = 1\n", "X = 1\n", "X = 1\n") == with_texts("X = 2\n", "X = 2\n", "X = 1\n")
    assert with_texts("X = 1\n", "X = 1\n", "X = 1\n") != with_texts("X = 1\n", "X = 1\n", "X = 2\n")


KEYS = """
import ast, json, sys
from scripts.common import code_key
if sys.argv[1] == "parses nothing":
    ast.parse = None
print(json.dumps([code_key.code_key("scripts.vase.split"), code_key.code_key("scripts.coca.train")]))
code_key.keep()
"""


def test_what_is_kept_gives_the_same_keys_and_any_edit_is_seen(root, tmp_path):
    """Also where it is damaged, of another version of the module, or cannot be kept."""
    checkout = tmp_path / "checkout"
    shutil.copytree(root / "scripts", checkout / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
    kept = checkout / "scripts/__pycache__/code_keys.json"

    def keys(mode: str = "") -> list[str]:
        done = subprocess.run([sys.executable, "-c", KEYS, mode], cwd=checkout, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout)

    first = keys()
    assert kept.is_file() and keys("parses nothing") == first
    written = kept.read_text()
    for damaged in ("", "[]", written[:-9], json.dumps(json.loads(written) | {"by": "another"})):
        kept.write_text(damaged)
        assert keys() == first and kept.read_text() == written
    step = checkout / "scripts/vase/split.py"
    facts, text = step.stat(), step.read_text()
    step.write_text(text + "\nX = 1\n")
    os.utime(step, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    changed = keys()
    assert changed[0] != first[0] and changed[1] == first[1]
    kept.unlink()
    assert keys() == changed
    shutil.rmtree(kept.parent)
    kept.parent.write_text("no folder")
    assert keys() == changed
    step.write_text(text)
    assert keys() == first


def test_every_calm_module_exists(root):
    assert [name for name in sorted(CALM) if not (root / f"{name.replace('.', '/')}.py").is_file()] == []


LOOKS = {"draw_classifier", "draw_curves", "draw_funnels", "evaluate"}  # steps that no training follows


def keys_of_rules(root: Path, at: Path) -> dict[tuple[str, ...], str]:
    """{the modules that a rule keys: their code key by the files below `at`}, of every rule."""
    text = "".join(path.read_text() for path in sorted((root / "rules").glob("*.smk")))
    places = [tuple(re.findall(r'"(scripts[.\w]+)"', found)) for found in re.findall(r"code_key\(([^)]*)\)", text)]
    places += [tuple(re.findall(r'"(scripts[.\w]+)"', found)) for found in re.findall(r"_CODE = \(([^)]*)\)", text)]
    return {modules: code_key(*modules, root=at) for modules in places if modules}


def test_a_calm_module_changes_only_rules_that_name_it_and_another_those_that_use_it(root, tmp_path):
    shutil.copytree(root / "scripts", tmp_path / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
    before = keys_of_rules(root, tmp_path)
    assert len(before) > 60
    for name in CALM:
        with (tmp_path / f"{name.replace('.', '/')}.py").open("a") as handle:
            handle.write("\nMORE = 1\n")
    after = keys_of_rules(root, tmp_path)
    named = {modules for modules in before if CALM.intersection(modules)}
    assert {modules for modules in before if after[modules] != before[modules]} == named
    assert {modules[0].rsplit(".", 1)[1] for modules in named} == LOOKS
    before = after
    with (tmp_path / "scripts/common/images.py").open("a") as handle:
        handle.write("\nMORE = 1\n")
    after = keys_of_rules(root, tmp_path)
    users = {modules for modules in before if "scripts.common.images" in module_keys(*modules)}
    assert {modules for modules in before if after[modules] != before[modules]} == users
    assert 20 < len(users) < len(before) - 20


def test_module_keys_name_the_module_that_changed(tmp_path):
    before = module_keys("scripts.p.step", root=write(tmp_path, TREE))
    after = module_keys("scripts.p.step", root=write(tmp_path, {"scripts/common/deep.py": "NUMBER = 8\n"}))
    assert {name for name in before | after if before.get(name) != after.get(name)} == {"scripts.common.deep"}


def test_cycles_end(key):
    assert key("import scripts.h\n", h="import scripts.m\n")


def test_another_module_name_is_another_key(tmp_path):
    write(tmp_path, {"scripts/__init__.py": "", "scripts/a.py": "X = 1\n", "scripts/b.py": "X = 1\n"})
    a, b = (code_key(f"scripts.{name}", root=tmp_path) for name in "ab")
    both = code_key("scripts.a", "scripts.b", root=tmp_path)
    assert len({a, b, both}) == 3
    assert both == code_key("scripts.b", "scripts.a", "scripts.b", root=tmp_path)


@pytest.mark.parametrize("name", ["scripts.none", "os", "scripts.common.errors.KilnError"])
def test_a_module_that_is_not_there(name):
    with pytest.raises(ModuleNotFoundError, match=name):
        code_key(name)


def test_an_edit_is_seen_by_the_same_process(tmp_path):
    assert key_of(tmp_path, "X = 1\n") != key_of(tmp_path, "X = 10\n")


def test_golden_value(tmp_path):
    """A change here reruns everything of every user: change it only on purpose."""
    assert code_key("scripts.p.step", root=write(tmp_path, TREE)) == GOLDEN


def test_the_golden_tree_is_followed(tmp_path):
    def changed(name):
        folder = write(tmp_path / name.replace("/", "_"), TREE | {name: TREE[name] + "\nMORE = 1\n"})
        return code_key("scripts.p.step", root=folder) != GOLDEN

    reached = {name for name in TREE if name != "scripts/p/step.py" and changed(name)}
    assert reached == {
        "scripts/__init__.py", "scripts/p/__init__.py", "scripts/p/near.py", "scripts/common/__init__.py",
        "scripts/common/helper.py", "scripts/common/deep.py", "scripts/common/late.py",
    }  # fmt: skip


def other_pythons() -> list[Path]:
    """Interpreters of other supported minors: on the PATH, and pyenv's."""
    folders = [Path(p) for p in os.environ.get("PATH", "").split(":")]
    folders += sorted(Path.home().glob(".pyenv/versions/3.*/bin"))
    found = {}
    for minor in range(11, 16):
        for folder in folders:
            path = folder / f"python3.{minor}"
            if minor != sys.version_info.minor and path.is_file() and "shims" not in folder.parts:
                found.setdefault(minor, path)
    return list(found.values())


REPORT = """
import json, pathlib, sys
sys.path.insert(0, sys.argv[1])
from scripts.common.code_key import CALM, code_key, module_keys
tree, steps = pathlib.Path(sys.argv[2]), sys.argv[3:]
print(json.dumps([code_key("scripts.p.step", root=tree), *(code_key(step) for step in steps)]))
"""


def test_other_pythons_agree(tmp_path, root):
    """Alone, without site-packages: the golden tree and every module of the project."""
    pythons = other_pythons()
    if not pythons:
        pytest.skip("no other Python from 3.11 on is installed here")
    write(tmp_path, TREE)
    modules = [".".join(p.relative_to(root).with_suffix("").parts) for p in sorted(root.glob("scripts/*/*.py"))]
    modules = [name for name in modules if not name.endswith(("__init__", ".settings"))]
    here = [GOLDEN, *(code_key(name) for name in modules)]
    for python in pythons:
        command = [python, "-I", "-S", "-c", REPORT, str(root), str(tmp_path), *modules]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{python}: {done.stderr}"
        assert dict(zip(["golden", *modules], json.loads(done.stdout), strict=True)) == dict(
            zip(["golden", *modules], here, strict=True)
        ), python
