"""From a recipe file and command-line overrides to one validated RunConfig, and back to TOML.

The first thing a run does. Every mistake in the file is reported at once, as one UserError with one
line each.
"""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import BaseModel, ValidationError

from megatron_r1.config.errors import UserError
from megatron_r1.config.explain import explain, key_name, nearest
from megatron_r1.config.judges import JudgeConfig, RewriteConfig
from megatron_r1.config.overrides import Location, OverrideError, apply_override
from megatron_r1.config.reference import describe
from megatron_r1.config.run import RunConfig

__all__ = ["describe", "dump", "load"]


def load(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read, override and validate a recipe.

    Args:
        path: the TOML file.
        overrides: `key.path=value` texts, applied in order; see `config/overrides.py`.

    Returns:
        The configuration with absolute paths: those in the file are relative to the file's folder,
        those in an override to the working directory. `~` is the home folder. A stage's `from` is
        such a path where it holds a "/", else it must name an earlier stage.

    Raises:
        UserError: the file cannot be read, or any key is wrong; names all mistakes.
    """
    raw = _read(path)
    problems: list[str] = []
    overridden: list[Location] = []
    for override in overrides:
        try:
            overridden.append(apply_override(raw, override))
        except OverrideError as error:
            problems.append(f"command line, {override.partition('=')[0]}: {error}")
    if not problems:
        try:
            # JSON mode accepts text for paths and yet, being strict, no "10" for 10 and no true for
            # 1.
            config = RunConfig.model_validate_json(json.dumps(raw, default=str), strict=True)
        except ValidationError as error:
            problems = _lines(path, raw, overridden, error)
        else:
            config = _absolute(config, (), path.resolve().parent, overridden)
            config, problems = _origins(config, path, overridden)
    if problems:
        count = "a mistake" if len(problems) == 1 else f"{len(problems)} mistakes"
        raise UserError("\n  ".join([f"{path} has {count}:", *problems]))
    return config


def dump(config: RunConfig) -> str:
    """The whole configuration as TOML with every default filled in; unset optional keys are left
    out.

    Loading the text again, from any folder, gives an equal configuration.
    """
    return tomli_w.dumps(_plain(config.model_dump(by_alias=True, exclude_none=True)))


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise UserError(_not_found(path)) from error
    except IsADirectoryError as error:
        raise UserError(f"{path} is a folder; name the recipe file in it, e.g. {path / 'recipe.toml'}") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); TOML must be") from error
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError(
            f"{path} is no valid TOML: {error}. Text needs quotes; tables are [name] or [[name]]"
        ) from error


def _not_found(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f"{path} does not exist, nor does its folder; the working directory is {Path.cwd()}"
    present = sorted(entry.name for entry in folder.glob("*.toml"))
    there = f"TOML files there: {', '.join(present)}" if present else "there are no TOML files there"
    return f"{path} does not exist{nearest(path.name, present)} ({there})"


def _lines(path: Path, raw: Mapping[str, Any], overridden: list[Location], error: ValidationError) -> list[str]:
    lines = []
    for location, message in explain(error, RunConfig, raw):
        origin = "command line" if _from_command_line(location, overridden) else path.name
        key = key_name(location, raw)
        lines.append(f"{origin}, {key}: {message}" if key else f"{origin}: {message}")
    return lines


def _from_command_line(location: Location, overridden: list[Location]) -> bool:
    here = _without_first(location)
    return any(here[: len(given)] == given for given in map(_without_first, overridden))


def _without_first(location: Location) -> Location:
    """Without the index of the first prompt source, which may be written as one table."""
    pairs = zip((None, *location), location, strict=False)
    return tuple(part for before, part in pairs if not (before == "prompts" and part == 0))


def _absolute(table: Any, location: Location, base: Path, overridden: list[Location]) -> Any:
    """The same tables with every Path made absolute, and the file of a function too."""
    if isinstance(table, BaseModel):
        changed = {
            name: _absolute(getattr(table, name), (*location, name), base, overridden)
            for name in type(table).model_fields
        }
        if isinstance(table, JudgeConfig | RewriteConfig) and table.call is not None:
            place, _, function = table.call.rpartition(":")
            if place.endswith(".py"):
                changed["call"] = f"{_anchor(Path(place), (*location, 'call'), base, overridden)}:{function}"
        return table.model_copy(update=changed)
    if isinstance(table, dict) and all(isinstance(item, BaseModel) for item in table.values()):
        return {name: _absolute(item, (*location, name), base, overridden) for name, item in table.items()}
    if isinstance(table, list):
        return [_absolute(item, (*location, i), base, overridden) for i, item in enumerate(table)]
    if isinstance(table, Path):
        return _anchor(table, location, base, overridden)
    return table


def _anchor(path: Path, location: Location, base: Path, overridden: list[Location]) -> Path:
    root = Path.cwd() if _from_command_line(location, overridden) else base
    return Path(os.path.normpath(root / path.expanduser()))


def _origins(config: RunConfig, path: Path, overridden: list[Location]) -> tuple[RunConfig, list[str]]:
    """Check each place that takes a stage's name or a folder: a stage of the recipe, or a folder, made absolute."""
    problems: list[str] = []
    stages = []
    names = [stage.name for stage in config.stage]
    for i, stage in enumerate(config.stage):
        changed: dict[str, Any] = {}
        for key, field in (("from", "init_from"), ("teacher", "teacher")):
            source = getattr(stage, field, None)
            if source is not None:
                changed[field] = _origin(source, ("stage", i, key), stage.name, names, path, overridden, problems)
        rewards = list(getattr(stage, "reward", []))
        for n, reward in enumerate(rewards):
            if reward.init_from is not None:
                location: Location = ("stage", i, "reward", n, "from")
                found = _origin(reward.init_from, location, stage.name, names, path, overridden, problems)
                rewards[n] = reward.model_copy(update={"init_from": found})
        stages.append(stage.model_copy(update=changed | ({"reward": rewards} if rewards else {})))
    return config.model_copy(update={"stage": stages}), problems


def _origin(
    source: str,
    location: Location,
    stage: str,
    names: list[str],
    path: Path,
    overridden: list[Location],
    problems: list[str],
) -> str:
    """The stage's name as it is, or the folder, absolute; anything else becomes a problem."""
    if "/" in source or source.startswith("~"):
        return str(_anchor(Path(source), location, path.resolve().parent, overridden))
    if source not in names:
        origin = "command line" if _from_command_line(location, overridden) else path.name
        key = ".".join(map(str, location[2:]))
        problems.append(
            f"{origin}, stage.{stage}.{key}: {source!r} is no stage{nearest(source, names)} (stages: "
            f'{", ".join(names)}); a folder is written with a slash: "./{source}"'
        )
    return source


def _plain(value: Any) -> Any:
    """Values as TOML knows them."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
