"""Where a stage's inputs lie: weights behind a name, data of other stages, steps counted on files. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

from megatron_r1.checkpoint import folders
from megatron_r1.config.errors import UserError
from megatron_r1.config.run import RunConfig
from megatron_r1.config.stages import RewardModelStage, SftStage, Stage
from megatron_r1.convert.formats.hf_files import is_hf
from megatron_r1.convert.source import is_megatron
from megatron_r1.data.conversations import Conversations
from megatron_r1.data.reward_rows import count_rows
from megatron_r1.observe.rundir import RunDir
from megatron_r1.pipeline.graph import data_tables

AnyStage = TypeVar("AnyStage", bound=Stage)


def with_paths(stage: Stage, run: RunDir) -> Stage:
    """The stage with the data.jsonl of other stages in the place of their names."""
    changed: dict[str, Any] = {}
    for key, table in data_tables(stage):
        if (source := getattr(table, "stage", None)) is None:
            continue
        found = table.model_copy(update={"path": run.stage(source).data, "stage": None})
        name, _, number = key.partition(".")
        if number:
            tables: list[BaseModel] = changed.setdefault(name, list(getattr(stage, name)))
            tables[int(number)] = found
        else:
            changed[name] = found
    return stage.model_copy(update=changed) if changed else stage


def waits_for_data(stage: Stage) -> bool:
    """Whether another stage of the recipe writes some of its data, so that it cannot be looked at before."""
    return any(getattr(table, "stage", None) is not None for _, table in data_tables(stage))


def with_steps(stage: Stage) -> Stage:
    """The stage with the steps that its `epochs` mean, counted on its file."""
    if not isinstance(stage, SftStage | RewardModelStage) or stage.epochs is None or stage.steps:
        return stage
    if isinstance(stage, SftStage):
        rows = len(Conversations(stage.data))
    else:
        table = stage.pairs or stage.labels
        assert table is not None, "the schema saw to it"
        rows = count_rows(table)
    return stage.model_copy(update={"steps": stage.planned_steps(rows)})


def weights_of(source: str, config: RunConfig, run: RunDir) -> Path:
    """The weights that a stage of the recipe has made, or that a folder holds.

    Raises:
        UserError: there are none, complete.
    """
    here = source in [stage.name for stage in config.stage]
    folder = run.stage(source).path if here else Path(source)
    found = checkpoint_of(folder)
    if found is None:
        raise UserError(f"{f'stage {source!r}' if here else source} has no complete checkpoint in {folder}")
    return found


def checkpoint_of(path: Path) -> Path | None:
    """The weights that `path` is, or holds: a checkpoint of training (the newest of a stage's), a Hugging Face folder
    (an export stage's `hf` too), or a Megatron checkpoint that something else wrote.
    """
    if (path / folders.MANIFEST).is_file() or folders.of_training(path) or is_hf(path):
        return path
    found = folders.latest(path / "checkpoints") or folders.latest(path)
    if found is None and is_hf(path / "hf"):
        return path / "hf"
    return path if found is None and is_megatron(path) else found
