"""The reference of every configuration key, written from the schema itself: `megatron-r1 config`.

docs/configuration.md is this text; a test keeps the two equal.
"""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from megatron_r1.config.explain import one_line, tags
from megatron_r1.config.run import RunConfig

HEADER = """\
# Configuration reference

Written by `megatron-r1 config` from the schema in `megatron_r1/config/`; do not edit by hand.

A recipe is a TOML file. Unknown keys are refused. Any key can be overridden on the command line as
`key.path=value` with TOML syntax for the value; a stage is addressed by its name or its index:

    megatron-r1 run recipe.toml seed=7 stage.r1-zero.grpo.prompts=16 stage.0.steps=10

Relative paths in a file are relative to that file, those on the command line to the working
directory.
`megatron-r1 run recipe.toml --dry-run` prints every key as it was understood.
"""

NAMES: dict[Any, str] = {
    int: "integer",
    float: "number",
    str: "string",
    bool: "true or false",
    Path: "path",
    dict: "table of any keys",
    Any: "any value",
}
SIGNS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}


def describe() -> str:
    """Markdown with every table of a recipe and, for each key, its type, default and meaning."""
    parts = [HEADER]
    seen: set[tuple[str, type[BaseModel]]] = set()
    for title, path, table in _sections("", RunConfig):
        if (path, table) in seen:
            continue
        seen.add((path, table))
        parts.append(f"## {title}\n\n{_meaning(table)}\n\n{_keys(path, table)}")
    return "\n".join(parts).rstrip("\n") + "\n"


def _meaning(table: type[BaseModel]) -> str:
    """A table's docstring, less the name of the table that some begin with: the title says it."""
    text = re.sub(r"^`\[+[a-z_.]+\]+`: ", "", one_line(table.__doc__ or ""))
    return text[:1].upper() + text[1:]


def _sections(path: str, table: type[BaseModel]) -> Iterator[tuple[str, str, type[BaseModel]]]:
    """(title, path, class) of a table and of all tables in it, in the order of the schema."""
    yield _title(path, table), path, table
    for name, field in table.model_fields.items():
        for child, many in _child_tables(field.annotation):
            below = f"{path}.{name}" if path else name
            for title, deeper, inner in _sections(below, child):
                doubled = title.replace("[", "[[").replace("]", "]]") if many and inner is child else title
                yield doubled, deeper, inner


def _title(path: str, table: type[BaseModel]) -> str:
    kind = "".join(f', kind = "{tag}"' for tag in tags(table)) if path == "stage" else ""
    return f"`[{path}]`{kind}" if path else "Top level"


def _child_tables(annotation: Any) -> Iterator[tuple[type[BaseModel], bool]]:
    """Tables an annotation leads to, and whether through a list."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation, False
    elif get_origin(annotation) is list:
        for child, _ in _child_tables(get_args(annotation)[0]):
            yield child, True
    elif get_origin(annotation) is Annotated:
        yield from _child_tables(get_args(annotation)[0])
    elif get_origin(annotation) in (typing.Union, types.UnionType):
        for member in get_args(annotation):
            yield from _child_tables(member)


def _keys(path: str, table: type[BaseModel]) -> str:
    lines = []
    for name, field in table.model_fields.items():
        facts = f"{_type(field.annotation, field.metadata)}; {_default(field)}"
        lines.append(f"- `{field.alias or name}`: {facts}")
        below = f"{path}.{name}" if path else name
        children = list(_child_tables(field.annotation))
        if field.description:
            lines.append(f"  {one_line(field.description)}")
        elif children:
            brackets = ("[[", "]]") if children[0][1] else ("[", "]")
            lines.append(f"  See `{brackets[0]}{below}{brackets[1]}`.")
    return "\n".join(lines) + "\n"


def _type(annotation: Any, metadata: list[Any]) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type(arguments[0], [*arguments[1:], *metadata])
    if origin in (typing.Union, types.UnionType):
        members = [member for member in arguments if member is not type(None)]
        if all(list(_child_tables(member)) for member in members):
            return "table"
        return " or ".join(_type(member, metadata) for member in members)
    if origin is Literal:
        return " or ".join(f'"{value}"' for value in arguments)
    if origin is list:
        return f"list of {_plural(_type(arguments[0], []))}"
    if origin is dict and arguments[1] is not Any:
        return f"table of {_plural(_type(arguments[1], []))}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "table"
    return NAMES[origin or annotation] + _bounds(metadata)


def _bounds(metadata: list[Any]) -> str:
    """` > 0, <= 1` from the constraints of a field."""
    found = [
        f"{sign} {bound:g}"
        for item in metadata
        for name, sign in SIGNS.items()
        if (bound := getattr(item, name, None)) is not None
    ]
    return f" {', '.join(found)}" if found else ""


def _plural(noun: str) -> str:
    return noun if noun.endswith('"') else f"{noun}s"


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is None or value is PydanticUndefined:
        return "default: not set"
    if isinstance(value, BaseModel):
        changed = [
            f"{name} = {_spell(getattr(value, name))}"
            for name, inner in type(value).model_fields.items()
            if inner.get_default(call_default_factory=True) != getattr(value, name)
        ]
        return f"default: {', '.join(changed)}" if changed else "default: as listed there"
    return f"default: {_spell(value)}"


def _spell(value: Any) -> str:
    """A default as TOML spells it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, list):
        return f"[{', '.join(_spell(item) for item in value)}]"
    return "{}" if value == {} else str(value)
