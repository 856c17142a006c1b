"""From pydantic's validation errors to lines a person can act on: the key, what was given, what is
allowed, the cure.

`load` collects these lines for the whole recipe, so that one attempt shows every mistake.
"""

from __future__ import annotations

import difflib
import json
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel, ValidationError

from megatron_r1.config.overrides import Location

# What pydantic calls a type error -> what TOML calls the type.
EXPECTED = {
    "int_type": "an integer",
    "int_parsing": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "float_parsing": "a number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": 'a string in quotes ("...")',
    "path_type": 'a path in quotes ("...")',
    "list_type": "a list ([...])",
    "dict_type": "a table",
    "model_type": "a table",
    "model_attributes_type": "a table",
}
BOUNDS = {
    "greater_than": ("gt", ">"),
    "greater_than_equal": ("ge", ">="),
    "less_than": ("lt", "<"),
    "less_than_equal": ("le", "<="),
}


def explain(error: ValidationError, root: type[BaseModel], raw: Mapping[str, Any]) -> list[tuple[Location, str]]:
    """Every mistake as (location in the raw data, message). Locations name list elements by
    index.
    """
    lines = []
    for item in error.errors(include_url=False):
        location, table = locate(item["loc"], root)
        lines.append((location, _message(item, table)))
    return lines


def key_name(location: Location, raw: Mapping[str, Any]) -> str:
    """A location as the user would address it: a list element by its `name` where it has one, else
    by its index, and not at all where the user wrote one table instead of a list.
    """
    parts: list[str] = []
    node: Any = raw
    for part in location:
        if part == 0 and isinstance(node, dict):
            continue
        try:
            node = node[part]
        except (KeyError, IndexError, TypeError):
            node = None
        named = isinstance(part, int) and isinstance(node, dict) and isinstance(node.get("name"), str)
        parts.append(node["name"] if named else str(part))
    return ".".join(parts)


def locate(loc: tuple[int | str, ...], root: type[BaseModel]) -> tuple[Location, type[BaseModel] | None]:
    """Split pydantic's location into ours and the table class that holds its last key.

    Pydantic inserts the tag of a discriminated union (`stage`, 0, `grpo`, ...), which is no key of
    the file.
    """
    location: Location = ()
    annotation: Any = root
    holder: type[BaseModel] | None = None
    for part in loc:
        members = _tables(annotation)
        tagged = {tag: table for table in members for tag in tags(table)}
        if len(members) > 1 and part in tagged:
            annotation = tagged[str(part)]
            continue
        location = (*location, part)
        if isinstance(part, int):
            annotation = _item(annotation)
            holder = None
            continue
        holder = members[0] if members else None
        annotation = _field(holder, part)
    return location, holder


def tags(table: type[BaseModel]) -> tuple[str, ...]:
    """The values of a table's `kind`, by which `[[stage]]` tables are told apart."""
    field = table.model_fields.get("kind")
    return get_args(field.annotation) if field and get_origin(field.annotation) is Literal else ()


def keys(table: type[BaseModel]) -> list[str]:
    """The keys of a table as the file spells them."""
    return [field.alias or name for name, field in table.model_fields.items()]


def nearest(given: str, allowed: Iterable[str]) -> str:
    """`; did you mean "x"?`, or nothing where no allowed word is near."""
    near = difflib.get_close_matches(given, list(allowed), n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else ""


def show(value: Any) -> str:
    """A value as the file would spell it, with its TOML type where that is what may be wrong."""
    if isinstance(value, dict | list):
        text = json.dumps(value, default=str)
        return text if len(text) <= 80 else text[:77] + "..."
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return f"{json.dumps(value, ensure_ascii=False)} (a string)"
    return str(value)


def _message(item: Any, table: type[BaseModel] | None) -> str:
    kind, given, context = item["type"], item["input"], item.get("ctx", {})
    if kind == "extra_forbidden":
        allowed = keys(table) if table else []
        hint = nearest(str(item["loc"][-1]), allowed)
        return f"unknown key{hint} (allowed here: {', '.join(sorted(allowed))})"
    if kind == "missing":
        field = _field_info(table, str(item["loc"][-1]))
        meaning = f": {one_line(field.description)}" if field and field.description else ""
        return f"required, but not given{meaning}"
    if kind in ("literal_error", "union_tag_invalid"):
        tag = context.get("tag")
        text = tag if tag is not None else given
        allowed = context.get("expected_tags") or context["expected"]
        words = allowed.replace("'", "").replace(" or ", ", ").split(", ")
        where = "`kind`: " if tag is not None else ""
        return f"{where}got {show(text)}{nearest(str(text), words)} (allowed: {', '.join(words)})"
    if kind == "union_tag_not_found":
        return 'has no `kind`; add e.g. kind = "grpo" (see `megatron-r1 config` for the kinds)'
    if kind in BOUNDS:
        key, sign = BOUNDS[kind]
        return f"got {show(given)}; allowed: {sign} {context[key]}"
    if kind in EXPECTED:
        return f"expected {EXPECTED[kind]}, got {show(given)}"
    if kind == "string_pattern_mismatch":
        return f"got {show(given)}; allowed: text that matches {context['pattern']}"
    if kind == "too_short":
        return f"needs at least {context['min_length']} element(s), got {context['actual_length']}"
    text = item["msg"].removeprefix("Value error, ")
    return text if kind == "value_error" else f"{text}, got {show(given)}"


def one_line(text: str) -> str:
    """A docstring on one line."""
    return " ".join(text.split())


def _field_info(table: type[BaseModel] | None, key: str) -> Any:
    if table is None:
        return None
    for name, field in table.model_fields.items():
        if key in (name, field.alias):
            return field
    return None


def _field(table: type[BaseModel] | None, key: str | int) -> Any:
    field = _field_info(table, str(key))
    return field.annotation if field else None


def _tables(annotation: Any) -> list[type[BaseModel]]:
    """The table classes an annotation allows, through Annotated, Optional and unions."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    origin = get_origin(annotation)
    if origin is Annotated:
        return _tables(get_args(annotation)[0])
    if origin in (typing.Union, types.UnionType):
        return [table for member in get_args(annotation) for table in _tables(member)]
    return []


def _item(annotation: Any) -> Any:
    """What a list holds."""
    if get_origin(annotation) is list:
        return get_args(annotation)[0]
    return None
