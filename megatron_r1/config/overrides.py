"""Command-line overrides: `stage.r1-zero.grpo.prompts=16` changes one key of a recipe before it is
validated.

The value has TOML syntax (`1e-6`, `true`, `[1, 2]`, `"text"`); what is no TOML value is taken as a
bare string. An element of a list of tables is named by its `name` (stages) or by its index, counted
from 0.
"""

from __future__ import annotations

import difflib
import tomllib
from typing import Any

Location = tuple[str | int, ...]


class OverrideError(Exception):
    """One override that cannot be applied; `load` collects these into its UserError."""


def parse_value(text: str) -> Any:
    """The TOML value of `text`, or `text` itself where it is no TOML value.

    Raises:
        OverrideError: `text` is empty, or opens a list, table or quoted string that it does not
            close.
    """
    if not text.strip():
        raise OverrideError('no value after "="; for an empty string write KEY=\'""\'')
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError as error:
        if text.lstrip()[0] in "[{\"'":
            raise OverrideError(f"the value {text!r} is no valid TOML: {error}") from error
        return text
    # A line break could smuggle in a second key; such a text is no single value.
    return parsed["value"] if set(parsed) == {"value"} else text


def apply_override(raw: dict[str, Any], override: str) -> Location:
    """Set one `key=value` in the raw TOML data, in place.

    Returns:
        Where it was set, list elements by index: ("stage", 0, "steps").

    Raises:
        OverrideError: no "=", a path through something that is no table, an unknown list element.
    """
    key, separator, text = override.partition("=")
    key = key.strip()
    if not separator or not key:
        raise OverrideError(f"{override!r} is no override; write key=value, e.g. seed=7")
    value = parse_value(text)
    parent, location = _descend(raw, key)
    parent[location[-1]] = value
    return location


def _descend(raw: dict[str, Any], key: str) -> tuple[Any, Location]:
    """The table that holds the last part of `key`, and the whole location; makes missing tables on
    the way.
    """
    node: Any = raw
    location: Location = ()
    rest = key
    while True:
        if isinstance(node, list):
            index, rest = _element(node, rest, location)
            location = (*location, index)
            if not rest:
                raise OverrideError(f"{key!r} names a whole table; name a key in it, e.g. {key}.steps")
            node = node[index]
            continue
        part, _, after = rest.partition(".")
        if not part:
            raise OverrideError(f"{key!r} has an empty part between its dots")
        if not isinstance(node, dict):
            raise OverrideError(f"{spell(location)!r} is {node!r}, no table, so it has no key {part!r} below it")
        location = (*location, part)
        if not after:
            if rest.endswith("."):
                raise OverrideError(f"{key!r} has an empty part between its dots")
            return node, location
        node, rest = node.setdefault(part, {}), after


def _element(items: list[Any], rest: str, location: Location) -> tuple[int, str]:
    """The index of the list element that `rest` begins with, and what follows it. Names may
    contain dots.
    """
    names = [item.get("name") if isinstance(item, dict) else None for item in items]
    fitting = [
        (len(name), i)
        for i, name in enumerate(names)
        if isinstance(name, str) and (rest == name or rest.startswith(f"{name}."))
    ]
    if fitting:
        length, index = max(fitting)
        return index, rest[length + 1 :]
    part, _, after = rest.partition(".")
    if part.isdigit() and int(part) < len(items):
        return int(part), after
    allowed = [name for name in names if isinstance(name, str)]
    near = difflib.get_close_matches(part, allowed, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    choices = ", ".join([*allowed, f"0 to {len(items) - 1}"] if items else ["it is empty"])
    raise OverrideError(f"{spell(location)} has no element {part!r}{hint} (allowed: {choices})")


def spell(location: Location) -> str:
    """A location as a person writes it: stage.0.steps."""
    return ".".join(str(part) for part in location)
