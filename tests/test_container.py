"""The container recipe: its syntax, and the command that Snakemake makes of it. No image is built here."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import workflow

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "containers/kiln.def"
SECTIONS = {  # of Apptainer 1.x: https://apptainer.org/docs/user/latest/definition_files.html
    "pre", "setup", "files", "arguments", "environment", "post", "runscript", "startscript", "test", "labels", "help",
    "appinstall", "appfiles", "appenv", "apprun", "applabels", "apphelp", "apptest", "appstart",
}  # fmt: skip
SHELL = {"pre", "setup", "environment", "post", "runscript", "startscript", "test"}


def read(text: str, folder: Path) -> tuple[dict[str, str], dict[str, str]]:
    """({key: value} of the head, {section: its lines}) of a definition whose files lie in `folder`.

    Raises:
        ValueError: what Apptainer would refuse, or an image that is not pinned.
    """
    head, *parts = re.split(r"^%(?=\w)", text, flags=re.MULTILINE)
    lines = [line for line in head.splitlines() if line.strip() and not line.startswith("#")]
    if wrong := [line for line in lines if not re.fullmatch(r"\w+: \S+", line)]:
        raise ValueError(f"no `Key: value` in the head: {wrong}")
    keys = dict(line.split(": ") for line in lines)
    if keys.get("Bootstrap") != "docker" or not re.fullmatch(r"[\w./-]+:\d+\.\d+\.\d+[\w.-]*", keys.get("From", "")):
        raise ValueError(f"expected Bootstrap: docker and From: image:version, got {keys}")
    sections = {}
    for part in parts:
        first, _, body = part.partition("\n")
        name = first.split()[0]
        if name not in SECTIONS or name in sections:
            raise ValueError(f"%{name} is unknown or there twice")
        sections[name] = body
        if name in SHELL and subprocess.run(["sh", "-n"], input=body, text=True, capture_output=True).returncode:
            raise ValueError(f"%{name} is no shell script")
    for line in sections.get("files", "").splitlines():
        if line.strip() and not (folder / line.split()[0]).exists():
            raise ValueError(f"%files: no {line.split()[0]}")
    return keys, sections


def test_recipe_is_well_formed_and_installs_the_lock():
    _, sections = read(RECIPE.read_text(encoding="utf-8"), ROOT)
    assert {"files", "post", "environment", "runscript", "test"} <= set(sections)
    target = sections["files"].split()[1]
    assert sections["files"].split() == ["requirements.lock", target]
    assert f"--requirement {target}" in sections["post"]


@pytest.mark.parametrize(
    "old, new",
    [
        ("%environment", "%enviroment"),
        ("%help", "%post"),
        ("From: python:3.11.13-slim-bookworm", "From: python:latest"),
        ("From: ", "Form: "),
        ("    requirements.lock ", "    requirements.txt "),
        ("    set -eu\n", "    if set -eu\n"),
        ("Bootstrap: docker", "Bootstrap docker"),
    ],
)
def test_a_wrong_recipe_is_noticed(old, new):
    text = RECIPE.read_text(encoding="utf-8")
    assert old in text
    with pytest.raises(ValueError):
        read(text.replace(old, new, 1), ROOT)


def test_rules_are_handed_to_apptainer(tmp_path, monkeypatch):
    """With a program of that name which runs the command outside any container, and notes what it was asked."""
    notes = tmp_path / "asked"
    program = tmp_path / "bin/apptainer"
    program.parent.mkdir()
    program.write_text(
        f'#!/bin/bash\n[ "$1" = --version ] && echo "apptainer version 1.3.4" && exit\nprintf "%s\\n" "$*" >>{notes}\n'
        'while [ "$1" != sh ] && [ "$1" != bash ]; do shift; done\nexec "$@"\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{Path(sys.executable).parent}", prepend=":")
    checkout, run = workflow.copy_checkout(tmp_path / "checkout"), tmp_path / "run"
    run.mkdir()
    image = checkout / "containers/kiln.sif"
    image.parent.mkdir()
    image.touch()
    workflow.run(
        checkout, run, "--sdm", "apptainer", "--apptainer-args=--nv", "--configfile", str(ROOT / "config/demo.yaml"),
        "--", "results/demo/demo/draw_digits/files.json",
    )  # fmt: skip
    (asked,) = notes.read_text().splitlines()
    assert "exec" in asked.split() and "--nv" in asked.split() and str(image) in asked.split()
    assert re.search(r"PYTHONPATH=\S+ python -m scripts\.demo\.draw_digits ", asked)
