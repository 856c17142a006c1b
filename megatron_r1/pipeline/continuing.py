"""May this recipe go on with the run in that folder? Not if something finished was made with other settings. No torch.

The layout, what is recomputed, how a stage cuts its batches into micro-batches (micro_batch_tokens, packing) and
everything of stages that are not done may change between two starts: of what is finished only rounding depends on them.
The model, the tokenizer, the seed and the other settings of finished stages may not.
"""

from __future__ import annotations

import tomllib
from typing import Any

from megatron_r1.config.errors import UserError
from megatron_r1.config.load import dump
from megatron_r1.config.run import RunConfig
from megatron_r1.observe.rundir import RunDir

_FIXED = ("seed", "model", "tokenizer")
_FREE = "model.recompute"  # recompute, recompute_modules, ...: memory and time, not numbers
_FREE_OF_STAGE = ("micro_batch_tokens", "packing")  # the same, up to rounding
_SHOWN = 8  # differences that the message lists


def check_continues(config: RunConfig, run: RunDir) -> None:
    """Raise UserError when the run directory holds results that this configuration would not have given."""
    if not run.resolved.exists() or not run.stages_file.exists():
        return
    old = tomllib.loads(run.resolved.read_text(encoding="utf-8"))
    new = tomllib.loads(dump(config))
    found = [line for key in _FIXED for line in _differences(key, old.get(key), new.get(key))]
    found = [line for line in found if not line.startswith(_FREE)]
    done = {state.name for state in run.read_stages() if state.state == "done"}
    before, after = _stages(old), _stages(new)
    for name in sorted(done & after.keys()):
        free = tuple(f"stage.{name}.{key}:" for key in _FREE_OF_STAGE)
        lines = _differences(f"stage.{name}", before.get(name), after[name])
        found += [line for line in lines if not line.startswith(free)]
    if found:
        shown = "\n  ".join(found[:_SHOWN]) + (f"\n  and {len(found) - _SHOWN} more" if len(found) > _SHOWN else "")
        raise UserError(
            f"{run.path} holds a run with other settings, and would mix the two:\n  {shown}\n"
            "Give another folder with --run-dir, restore the settings, or remove that folder"
        )


def _stages(config: dict[str, Any]) -> dict[str, Any]:
    return {stage["name"]: stage for stage in config.get("stage", [])}


def _differences(key: str, old: Any, new: Any) -> list[str]:
    """ "key: old, now new" of every leaf that differs."""
    if old == new:
        return []
    if isinstance(old, dict) and isinstance(new, dict):
        names = [*old, *(name for name in new if name not in old)]
        return [line for name in names for line in _differences(f"{key}.{name}", old.get(name), new.get(name))]
    return [f"{key}: was {_shown(old)}, now {_shown(new)}"]


def _shown(value: Any) -> str:
    return "not set" if value is None else repr(value)
