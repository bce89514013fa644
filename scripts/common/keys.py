"""What is said of a key of the settings, from its model: its type in words, its limits, default and meaning."""

import html
import json
import types
import typing
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

WORDS = {int: "whole number", float: "number", str: "text", bool: "true or false", type(None): "null", Any: "anything"}
BOUNDS = (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<"), ("multiple_of", "a multiple of"))
LONG = 60  # characters of a default, from which on it is cut


def type_text(annotation: Any) -> str:
    """A field's type in words, as Markdown that fits into a cell."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return ", ".join(as_code(one) for one in inner)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(type_text(one) for one in inner)
    if origin is typing.Annotated:
        return type_text(inner[0])
    if origin is dict:
        return f"mapping of {type_text(inner[0])} to {type_text(inner[1])}"
    if origin is list or (origin is tuple and inner[-1] is ...):
        return f"list of {type_text(inner[0])}"
    if origin is tuple:
        return f"list of {len(inner)}: {type_text(inner[0])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        fields = annotation.model_fields.items()
        return "{" + ", ".join(f"{name}: {type_text(field.annotation)}" for name, field in fields) + "}"
    return WORDS.get(annotation) or annotation.__name__


def bounds(field) -> str:
    """A field's limits, such as `, > 0, ≤ 1`."""
    found = [
        f"{sign} {getattr(one, name)}"
        for name, sign in BOUNDS
        for one in field.metadata
        if getattr(one, name, None) is not None
    ]
    return "".join(f", {one}" for one in found)


def as_code(value: Any) -> str:
    """As code; in HTML where a bar would end the cell, which hosts of Markdown escape in different ways."""
    text = str(value)
    return f"<code>{html.escape(text).replace('|', '&#124;')}</code>" if "|" in text else f"`{text}`"


def about(model: type[BaseModel], location: Sequence[str | int]) -> str:
    """A key's place, type, limits, default and meaning, such as `a.lr: number, > 0; default 0.1; the first rate`.

    Args:
        location: of a value of `model`, as pydantic's errors name it; of an item in a list it is the list that is told.

    Returns:
        Nothing where the place is a whole section, or none that the models have.
    """
    names, field, values = [], None, _defaults(model)
    for part in location:
        if part not in getattr(model, "model_fields", ()):
            break
        names.append(part)
        field = model.model_fields[part]
        values = getattr(values, part) if isinstance(values, BaseModel) else None
        model = field.annotation
    if field is None or isinstance(values, BaseModel) or hasattr(model, "model_fields"):
        return ""
    default = json.dumps(values, ensure_ascii=False, default=str)
    told = [f"{'.'.join(names)}: {type_text(field.annotation)}{bounds(field)}"]
    if not field.is_required():
        told.append(f"default {default if len(default) <= LONG else default[:LONG] + ' ...'}")
    return "; ".join(filter(None, [*told, field.description]))


def _defaults(model: type[BaseModel]) -> BaseModel | None:
    try:
        return model()
    except ValidationError:  # some keys have none
        return None
