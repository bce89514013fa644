"""The whole configuration: one section per pipeline, and what is generated from them.

python -m scripts.config --write    makes config/default.yaml, config/schema.json and docs/configuration.md anew
python -m scripts.config --check    fails, with a diff, when they are stale
"""

import argparse
import difflib
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, model_validator

from scripts import config_page
from scripts.biomedica.settings import BiomedicaSettings
from scripts.busi.settings import BusiSettings
from scripts.coca.settings import CocaSettings
from scripts.common import settings, variants
from scripts.common.errors import KilnError
from scripts.common.settings import Settings, execution
from scripts.demo.settings import DemoSettings
from scripts.rae.settings import RaeSettings
from scripts.vase.settings import VaseSettings

ROOT = Path(__file__).resolve().parents[1]
KEYS_SHOWN = 8
SET = "set"  # the key of Snakemake's `config` that holds dotted overrides
HEADER = (
    "# yaml-language-server: $schema=schema.json\n"
    "# Generated from the settings models by `make config`; do not edit. Your own values go into\n"
    "# config/config.yaml (loaded on top of these), in the same form and as few as you like.\n"
)


class ResourceClass(Settings):
    """What a class of rules asks of a machine, or of each of several."""

    threads: int = execution(1, ge=1, description="CPU threads of a node")
    mem_mb: int = execution(2000, ge=1, description="memory of a node for the step; Snakemake's own is added to it")
    runtime: int = execution(60, ge=1, description="minutes")
    gpu: int = execution(0, ge=0, description="GPUs of a node, one process each")
    gpu_model: str | None = execution(None, pattern=r"^[A-Za-z0-9_.]+$", description="as Slurm calls it, such as h200")
    nodes: int = execution(1, ge=1, description="machines that one job takes")
    constraint: str | None = execution(None, description="features that Slurm's nodes must have")


class ResourceClasses(Settings):
    """The one table of resource classes; rules name a class, never numbers."""

    light: ResourceClass = ResourceClass(threads=1, mem_mb=2000, runtime=60)
    cpu: ResourceClass = ResourceClass(threads=8, mem_mb=16000, runtime=240)
    gpu_single: ResourceClass = ResourceClass(threads=8, mem_mb=64000, runtime=720, gpu=1)
    gpu_node: ResourceClass = ResourceClass(threads=64, mem_mb=480000, runtime=1440, gpu=8)
    multi_node: ResourceClass = ResourceClass(threads=64, mem_mb=480000, runtime=1440, gpu=8, nodes=2)
    network: ResourceClass = Field(
        ResourceClass(threads=8, mem_mb=64000, runtime=720, gpu=1),
        description="biomedica's training when it streams; the one class whose nodes must reach the Hugging Face hub",
    )

    @model_validator(mode="before")
    @classmethod
    def _on_top_of_defaults(cls, given):
        """A class of which some values are given keeps its others, instead of getting those of no class."""
        if not isinstance(given, Mapping):
            return given
        defaults = {name: field.default.model_dump() for name, field in cls.model_fields.items()}
        return {
            name: {**defaults[name], **value} if name in defaults and isinstance(value, Mapping) else value
            for name, value in given.items()
        }


class Config(Settings):
    """All settings of a run."""

    pipelines: list[Literal["vase", "busi", "rae", "coca", "biomedica"]] = execution(
        ["vase", "busi", "rae", "coca", "biomedica"],
        min_length=1,
        description="what targets all, report and paper are of",
    )
    results: str = execution("results", description="folder of everything that is made")
    models: str = execution("resources/models", description="folder of retrieved models")
    datasets: str = execution("resources/datasets", description="folder of retrieved data sets")
    device: str = execution(
        "auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto, cpu or cuda:N, for every step with a model"
    )
    check_disk: bool = execution(True, description="stop before the first job if a disk lacks room for what they write")
    keep_shards: bool = execution(
        True, description="false: tables and embeddings of single shards go once they are read; a change redoes them"
    )
    confirm_gpu_hours: float = execution(
        1.0, ge=0, description="a run stops before it redoes a finished training that took more GPU hours than this"
    )
    allow_retrain: str | None = execution(
        None, description="training rules that may run again all the same, parted by commas, or `all`"
    )
    rescan: bool = execution(True, description="false: take folders as the last scan saw them, on slow shared disks")
    rehash: bool = execution(False, description="true: read all images anew, to find changes that kept size and mtime")
    verify_raw: bool = execution(False, description="true: `snakemake verify` reads raw data and models, too")
    resources: ResourceClasses = ResourceClasses()
    demo: DemoSettings = DemoSettings()
    vase: VaseSettings = VaseSettings()
    busi: BusiSettings = BusiSettings()
    rae: RaeSettings = RaeSettings()
    coca: CocaSettings = CocaSettings()
    biomedica: BiomedicaSettings = BiomedicaSettings()

    @model_validator(mode="after")
    def _family_of_a_named_model(self):
        base = self.busi.base  # here, not there: a step is told the family alone
        for start, family in (("qwen", "qwen"), ("hulu-med", "hulumed")):
            if base.model.startswith(start) and "/" not in base.model and base.family != family:
                raise ValueError(f"{base.model} is of family {family}, not {base.family}: set busi.base.family")
        return self


Origins = Callable[[], Iterable[tuple[str, Mapping[str, Any]]]]


def load(given: Mapping[str, Any], user_file: Path, origins: Origins = tuple) -> Config:
    """The configuration of a run: models, then the user's file, then what the command line gave.

    Args:
        given: Snakemake's `config` (from --configfile and --config); its key `set` holds dotted overrides.
        user_file: config/config.yaml, if there is one.
        origins: (name, values) of what `given` was made from, later ones on top; asked for errors alone.

    Raises:
        KilnError: an unknown key or a bad value, before any job; where it was given is named.
    """
    own = settings.read_yaml(user_file) if user_file.is_file() else {}
    plain, overrides = _parted(given)
    values = settings.merge(settings.merge(own, plain), overrides)

    def source(location: settings.Location) -> str:
        return _given_by(location, _sources(given, user_file, origins))

    return settings.validate(Config, values, source)


def giver(dotted: str, given: Mapping[str, Any], user_file: Path, origins: Origins = tuple) -> str | None:
    """Who gave the value at a dotted place, of the arguments of `load`; None if it is the default."""
    location = tuple(dotted.split("."))
    told = [(name, one) for name, one in _sources(given, user_file, origins) if _at(one, location)]
    return told[-1][0] if told else None


def _sources(given: Mapping[str, Any], user_file: Path, origins: Origins) -> list[tuple[str, Mapping[str, Any]]]:
    """(name, values) of all that makes up a configuration, later ones on top."""
    own = settings.read_yaml(user_file) if user_file.is_file() else {}
    plain, overrides = _parted(given)
    return [(str(user_file), own), *_parts(plain, origins()), (f"--config {SET}=...", overrides)]


def _parted(given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Snakemake's `config` without its key `set`, and what that holds."""
    plain = {name: value for name, value in given.items() if name != SET}
    return plain, settings.parse_overrides(str(given[SET])) if given.get(SET) else {}


def advise_on_user_file(user_file: Path, above: str, given: Mapping[str, Any], say: Callable[[str], None]) -> None:
    """Say which keys of the user's file count beneath another file, as beneath the demo's, whose results then differ.

    Args:
        above: that file, as it is called.
        given: Snakemake's `config`; keys that it holds do not count.
    """
    own = settings.read_yaml(user_file) if user_file.is_file() else {}
    keys = list(_missing(own, settings.merge(*_parted(given))))
    if keys:
        more = f" and {len(keys) - KEYS_SHOWN} more" if len(keys) > KEYS_SHOWN else ""
        say(f"{user_file} counts beneath {above}, by what it alone sets: {', '.join(keys[:KEYS_SHOWN])}{more}")


def _missing(values: Mapping[str, Any], above: Mapping[str, Any], place: str = "") -> Iterator[str]:
    for name, value in values.items():
        if isinstance(value, Mapping) and isinstance(above.get(name, {}), Mapping):
            yield from _missing(value, above.get(name, {}), f"{place}{name}.")
        elif name not in above:
            yield f"{place}{name}"


def _parts(given: Mapping[str, Any], origins: Iterable[tuple[str, Mapping[str, Any]]]) -> list[tuple[str, Mapping]]:
    """`origins` if they make up `given`, as they do not for a module that gets a part of them; else `given` whole."""
    parts = [(name, {key: value for key, value in one.items() if key != SET}) for name, one in origins]
    whole: dict[str, Any] = {}
    for _, one in parts:
        whole = settings.merge(whole, one)
    return parts if whole == given else [("--configfile or --config", given)]


def _given_by(location: settings.Location, told: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """Who gave the value at a place, or the nearest one around it: the last one, or all that gave keys of a section."""
    for length in range(len(location), 0, -1):
        found = [(name, value) for name, one in told for value in _at(one, location[:length])]
        if found:
            section = dict.fromkeys(name for name, value in found if isinstance(value, Mapping))
            return " and ".join(section) if isinstance(found[-1][1], Mapping) else found[-1][0]
    return " and ".join(name for name, one in told if one) or "the defaults"


def _at(values: Any, location: settings.Location) -> list[Any]:
    """The value at a place, in a list; an empty list if there is none."""
    for part in location:
        try:
            values = values[part]
        except (KeyError, IndexError, TypeError):
            return []
    return [values]


def runs(config: Config, pipeline: str) -> dict[str, Config]:
    """{run: its configuration} of all variants and seeds of a pipeline; see `scripts.common.variants`."""
    found = variants.runs(getattr(config, pipeline))
    return {name: config.model_copy(update={pipeline: run.settings}) for name, run in found.items()}


def current_runs(configs: Iterable[Config]) -> dict[str, set[str]]:
    """{pipeline: names of its variants and of their runs}, of several configurations together."""
    found: dict[str, set[str]] = {}
    for config in configs:
        for pipeline in type(config).model_fields:
            own = getattr(config, pipeline)
            if isinstance(own, variants.VariedSettings):
                found.setdefault(pipeline, set()).update(own.variants, variants.runs(own))
    return found


def keys_of(config: Config, value: Any) -> list[str]:
    """The dotted keys of a configuration that hold a value, such as a folder that is not there."""
    found, todo = [], [("", config.model_dump())]
    while todo:
        place, held = todo.pop()
        if isinstance(held, Mapping):
            todo += [(f"{place}.{name}".lstrip("."), one) for name, one in held.items()]
        elif held == value and type(held) is type(value):
            found.append(place)
    return sorted(found)


def section(config: Config, dotted: str) -> Any:
    """The settings at a dotted place, such as `vase.classifier`."""
    place: Any = config
    for name in dotted.split("."):
        place = getattr(place, name)
    return place


def resource_class(config: Config, name: str) -> ResourceClass:
    """The resource class of that name.

    Raises:
        KilnError: there is none; the hint lists those that there are.
    """
    allowed = type(config.resources).model_fields
    if name not in allowed:
        raise KilnError(f"{name!r} is no resource class", f"give one of {', '.join(allowed)}")
    return getattr(config.resources, name)


def to_yaml(config: Config) -> str:
    """All values, in the models' order, as YAML."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=110)


def generated() -> dict[Path, str]:
    """{file: text} of what the models generate."""
    schema = json.dumps(Config.model_json_schema(), indent=1, ensure_ascii=False) + "\n"
    return {
        ROOT / "config/default.yaml": HEADER + to_yaml(Config()),
        ROOT / "config/schema.json": schema,
        ROOT / "docs/configuration.md": config_page.page(Config()),
    }


def stale() -> str:
    """A diff of the generated files against what the models say now; empty when they are up to date."""
    lines = []
    for path, text in generated().items():
        old = path.read_text(encoding="utf-8") if path.exists() else ""
        lines += difflib.unified_diff(
            old.splitlines(), text.splitlines(), str(path.relative_to(ROOT)), "now", lineterm=""
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    choice = parser.add_mutually_exclusive_group(required=True)
    choice.add_argument("--write", action="store_true", help="write the generated files")
    choice.add_argument("--check", action="store_true", help="fail when they are stale")
    if parser.parse_args().write:
        for path, text in generated().items():
            path.write_text(text, encoding="utf-8")
    elif diff := stale():
        raise KilnError(f"what the settings models generate is stale:\n{diff}", "run `make config`")


if __name__ == "__main__":
    try:
        main()
    except KilnError as error:
        sys.exit(f"Error: {error}")
