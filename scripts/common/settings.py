"""Typed settings: their base class, their two kinds, and how several sources become one object.

A field is *numerics* (it decides numbers; it enters params and fingerprints) unless it is declared
with `execution(...)` (workers, log interval, device: a change never reruns anything).
"""

import difflib
import json
import re
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from scripts.common import keys
from scripts.common.errors import KilnError


class Settings(BaseModel):
    """Base of every settings section: unknown keys are refused, values cannot change.

    Attributes:
        original_names: {name in the original project: name here}, for the hint at an unknown key.
    """

    original_names: ClassVar[Mapping[str, str]] = {}
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


S = TypeVar("S", bound=Settings)
Location = tuple[str | int, ...]  # of a value, as pydantic names it
SECTION = 60  # characters of a section's values, beyond which they are not repeated in an error
SECRETS = ("hf_token", "token", "huggingface_token", "api_key")  # keys that have no place in a configuration


def execution(default: Any, **constraints: Any) -> Any:
    """Declare a field that cannot change a number."""
    return Field(default, json_schema_extra={"kind": "execution"}, **constraints)


def is_execution(field) -> bool:
    """Whether a field of a model is declared by `execution(...)`."""
    return bool(field.json_schema_extra) and field.json_schema_extra.get("kind") == "execution"


def of_kind(settings: Settings, kind: str) -> dict[str, Any]:
    """The settings of one kind, `"numerics"` or `"execution"`, as plain JSON values."""
    values = settings.model_dump(mode="json")
    chosen = {}
    for name, field in type(settings).model_fields.items():
        value = getattr(settings, name)
        if isinstance(value, Settings) and not is_execution(field):
            inner = of_kind(value, kind)
            if inner or kind == "numerics":
                chosen[name] = inner
        elif is_execution(field) == (kind == "execution"):
            chosen[name] = values[name]
    return chosen


def to_json(values: Any) -> str:
    """Canonical JSON: sorted keys, no spaces, so that equal settings are equal text."""
    return json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` on top of `base`, section by section; lists and scalars are replaced whole."""
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        both = isinstance(old, Mapping) and isinstance(value, Mapping)
        merged[key] = merge(old, value) if both else value
    return merged


def parse_overrides(text: str | Iterable[str]) -> dict[str, Any]:
    """`"rae.train.lr=1e-4 rae.data.batch_size=64"` as a nested dict; values are read as YAML.

    Raises:
        KilnError: an item without `=`, or a key that is both a value and a section.
    """
    items = text.split() if isinstance(text, str) else list(text)
    nested: dict[str, Any] = {}
    for item in items:
        key, equals, value = item.partition("=")
        if not equals or not key:
            raise KilnError(
                f"override {item!r} is not of the form section.key=value",
                "separate overrides by spaces, and write no space around '='",
            )
        *sections, name = key.split(".")
        place = nested
        for section in sections:
            place = place.setdefault(section, {})
            if not isinstance(place, dict):
                raise KilnError(f"override {item!r}: {section!r} has a value already", "give it once")
        if isinstance(place.get(name), dict):
            raise KilnError(f"override {item!r}: values below {key!r} are given already", "give it once")
        try:
            place[name] = _yaml_value(value)
        except yaml.YAMLError as error:
            raise KilnError(
                f"override {item!r}: the value is not YAML: {str(error).splitlines()[0]}",
                "write lists without spaces, [1,2]; a value that holds spaces belongs into config/config.yaml",
            ) from None
    return nested


def _yaml_value(text: str) -> Any:
    value = yaml.safe_load(text)
    if isinstance(value, str) and re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+", text):
        return float(text)  # YAML 1.1 reads 1e-4 as text; in quotes it stays text
    return value


def validate(model: type[S], values: Mapping[str, Any], source: str | Callable[[Location], str]) -> S:
    """`values` as a `model`.

    Args:
        source: where the values come from; or a function that says it of the value at a place.

    Raises:
        KilnError: names each bad key with its source, what is allowed, and the default or the nearest spelling.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        told: dict[str, list[str]] = {}
        hints = []
        for one in error.errors():
            lines = told.setdefault(source if isinstance(source, str) else source(one["loc"]), [])
            key = ".".join(str(part) for part in one["loc"])
            if one["type"] == "extra_forbidden":
                place, name = _model_at(model, one["loc"][:-1]), str(one["loc"][-1])
                allowed = list(place.model_fields) if place else []
                ours = place.original_names.get(name) if place else None
                near = [ours] if ours else difflib.get_close_matches(name, allowed, n=1, cutoff=0.5)
                lines.append(f"unknown key {key!r}; allowed here: {', '.join(allowed)}")
                if name.lower() in SECRETS:
                    hints.append("a token is no setting: export it as HF_TOKEN, and take it out of every file")
                elif near:
                    full = ".".join([*map(str, one["loc"][:-1]), near[0]])
                    hints.append(f"did you mean {full!r}?")
            else:
                lines.append(_sentence(key or "settings", one))
                hints.append(keys.about(model, one["loc"]))
        message = "; ".join(f"settings from {name}: {'; '.join(lines)}" for name, lines in told.items())
        hint = "\n      ".join(dict.fromkeys(filter(None, hints)))  # below each other, after `Hint: `
        raise KilnError(message, hint or "config/default.yaml lists every key with its default") from None


_KINDS = {  # of pydantic's errors, in YAML's words
    "tuple_type": "a list", "list_type": "a list", "dict_type": "key: value pairs", "model_type": "key: value pairs",
    "int_type": "a whole number", "int_parsing": "a whole number", "int_from_float": "a whole number",
    "float_type": "a number", "float_parsing": "a number", "string_type": "a text",
    "bool_type": "true or false", "bool_parsing": "true or false",
}  # fmt: skip


def _sentence(key: str, error: Mapping[str, Any]) -> str:
    """What is wrong with a value: an error of pydantic's in a user's words."""
    kind, said = error["type"], error["msg"]
    if kind == "missing":
        return f"{key} is missing in {error['input']!r}"
    if kind == "value_error":
        said = str(error["ctx"]["error"])
    else:
        said = said.replace("Input should be", "expected").replace("String should match", "expected a text of the")
        said = f"expected {_KINDS[kind]}" if kind in _KINDS else said
    whole = isinstance(error["input"], Mapping) and len(str(error["input"])) > SECTION
    return f"{key}: {said}" if whole else f"{key} = {error['input']!r}: {said}"


def _model_at(model: type[BaseModel], location: tuple) -> type[Settings] | None:
    for part in location:
        if part in model.model_fields:
            inner = _model_in(model.model_fields[part].annotation)
            if inner is None:
                return None
            model = inner  # an index or a key of a list or dict of models stays at its model
    return model


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The model in `Model`, `Model | None`, `tuple[Model, ...]` or `dict[str, Model]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_model_in, typing.get_args(annotation))), None)


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file's mapping; an empty file is an empty mapping.

    Raises:
        KilnError: missing, not YAML, not a mapping, or one with a key that stands twice.
    """
    try:
        text = path.read_text(encoding="utf-8")
        _refuse_doubled_keys(yaml.compose(text, yaml.SafeLoader), path)
        values = yaml.safe_load(text)
    except OSError as error:
        raise KilnError(f"{path}: cannot be read ({error.strerror})", "check the path") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise KilnError(f"{path}: not YAML: {error}", "check its indentation and quotes") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise KilnError(f"{path}: expected key: value pairs", "see config/default.yaml")
    return values


def _refuse_doubled_keys(node: yaml.Node | None, path: Path) -> None:
    """YAML forbids them, but PyYAML takes the last one in silence."""
    if isinstance(node, yaml.SequenceNode):
        for one in node.value:
            _refuse_doubled_keys(one, path)
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, yaml.Mark] = {}
        for key, value in node.value:
            mark = key.start_mark
            if isinstance(key, yaml.ScalarNode) and (first := seen.setdefault(key.value, mark)) is not mark:
                places = f"lines {first.line + 1} and {mark.line + 1}"
                raise KilnError(f"{path}: key {key.value!r} stands twice, in {places}", "put both under the first")
            _refuse_doubled_keys(value, path)


def _read_json(text: str) -> dict[str, Any]:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise KilnError(f"settings {text[:60]!r}: not JSON: {error}", "check its quotes and brackets") from None


def from_sources(model: type[S], sources: Iterable[str]) -> S:
    """One settings object from JSON texts, YAML files and `key=value` overrides, later ones on top."""
    values: dict[str, Any] = {}
    sources = list(sources)
    for source in sources:
        if source.lstrip().startswith("{"):
            values = merge(values, _read_json(source))
        elif re.match(r"[\w.]+=", source):
            values = merge(values, parse_overrides(source))
        else:
            values = merge(values, read_yaml(Path(source)))
    return validate(model, values, " + ".join(s[:60] for s in sources) or "defaults")
