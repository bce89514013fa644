"""What the documents tell to type can be typed: every command of a fenced block, every link, both languages alike.

A block's info string says what it is. `bash run` is run. `bash` (and `bash gpu`, of commands that need one) is read by
bash with stand-ins for all programs, so that loops, variables and quotes count; then each call that they were given is
checked: Snakemake makes a plan of it, a step's `--help` has its options, `make -n` has its target. Others (`text`,
`yaml`, `python`, `diff`) are no commands.
"""

import functools
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from markdown_it import MarkdownIt

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [
    path
    for pattern in ("*.md", "docs/**/*.md", "benchmarks/README.md", "config/README.md")
    for path in sorted(ROOT.glob(pattern))
]
OF_KILN = [path for path in DOCUMENTS if path.parent.name != "migration"]  # these name the originals' commands, too
COMMANDS = ("bash", "bash gpu", "bash run")
OTHERS = ("text", "yaml", "python", "diff")
OURS = ("snakemake", "python", "make", "torchrun", "tensorboard", "hf")  # calls of these are checked
THEIRS = ("git", "grep", "mkdir", "nano", "sinfo", "squeue", "tail", "tmux")


class Block(NamedTuple):
    """A fenced block of a document."""

    place: str
    info: str
    text: str


class Call(NamedTuple):
    """A call of a program that a block makes."""

    place: str
    program: str
    arguments: tuple[str, ...]


def tokens(path: Path):
    return MarkdownIt("commonmark").enable("table").parse(path.read_text(encoding="utf-8"))


def blocks(path: Path) -> list[Block]:
    name = path.relative_to(ROOT).as_posix()
    return [
        Block(f"{name}:{one.map[0] + 1}", one.info.strip(), one.content) for one in tokens(path) if one.type == "fence"
    ]


BLOCKS = [block for path in DOCUMENTS for block in blocks(path)]

STAND_IN = """#!/usr/bin/env bash
printf '%s\\0' "${0##*/}" "$@" $'\\036' >> "$CALLS"  # at once: the parts of a pipe write side by side
[ "${0##*/}" != git ] || ln -sfn . kiln  # a clone is this very folder
"""


@functools.cache
def stand_ins(folder: Path) -> Path:
    """A folder with stand-ins on PATH and in .venv/bin, which write down how they are called."""
    for place in (folder / "bin", folder / ".venv/bin"):
        place.mkdir(parents=True)
        for name in [*OURS, *THEIRS]:
            (place / name).write_text(STAND_IN)
            (place / name).chmod(0o755)
    (folder / ".venv/bin/activate").touch()
    (folder / "own").mkdir()  # what the stand-ins need themselves
    for name in ("bash", "ln"):
        (folder / "own" / name).symlink_to(shutil.which(name))
    return folder


def calls(block: Block, folder: Path) -> list[Call]:
    """The calls that a block makes, as bash reads it."""
    stand_ins(folder)
    written = folder / "calls"
    written.unlink(missing_ok=True)
    text = block.text.replace("<this repository>", "https://host/kiln")
    done = subprocess.run(
        [shutil.which("bash"), "-eu", "-c", f"sweep=\n{text}"], cwd=folder, capture_output=True, text=True, timeout=60,
        env={"PATH": f"{folder / 'bin'}:{folder / 'own'}", "CALLS": str(written)},
    )  # fmt: skip
    assert done.returncode == 0, f"{block.place}: {done.stderr}"
    each = written.read_text().split("\036\0")[:-1] if written.exists() else []
    found = [one.split("\0")[:-1] for one in each]
    return [Call(block.place, program, tuple(rest)) for program, *rest in found if program in OURS]


@functools.cache
def all_calls() -> list[Call]:
    """The calls of all documents; the same call in several places counts once."""
    with tempfile.TemporaryDirectory() as folder:
        found = [call for block in BLOCKS if block.info in COMMANDS for call in calls(block, Path(folder).resolve())]
    once: dict[tuple, Call] = {}
    for call in found:
        once.setdefault(call[1:], call)
    return list(once.values())


def of(program: str) -> list:
    """The calls of a program, as parameters of a test."""
    return [pytest.param(call, id=f"{call.place} {n}") for n, call in enumerate(all_calls()) if call.program == program]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of the checkout with this environment, whose user's settings are the demo's."""
    folder = tmp_path_factory.mktemp("documents") / "kiln"
    away = (".git", ".venv*", "results", "data", "resources", "output", ".snakemake", "__pycache__", ".*_cache")
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*away), symlinks=True)
    (folder / ".venv").symlink_to(ROOT / ".venv")
    demo = (folder / "config/demo.yaml").read_text().replace("results/demo", "results")
    (folder / "config/config.yaml").write_text(demo)
    profile = (folder / "slurm/config.yaml").read_text()
    (folder / "slurm/config.yaml").write_text(
        profile.replace("software-deployment-method: conda\n", "")
    )  # maybe not here
    return folder


def typed(checkout: Path, *command: str, **variables: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        command, cwd=checkout, capture_output=True, text=True, timeout=600, env=os.environ | variables
    )  # fmt: skip


def test_every_block_says_what_it_is():
    wrong = [f"{block.place}: {block.info!r}" for block in BLOCKS if block.info not in (*COMMANDS, *OTHERS)]
    assert not wrong, f"expected one of {[*COMMANDS, *OTHERS]}"


def test_the_documents_hold_commands_of_every_kind():
    """That the other tests are about something."""
    found = {call.program for call in all_calls()}
    assert {"snakemake", "python", "make"} <= found
    assert {block.info for block in BLOCKS} >= set(COMMANDS)
    assert any(block.info == "bash run" for block in blocks(ROOT / "README.md"))


@pytest.mark.parametrize("call", of("snakemake"))
def test_snakemake_is_told_how_many_cores_or_only_plans(call):
    """It would stop else; that the other test adds -n does not show it."""
    words = {word.partition("=")[0] for word in call.arguments}
    told = {"--cores", "-c", "--profile", "-n", "--dry-run", "--unlock", "--lint"}
    assert words & told, f"{call.place}: {' '.join(call.arguments)}"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("snakemake -n \\\n  'a b'  # why", [("snakemake", ("-n", "a b"))]),
        ("for x in 1 2; do make $x; done", [("make", ("1",)), ("make", ("2",))]),
        (".venv/bin/python -m x | grep y", [("python", ("-m", "x"))]),
    ],
)
def test_bash_reads_the_blocks(tmp_path, text, wanted):
    assert [call[1:] for call in calls(Block("here", "bash", text), tmp_path)] == wanted


@pytest.mark.parametrize("text", ["snakemacke -n", "if", "make 'a", "false"])
def test_what_cannot_be_typed_fails(tmp_path, text):
    with pytest.raises(AssertionError, match="here:"):
        calls(Block("here:", "bash", text), tmp_path)


def users_files(checkout: Path, argument: str) -> str:
    """An argument whose paths of the user's own lie below `checkout`, as empty files."""
    for path in re.findall(r"(?<!\w)/(?:data|models)/[\w./-]+", argument):
        own = checkout / "own" / path.lstrip("/")
        own.parent.mkdir(parents=True, exist_ok=True)
        own.touch()
        argument = argument.replace(path, str(own))
    return argument


@pytest.mark.slow(minutes=5)
@pytest.mark.parametrize("call", of("snakemake"))
def test_snakemake_plans_it(checkout, call):
    if "--conda-create-envs-only" in call.arguments and not shutil.which("conda"):
        pytest.skip("there is no conda")
    dry = [users_files(checkout, one) for one in call.arguments]
    if not {"-n", "--dry-run"} & set(dry):
        dry = ["-n", *dry]
    done = typed(checkout, str(ROOT / ".venv/bin/python"), "-m", "snakemake", *dry, HF_HUB_OFFLINE="1")
    assert done.returncode == 0, f"{call.place}: {' '.join(call.arguments)}\n{(done.stdout + done.stderr)[-3000:]}"


def module_and_options(call: Call) -> tuple[str, list[str]]:
    """The module that `python -m` or torchrun runs, and the options that it is given."""
    at = call.arguments.index("-m")
    return call.arguments[at + 1], [one for one in call.arguments[at + 2 :] if one.startswith("--")]


@functools.cache
def help_of(module: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", module, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, f"{module} --help: {done.stderr[-2000:]}"
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("call", [*of("python"), *of("torchrun")])
def test_the_step_has_the_options(call):
    module, options = module_and_options(call)
    known = set(re.findall(r"--[\w-]+", help_of(module)))
    assert set(options) <= known, f"{call.place}: {module} has no {set(options) - known}"


@pytest.mark.parametrize("call", of("make"))
def test_make_has_the_target(call):
    done = typed(ROOT, "make", "-n", *call.arguments)
    assert done.returncode == 0, f"{call.place}: {done.stderr}"


@pytest.mark.parametrize(
    "target", sorted({one for path in OF_KILN for one in re.findall(r"`make ([a-z-]+)", path.read_text())})
)
def test_targets_that_are_named_in_passing_are_there(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M), f"make {target}"


@pytest.mark.parametrize("call", [*of("tensorboard"), *of("hf")])
def test_the_program_is_installed(call):
    assert (Path(sys.executable).parent / call.program).is_file()


@pytest.mark.slow
@pytest.mark.parametrize("block", [pytest.param(b, id=b.place) for b in BLOCKS if b.info == "bash run"])
def test_a_block_that_says_run_runs(checkout, block):
    activated = f"{ROOT / '.venv/bin'}:{os.environ['PATH']}"  # as the pages ask for
    done = typed(checkout, "bash", "-eu", "-c", block.text, PATH=activated)
    assert done.returncode == 0, f"{block.place}:\n{(done.stdout + done.stderr)[-3000:]}"


@pytest.mark.parametrize("block", [pytest.param(b, id=b.place) for b in BLOCKS if b.info == "yaml"])
def test_yaml_can_be_read(block):
    assert isinstance(yaml.safe_load(block.text), dict)


# ---- the other language, and links ---------------------------------------------------------------------------------


def lines_to_type(path: Path) -> list[str]:
    """The lines of a document's commands, without their comments."""
    lines = [line for block in blocks(path) if block.info in COMMANDS for line in block.text.splitlines()]
    return [stripped for line in lines if (stripped := re.sub(r"(^|\s)#.*$", "", line).rstrip())]


def test_both_languages_tell_the_same_commands():
    other = ROOT / "README.zh.md"
    if not other.is_file():
        pytest.skip("there is no README.zh.md")
    ours = [line.replace("<this repository>", "") for line in lines_to_type(ROOT / "README.md")]
    assert [re.sub(r"<[^>]*>", "", line) for line in lines_to_type(other)] == ours


def slug(heading: str) -> str:
    """A heading's anchor, as GitHub makes it: lower case, no punctuation, dashes for spaces."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@functools.cache
def anchors(path: Path) -> set[str]:
    found: dict[str, int] = {}
    made = set(re.findall(r"<a (?:id|name)=\"([^\"]+)\"", path.read_text(encoding="utf-8")))
    every = tokens(path)
    for token, inline in zip(every, every[1:], strict=False):
        if token.type == "heading_open":
            text = "".join(child.content for child in inline.children or [] if child.type in ("text", "code_inline"))
            name = slug(text)
            made.add(f"{name}-{found[name]}" if name in found else name)
            found[name] = found.get(name, 0) + 1
    return made


def links(path: Path) -> list[str]:
    """What a document's links and pictures point to, but for other sites."""
    inline = [child for token in tokens(path) for child in token.children or []]
    found = [child.attrGet("href") or child.attrGet("src") for child in inline if child.type in ("link_open", "image")]
    return [str(one) for one in found if one and not re.match(r"[a-z]+:", str(one))]


def missing(path: Path, link: str) -> str | None:
    """What is not there of a link, if anything."""
    file, _, anchor = link.partition("#")
    target = (path.parent / file).resolve() if file else path
    if not target.exists():
        return f"no file {file}"
    if anchor and target.suffix == ".md" and anchor not in anchors(target):
        return f"no heading #{anchor} in {target.name}"
    return None


@pytest.mark.parametrize("path", [pytest.param(p, id=p.relative_to(ROOT).as_posix()) for p in DOCUMENTS])
def test_every_link_leads_somewhere(path):
    wrong = [f"{link}: {why}" for link in links(path) if (why := missing(path, link))]
    assert not wrong


def test_a_link_that_leads_nowhere_is_noticed(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# One: `two` (three)\n\n# One: `two` (three)\n\n[a](#one-two-three-1) [b](#no) [c](gone.md)\n")
    assert [missing(page, link) for link in links(page)] == [None, "no heading #no in page.md", "no file gone.md"]
