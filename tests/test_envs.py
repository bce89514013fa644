"""Environments and rules: pins of the lock, all that a rule's step imports, one name everywhere."""

import ast
import functools
import importlib.metadata
import re
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from packaging.utils import canonicalize_name
from packaging.version import Version

from scripts import envs
from scripts.common import artefacts, code_key

ROOT = Path(__file__).resolve().parents[1]
OPTIONAL = {"wandb"}  # imported only by who asks for it, with a hint where it is missing
APART = ("hulumed", "hulumed_deepspeed")  # other versions than the lock's, so not those that are installed here


class Rule(NamedTuple):
    """A rule as its file's text has it: one string for each section."""

    name: str
    sections: dict[str, str]


def rules() -> dict[str, Rule]:
    """Every rule and checkpoint that runs a command."""
    found = {}
    for path in sorted(ROOT.glob("rules/*.smk")):
        parts = re.split(r"^(?:rule|checkpoint) (\w+):\n", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
        for name, body in zip(parts[1::2], parts[2::2], strict=True):
            body = re.split(r"^\S", body, maxsplit=1, flags=re.MULTILINE)[0]
            pieces = re.split(r"^    (\w+):", body, flags=re.MULTILINE)
            sections = dict(zip(pieces[1::2], pieces[2::2], strict=True))
            if "shell" in sections:
                found[name] = Rule(name, sections)
    return found


RULES = rules()
MAKERS = [name for name in RULES if name != "verify"]  # which reads results, and makes none


def modules_of(rule: Rule) -> list[str]:
    """The step that a rule calls, behind its launcher if it has one; none if it calls another program."""
    return re.findall(r"(?<=[ \"])scripts(?:\.\w+)+", rule.sections["shell"])


def module_of(rule: Rule) -> str | None:
    """The step that a rule calls; None if it calls another program, such as snakemake."""
    return (modules_of(rule) or [None])[-1]


def pins(family: str) -> dict[str, str]:
    """{canonical name: version} of an environment file."""
    made = yaml.safe_load((ROOT / f"envs/{family}.yaml").read_text(encoding="utf-8"))
    assert made["channels"] == ["conda-forge", "nodefaults"]
    (packages,) = [part["pip"] for part in made["dependencies"] if isinstance(part, dict)]
    return {canonicalize_name(name): version for name, _, version in (p.partition("==") for p in packages)}


def pinned(path: str) -> dict[str, str]:
    """{canonical name: version} of a file of pins."""
    text = (ROOT / path).read_text(encoding="utf-8")
    return {canonicalize_name(m[1]): m[2] for m in re.finditer(r"^([\w.-]+)==(\S+)$", text, flags=re.MULTILINE)}


def lock() -> dict[str, str]:
    return pinned("requirements.lock")


def environments_of(rule: Rule) -> set[str]:
    """The environments that a rule may name: one, or those of a variable that settings decide."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("rules/*.smk")))
    (named,) = re.findall(r"^\s*f?\"\.\./envs/([\w{}]+)\.yaml\"\s*$", rule.sections["conda"])
    todo, found = re.findall(r"{(\w+)}", named), set() if "{" in named else {named}
    while todo:
        (value,) = re.findall(rf"^{todo.pop()} = (.*?)^[^\s)\]}}]", text, flags=re.MULTILINE | re.DOTALL)
        found.update(set(re.findall(r"\"(\w+)\"", value)) & set(FAMILIES))
        todo += re.findall(r"\b\w+_ENV\b", value)
    return found


FAMILIES = sorted(path.stem for path in ROOT.glob("envs/*.yaml"))


def test_no_environment_is_missing_or_left_over():
    assert sorted(envs.FAMILIES) == FAMILIES


DECIDE_NO_NUMBER = {  # of what the environments ask for: files, pages, curves, downloads, the machine
    "docutils", "filelock", "fonttools", "hf-xet", "huggingface-hub", "jinja2", "joblib", "matplotlib", "mplfonts",
    "msgspec", "nvidia-ml-py", "psutil", "pydantic", "pygments", "pyyaml", "requests", "rocrate", "snakemake",
    "tensorboard", "threadpoolctl", "tqdm",
}  # fmt: skip


def test_records_name_every_package_that_can_decide_a_number():
    """Else an upgrade of, say, ms-swift would not be seen in what two results differ by."""
    asked = {name for names in envs.FAMILIES.values() for name in names} - DECIDE_NO_NUMBER
    assert asked <= set(artefacts.PACKAGES)
    assert {"trl", "deepspeed"} <= set(artefacts.PACKAGES)  # they train, below ms-swift and transformers


def own(family: str) -> dict[str, str]:
    """The pins of a family that do not come from the lock."""
    return pinned(f"envs/{family}.txt") if (ROOT / f"envs/{family}.txt").exists() else {}


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in APART])
def test_pins_are_those_of_the_lock(family):
    wrong = {name: version for name, version in pins(family).items() if lock().get(name, version) != version}
    assert not wrong
    assert set(pins(family)) <= set(lock()) | set(own(family))
    assert len(pins(family)) > 3


@pytest.mark.parametrize("family", APART)
def test_pins_apart_from_the_lock_are_exactly_the_resolved_ones(family):
    assert pins(family) == own(family)


@pytest.mark.parametrize("path", sorted(ROOT.glob("envs/*.in")), ids=lambda path: path.stem)
def test_resolved_pins_answer_what_was_asked(path):
    """A changed .in file whose pins were not resolved anew is noticed."""
    from packaging.requirements import Requirement

    lines = path.read_text(encoding="utf-8").splitlines()
    for line in lines:
        if line.startswith("-r "):
            lines += (path.parent / line.removeprefix("-r ")).read_text(encoding="utf-8").splitlines()
    asked = [Requirement(line) for line in lines if line and line[0] not in "#-"]
    assert asked
    for need in asked:
        version = own(path.stem).get(canonicalize_name(need.name))
        assert version and need.specifier.contains(version), f"{need}: {path.stem}.txt has {version}"


@pytest.mark.parametrize("family", APART)
def test_hulu_med_gets_the_transformers_of_its_code_and_a_torch_that_can_resume(family):
    held = pins(family)
    assert held["transformers"] == "4.51.2"
    assert Version(held["torch"]) >= Version("2.6")
    assert held["accelerate"] == lock()["accelerate"]


def test_deepspeed_adds_the_same_packages_to_both():
    assert set(pins("hulumed_deepspeed")) - set(pins("hulumed")) == set(pins("deepspeed")) - set(lock())
    assert pins("hulumed_deepspeed")["deepspeed"] == pins("deepspeed")["deepspeed"]


def test_two_versions_of_a_package_are_refused(tmp_path, monkeypatch):
    (tmp_path / "envs").mkdir()
    (tmp_path / "envs/tables.txt").write_text("numpy==1.0\n")
    held = envs.read_pins(ROOT / "requirements.lock")
    monkeypatch.setattr(envs, "ROOT", tmp_path)
    with pytest.raises(ValueError, match="numpy==1.0, the lock"):
        envs.pins_of("tables", held)


def test_environments_are_up_to_date():
    stale = [path.name for path, text in envs.texts().items() if path.read_text(encoding="utf-8") != text]
    assert not stale, "run `make config`"


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in APART])
def test_pins_hold_all_that_they_need(family):
    """By the metadata of what is installed: each requirement for this platform is pinned, to a version that suits."""
    from packaging.requirements import Requirement

    held = pins(family)
    for name in held.keys() & lock().keys():
        for need in map(Requirement, importlib.metadata.requires(name) or []):
            if need.marker is None or need.marker.evaluate({"extra": ""}):
                other = canonicalize_name(need.name)
                assert other in held, f"{name} needs {need}"
                assert need.specifier.contains(held[other], prereleases=True), f"{name} needs {need}"


@functools.cache
def imports(path: Path) -> set[str]:
    """Top-level names that a file imports, at its head or in a function; not those for type checkers alone."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module.split(".")[0])
    return found


packages_distributions = functools.cache(importlib.metadata.packages_distributions)


def reached(module: str) -> set[str]:
    """Third-party packages (canonical names) in a step's module and all that it imports, settings included."""
    todo, seen, packages = [module], set(), set()
    of_name = packages_distributions()
    while todo:
        name = todo.pop()
        path = code_key._file_of(name, ROOT)
        if path is None or name in seen:
            continue
        seen.add(name)
        todo += code_key._facts(name, path).imports
        for top in imports(path) - set(sys.stdlib_module_names) - {"scripts"} - OPTIONAL:
            assert top in of_name, f"{path}: {top} is not installed here"
            packages.add(canonicalize_name(of_name[top][0]))
    return packages


def test_the_rules_are_found():
    assert len(RULES) > 10
    assert {"vase_split", "demo_draw_vases"} <= set(RULES)
    assert "scikit-learn" in reached("scripts.vase.train_classifier")


@pytest.mark.parametrize("name", MAKERS)
def test_a_rule_says_all_it_must(name):
    sections = RULES[name].sections
    missing = {"output", "log", "benchmark", "conda", "threads", "message", "params"} - set(sections)
    assert not missing
    assert "{log" in sections["shell"]
    assert environments_of(RULES[name])
    assert environments_of(RULES[name]) <= set(FAMILIES)


def test_settings_may_choose_an_environment():
    assert environments_of(RULES["busi_predict"]) == {"vlm", "hulumed"}
    assert environments_of(RULES["busi_train_lora"]) == {"vlm", "hulumed", "deepspeed", "hulumed_deepspeed"}
    assert environments_of(RULES["vase_split"]) == {"tables"}


def test_verify_makes_nothing_so_that_it_always_runs():
    """Snakemake takes a benchmark for an output."""
    sections = RULES["verify"].sections
    assert not {"input", "output", "benchmark"} & set(sections)
    assert {"log", "conda", "threads", "message", "params"} <= set(sections)
    assert "{log" in sections["shell"]


@pytest.mark.parametrize("name", MAKERS)
def test_one_name_everywhere(name):
    """Rule `vase_split`: script scripts/vase/split.py, logs below vase/split, benchmarks too.

    Rules that do one thing to several models share its script: `vase_merge_sft` and `vase_merge_grpo`, `merge`.
    """
    rule = RULES[name]
    pipeline, _, stem = name.partition("_")
    module = module_of(rule)
    if module:
        assert module.startswith(f"scripts.{pipeline}.")
        script = module.split(".")[-1]
        assert script == stem or stem.startswith(f"{script}_") or module.split(".")[1:] == name.split("_")
        assert (ROOT / (module.replace(".", "/") + ".py")).is_file()
    for section, folder, ending in (("log", "LOGS", "log"), ("benchmark", "BENCHMARKS", "tsv")):
        place = re.search(rf"\{{{folder}\}}/([^\"]+)\.{ending}\"", rule.sections[section])
        assert place, rule.sections[section]
        parts = [part for part in place[1].split("/") if "{" not in part]
        assert "_".join(parts) == name


@pytest.mark.parametrize("name", [name for name, rule in RULES.items() if module_of(rule)])
def test_an_environment_holds_all_that_its_rule_imports(name):
    needed = set().union(*map(reached, modules_of(RULES[name])))
    for family in environments_of(RULES[name]):
        missing = needed - set(pins(family))
        assert not missing, f"envs/{family}.yaml lacks them"


@pytest.mark.parametrize("name", [name for name, rule in RULES.items() if module_of(rule)])
def test_a_rules_code_key_is_of_its_own_step(name):
    """Or of modules that the step imports, where only some decide numbers; and of calm ones that they import."""
    rule = RULES[name]
    module = module_of(rule)
    code = re.search(r"code=code_key\((.*?)\)", rule.sections["params"], flags=re.DOTALL)[1]
    if code.startswith("*"):
        text = "\n".join(path.read_text(encoding="utf-8") for path in ROOT.glob("rules/*.smk"))
        code = re.search(rf"^{code[1:]} = \((.*?)\)", text, flags=re.DOTALL | re.MULTILINE)[1]
    named = set(re.findall(r"\"([\w.]+)\"", code))
    assert named
    counted = code_key._closure((module,), ROOT)
    assert named - code_key.CALM <= counted
    files = {one: code_key._file_of(one, ROOT) for one in counted}
    assert named & code_key.CALM <= set().union(*(code_key._facts(one, file).imports for one, file in files.items()))
