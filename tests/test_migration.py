"""The migration tables: whatever they name on our side exists, and defaults that they tell are the defaults."""

import json
import re
import shlex
import subprocess
import sys
from typing import NamedTuple

import pytest
from pydantic import BaseModel
from workflow import ROOT, copy_checkout

from scripts.common import settings
from scripts.config import Config, section

PIPELINES = ("biomedica", "busi", "coca", "rae", "vase")
PAGES = {name: ROOT / f"docs/migration/{name}.md" for name in PIPELINES}
INDEX = ROOT / "docs/migration.md"
HEADER = ["original", "kind", "here", "note"]
KINDS = {"script", "flag", "key", "menu item", "output", "variable"}
DROPPED = "dropped"
PLACE = re.compile(r"(?:(rule|key|file|command|script|variable) )?`([^`]+)`")
BOTH = re.compile(r"`([^`]+)` both\b")
APART = re.compile(r"`[^`]+` there\b[^`]*`([^`]+)` here\b")
LIST_OUTPUTS = """
import json, sys
from pathlib import Path
from snakemake.api import SnakemakeApi
from snakemake.settings.types import OutputSettings, Quietness, ResourceSettings

with SnakemakeApi(OutputSettings(quiet={Quietness.ALL})) as api:
    made = api.workflow(ResourceSettings(cores=1), snakefile=Path(sys.argv[1]), workdir=Path(sys.argv[2]))
    rules = {one.name: [*one.output, *one.log, one.benchmark or ""] for one in made._workflow.rules}
print(json.dumps({name: [str(path) for path in paths] for name, paths in rules.items()}))
"""


class Row(NamedTuple):
    """A row of a table."""

    line: int
    original: str
    kind: str
    here: str
    note: str

    @property
    def names(self) -> list[tuple[str, ...]]:
        """What stands on the left: names in a script after its own, which comes first, else the one name."""
        found = re.findall(r"`([^`]+)`", self.original)
        return [(found[0], name) for name in found[1:]] or [tuple(found)]

    @property
    def places(self) -> list[tuple[str, str]]:
        """(kind, name) of all that stands under `here`; a kind holds for the names that follow it without one."""
        found, kind = [], ""
        for one in PLACE.finditer(self.here):
            kind = one[1] or kind
            found.append((kind, one[2]))
        return found


class Ours(NamedTuple):
    """What there is on our side."""

    paths: dict[str, list[str]]
    config: Config

    def lacks(self, kind: str, name: str) -> str | None:
        """Why there is no such thing; None if there is."""
        found = {
            "rule": lambda: name in self.paths,
            "key": lambda: has_key(name),
            "file": lambda: any(matches(name, path) for paths in self.paths.values() for path in paths),
            "command": lambda: self.knows(shlex.split(name)),
            "script": lambda: (ROOT / name).is_file(),
            "variable": lambda: any(name in path.read_text() for path in ROOT.glob("scripts/**/*.py")),
        }
        if kind not in found:
            return f"`{name}` is of no kind"
        return None if found[kind]() else f"no {kind} `{name}`"

    def knows(self, words: list[str]) -> bool:
        """Whether a command's target, module, options and settings exist."""
        if words[0] == "make":
            return bool(re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
        if words[:2] == ["python", "-m"]:
            module = ROOT / (words[2].replace(".", "/") + ".py")
            text = module.read_text() + (ROOT / "scripts/common/step.py").read_text() if module.is_file() else ""
            return bool(text) and all(f'"{word}"' in text for word in words[3:] if word.startswith("--"))
        if words[0] != "snakemake":
            return False
        known = True
        for before, word in zip(words, words[1:], strict=False):
            if before == "--profile":
                known &= (ROOT / word / "config.yaml").is_file()
            elif before == "--configfile":
                known &= (ROOT / word).is_file()
            elif before == "--config":
                known &= all(has_key(one.partition("=")[0]) for one in word.removeprefix("set=").split())
            elif not word.startswith("-") and before not in ("--cores", "--sdm"):
                known &= word in self.paths
        return known


def has_key(dotted: str) -> bool:
    """Whether the configuration has a setting, or a section, of that name."""
    place = Config
    for name in dotted.split("."):
        if not (isinstance(place, type) and issubclass(place, BaseModel)) or name not in place.model_fields:
            return False
        place = place.model_fields[name].annotation
    return True


def matches(name: str, path: str) -> bool:
    """Whether `name` is `path`, or a folder above it; a wildcard of `path` may be written out in `name`."""
    if name.endswith("/"):
        return any(matches(name[:-1], path[:end]) for end, letter in enumerate(path) if letter == "/")
    parts = re.split(r"\{(\w+)(?:,([^}]*))?\}", path)  # text, wildcard, its constraint, text, ...
    held = [rf"(?:\{{{one}\}}|{allowed or '[^/]+'})" for one, allowed in zip(parts[1::3], parts[2::3], strict=True)]
    return bool(re.fullmatch("".join(map("".join, zip(map(re.escape, parts[::3]), [*held, ""], strict=True))), name))


def read_rows(text: str) -> list[Row]:
    """The rows of all tables of a page."""
    rows, inside = [], False
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.startswith("|"):
            inside = False
            continue
        cells = [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if not inside:
            assert cells == HEADER, f"line {number}: {cells}"
            inside = True
        elif not set(line) <= set("|-"):
            assert len(cells) == len(HEADER), f"line {number}: {len(cells)} cells"
            rows.append(Row(number, *cells))
    return rows


def faults(text: str, ours: Ours) -> list[str]:
    """What is wrong with a page, a line each."""
    found, seen = [], {}
    for row in read_rows(text):
        where = f"line {row.line}"
        if row.kind not in KINDS:
            found.append(f"{where}: {row.kind!r} is none of {', '.join(sorted(KINDS))}")
        if row.names == [()]:
            found.append(f"{where}: nothing on the left")
        for name in row.names:
            if name in seen:
                found.append(f"{where}: {' '.join(name)} stands in line {seen[name]} already")
            seen[name] = row.line
        if row.here == DROPPED:
            if not row.note.startswith("because "):
                found.append(f"{where}: dropped, and no reason")
            continue
        if not row.places or PLACE.sub("", row.here).strip(" ,"):
            found.append(f"{where}: {row.here!r} is neither a list of names nor {DROPPED!r}")
        found += [f"{where}: {fault}" for one in row.places if (fault := ours.lacks(*one))]
        told = BOTH.search(row.note) or APART.search(row.note)
        keys = [name for kind, name in row.places if kind == "key" and has_key(name)]
        if told and keys:
            default = section(ours.config, keys[0])
            default = list(default) if isinstance(default, tuple) else default
            if settings.parse_overrides([f"x={told[1]}"])["x"] != default:
                found.append(f"{where}: {keys[0]} is {default!r}, not {told[1]}")
    return found


def wrong_in_passing(text: str, ours: Ours) -> list[str]:
    """Rules, keys, files of the checkout and commands that a text names and that do not exist."""
    wrong = []
    for name in re.findall(r"`([^`\n]+)`", text):
        if re.match(rf"({'|'.join(PIPELINES)})[._]\w", name):
            word = re.split(r"[:=]", name)[0]
            right = word in ours.paths or has_key(word)
        elif re.match(r"(scripts|config|envs|tests)/[\w./]+$", name):
            right = (ROOT / name).is_file() or name == "config/config.yaml"
        elif re.match(r"(make|snakemake|python -m) [a-z-]", name):
            right = ours.knows(shlex.split(name))
        else:
            continue
        if not right:
            wrong.append(name)
    return wrong


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """The workflow of a copy without a user's own configuration."""
    place = tmp_path_factory.mktemp("migration")
    checkout = copy_checkout(place / "checkout")
    (place / "run").mkdir()
    command = [sys.executable, "-c", LIST_OUTPUTS, checkout / "Snakefile", place / "run"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=checkout, timeout=120)
    assert done.returncode == 0, done.stderr[-4000:]
    return Ours(json.loads(done.stdout), Config())


@pytest.mark.parametrize("name", PIPELINES)
def test_all_that_a_table_names_exists(name, ours):
    text = PAGES[name].read_text(encoding="utf-8")
    assert not faults(text, ours)
    assert {"script", "flag", "key", "output"} <= {row.kind for row in read_rows(text)}


@pytest.mark.parametrize("name", PIPELINES)
def test_each_rule_is_named(name, ours):
    """By a row, or as new; rules that only gather others' files aside."""
    text = PAGES[name].read_text(encoding="utf-8")
    assert [
        rule
        for rule, paths in ours.paths.items()
        if rule.startswith(f"{name}_") and any(paths) and not re.search(rf"\b{rule}\b", text)
    ] == []


@pytest.mark.parametrize("path", [INDEX, *PAGES.values()], ids=lambda path: path.stem)
def test_what_notes_and_the_lines_between_tables_name_exists(path, ours):
    text = re.sub(r"^\|.*?\|.*?\|.*?\|", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert wrong_in_passing(text, ours) == []


@pytest.mark.parametrize(
    "text",
    [
        "`vase_splitt`",
        "`vase.sft.rl`",
        "`vase.sft.rl: 1`",
        "`make statusses`",
        "`scripts/vase/reward.py`",
        "`snakemake vse`",
    ],
)
def test_a_wrong_name_in_passing_is_found(text, ours):
    assert wrong_in_passing(f"See {text}, and `vase.sft.lr`.", ours) == [text.strip("`")]


def test_names_that_settings_know_of_originals_are_in_the_tables():
    """The hints at unknown keys, and the tables, tell the same."""

    def known(model, prefix):
        for name, field in model.model_fields.items():
            if isinstance(field.annotation, type) and issubclass(field.annotation, settings.Settings):
                yield from known(field.annotation, f"{prefix}{name}.")
        yield from ((old, prefix + new) for old, new in model.original_names.items())

    for name in PIPELINES:
        told = [row for row in read_rows(PAGES[name].read_text(encoding="utf-8")) if row.here != DROPPED]
        for old, new in known(Config.model_fields[name].annotation, f"{name}."):
            rows = [row for row in told if any(old in re.split(r"\W+", " ".join(one)) for one in row.names)]
            assert any(("key", new) in row.places for row in rows), f"{name}: {old} -> {new}"


def test_the_index_links_every_page():
    linked = re.findall(r"\(migration/(\w+)\.md\)", INDEX.read_text(encoding="utf-8"))
    assert sorted(set(linked)) == list(PIPELINES)
    assert {path.stem for path in ROOT.glob("docs/migration/*.md")} == set(PIPELINES)


TABLE = "| original | kind | here | note |\n|---|---|---|---|\n"


@pytest.mark.parametrize(
    "row",
    [
        "| `a.py` | script | rule `vase_split` | |",
        "| `--lr` | flag | key `vase.sft.lr`, rule `vase_train_sft` | `1e-4` both |",
        "| `x` | key | key `busi.train.epochs` | `50` there, `3` here: as its README says |",
        "| `y` | output | file `results/vase/train_sft/{variant}/best/` | |",
        "| `z` | output | file `results/busi/merge/main/{method}/parity.json`, `results/logs/busi/merge/` | |",
        "| `m` | menu item | command `make status`, `python -m scripts.busi.predict --adapter A --device cpu` | |",
        '| `n` | menu item | command `snakemake --cores 1 vase_images --config set="vase.threshold.value=0.1"` | |',
        "| `V` | variable | variable `HF_TOKEN` | |",
        "| `s` | script | script `scripts/vase/rewards.py` | |",
        "| `gone` `--one` `--two` | flag | dropped | because it does nothing |",
    ],
)
def test_a_good_row_passes(row, ours):
    assert faults(TABLE + row, ours) == []


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ("| `a` | script | rule `vase_splitt` | |", "no rule"),
        ("| `a` | key | key `vase.sft.learning_rate` | |", "no key"),
        ("| `a` | key | key `vase.sft.lr.x` | |", "no key"),
        ("| `a` | key | key `vase.sft.lr`, `vase.sft.rl` | |", "no key `vase.sft.rl`"),
        ("| `a` | key | key `vase.sft.lr` | `1e-5` both |", "is 0.0001, not 1e-5"),
        ("| `a` | key | key `busi.train.epochs` | `3` there, `50` here |", "is 3"),
        ("| `a` | output | file `results/vase/train_sft/{variant}/bets/` | |", "no file"),
        ("| `a` | output | file `results/vase/train_sft/best/` | |", "no file"),
        ("| `a` | output | file `results/vase/` | |\n| `b` | output | file `results/vases/` | |", "line 4: no file"),
        ("| `a` | output | file `results/vase/train_sft/{variant}/metrics.jsn` | |", "no file"),
        ("| `a` | output | file `results/vase/train_sft/{method}/metrics.json` | |", "no file"),
        ("| `a` | menu item | command `make statusses` | |", "no command"),
        ("| `a` | menu item | command `snakemake vase_image` | |", "no command"),
        ("| `a` | menu item | command `snakemake vase --config set=vase.sft.rl=1` | |", "no command"),
        ("| `a` | menu item | command `snakemake vase --profile slrum` | |", "no command"),
        ("| `a` | flag | command `python -m scripts.busi.predict --adaptor A` | |", "no command"),
        ("| `a` | flag | command `python -m scripts.busi.perdict` | |", "no command"),
        ("| `a` | flag | command `rm -rf results` | |", "no command"),
        ("| `a` | variable | variable `HF_TOKENS_OF_MINE` | |", "no variable"),
        ("| `a` | script | script `scripts/vase/reward.py` | |", "no script"),
        ("| `a` | script | `vase_split` | |", "of no kind"),
        ("| `a` | script | somewhere in rule `vase_split` | |", "neither"),
        ("| `a` | script | | |", "neither"),
        ("| `a` | flag | dropped | |", "no reason"),
        ("| `a` | falg | rule `vase_split` | |", "none of"),
        ("| a | flag | rule `vase_split` | |", "nothing on the left"),
        ("| `a` | flag | rule `vase` | |\n| `a` | key | rule `vase` | |", "in line 3 already"),
        ("| `a` `--b` `--c` | flag | rule `vase` | |\n| `a` `--c` | flag | rule `vase` | |", "a --c stands in line 3"),
    ],
)  # fmt: skip
def test_a_bad_row_is_found(row, fault, ours):
    found = faults(TABLE + row, ours)
    assert len(found) == 1
    assert fault in found[0]


@pytest.mark.parametrize("text", ["| original | kind | note | here |\n|---|---|---|---|\n", TABLE + "| `a` | script |"])
def test_a_table_of_another_form_is_refused(text):
    with pytest.raises(AssertionError):
        read_rows(text)
