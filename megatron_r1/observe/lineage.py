"""What a run's resolved recipe says of its stages, read as plain tables: which weights each one begins with.

For readers of a run directory (report, status, closing table), which also meet runs of older recipes: nothing here
fails on an unknown key. `pipeline/graph.py` has the same rule for recipes that are run; a test holds the two together.
"""

from __future__ import annotations

import tomllib
from typing import Any

from megatron_r1.config.errors import UserError
from megatron_r1.observe.rundir import RunDir

LANGUAGE_MODEL_KINDS = ("pretrain", "sft", "grpo", "distill")
"""Kinds of stages whose checkpoints hold a language model."""


def read_config(run: RunDir) -> tuple[str, dict[str, Any]]:
    """Text and tables of the resolved recipe, else of the recipe; ("", {}) where there is neither.

    Raises:
        UserError: it is not TOML.
    """
    path = run.resolved if run.resolved.exists() else run.recipe
    if not path.exists():
        return "", {}
    text = path.read_text(encoding="utf-8")
    try:
        return text, tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path}: not TOML ({error}); mend the file or start the run anew") from error


def stage_tables(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Stage name -> its table, in the order of the recipe."""
    return {str(table.get("name")): table for table in config.get("stage", [])}


def weights_of_stages(config: dict[str, Any]) -> dict[str, str | None]:
    """Stage name -> the stage or folder whose weights it begins with; None: fresh ones, or none at all.

    Without `from` that is the last stage written before it that trains a language model of the same `model`.
    """
    found: dict[str, str | None] = {}
    last: dict[str | None, str] = {}  # model -> its last such stage so far
    for name, table in stage_tables(config).items():
        source = table.get("from", table.get("init_from"))
        found[name] = source if source is not None or table.get("kind") == "mix" else last.get(table.get("model"))
        if table.get("kind") in LANGUAGE_MODEL_KINDS:
            last[table.get("model")] = name
    return found
