"""What each stage of a recipe needs of the others, and an order in which all can run. No torch.

A stage names others in four places: `from` (weights to start with), `stage` of a data table, `from` of a reward, and
`teacher`. Everything else it reads is a file of the user's.
"""

from __future__ import annotations

import graphlib
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from pydantic import BaseModel

from megatron_r1.config.errors import UserError
from megatron_r1.config.run import RunConfig
from megatron_r1.config.stages import (
    DistillStage,
    EvalStage,
    ExportStage,
    GrpoStage,
    LanguageModelStage,
    MixStage,
    PreferencesStage,
    RewardModelStage,
    SampleStage,
    Stage,
)

WRITES: dict[type, str] = {SampleStage: "conversations", MixStage: "conversations"}
"""Kind of stage -> what its data.jsonl holds; a `preferences` stage writes what its `form` says."""


class Need(NamedTuple):
    """Something that a stage reads of another stage, or of a folder."""

    key: str  # of the recipe, e.g. "from", "data.stage", "reward.helpful.from"
    source: str  # the stage's name, or the folder
    what: str  # "weights", "reward model", "conversations", "pairs", "labels"


def needs(config: RunConfig, index: int) -> list[Need]:
    """What stage `index` reads, stages and folders alike; files of data not among them."""
    stage = config.stage[index]
    found = []
    if (start := start_source(config, index)) is not None:
        found.append(Need("from", start, "weights"))
    if isinstance(stage, DistillStage):
        found.append(Need("teacher", stage.teacher, "weights"))
    if isinstance(stage, GrpoStage):
        for reward in stage.reward:
            if reward.init_from is not None:
                found.append(Need(f"reward.{reward.label}.from", reward.init_from, "reward model"))
    for key, table in data_tables(stage):
        name = getattr(table, "stage", None)
        if name is not None:
            what = {"pairs": "pairs", "labels": "labels"}.get(getattr(type(table), "table", ""), "conversations")
            found.append(Need(f"{key}.stage", name, what))
    return found


def start_source(config: RunConfig, index: int) -> str | None:
    """The stage or folder whose weights stage `index` begins with; None: fresh ones, or it needs none.

    Without `from` it is the last stage written before it that trains a language model of the same `model`.
    """
    stage = config.stage[index]
    if stage.init_from is not None or isinstance(stage, MixStage):
        return stage.init_from
    before = [s.name for s in config.stage[:index] if isinstance(s, LanguageModelStage) and s.model == stage.model]
    return before[-1] if before else None


def data_tables(stage: Stage) -> Iterator[tuple[str, BaseModel]]:
    """(key, table) of every table of the stage that may name a file of rows, and every benchmark-like one left out."""
    for name in type(stage).model_fields:
        value = getattr(stage, name)
        tables = value if isinstance(value, list) else [value]
        for number, table in enumerate(tables):
            if isinstance(table, BaseModel) and "path" in type(table).model_fields:
                yield (f"{name}.{number}" if isinstance(value, list) else name), table


def run_order(config: RunConfig) -> list[int]:
    """Indices of the stages in an order in which each comes after what it reads: as written, wherever that is possible.

    Raises:
        UserError: stages that need each other, an unknown stage in a data table, a stage that makes something else than
        what is read of it.
    """
    names = [stage.name for stage in config.stage]
    graph: dict[str, list[str]] = {}
    for index, stage in enumerate(config.stage):
        wanted = needs(config, index)
        for need in wanted:
            _check_need(config, stage.name, need, names)
        graph[stage.name] = [need.source for need in wanted if need.source in names]
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        raise UserError(_cycle(error.args[1])) from error
    order: list[int] = []
    done: set[str] = set()
    while len(order) < len(names):
        index = next(i for i, name in enumerate(names) if name not in done and done >= set(graph[name]))
        order.append(index)
        done.add(names[index])
    return order


def makes(stage: Stage) -> str:
    """What others can read of a stage: "weights", "reward model", "conversations", "pairs", "labels" or "nothing"."""
    if isinstance(stage, RewardModelStage):
        return "reward model"
    if isinstance(stage, PreferencesStage):
        return stage.form
    if isinstance(stage, EvalStage):
        return "nothing"
    return WRITES.get(type(stage), "weights")


def _check_need(config: RunConfig, name: str, need: Need, names: Sequence[str]) -> None:
    if need.source not in names:
        if need.key.endswith("stage"):
            raise UserError(
                f"stage.{name}.{need.key} = {need.source!r}: there is no such stage (stages: {', '.join(names)}); "
                "a file of your own is given as `path`"
            )
        return
    origin = config.stage[names.index(need.source)]
    made = makes(origin)
    stage = config.stage[names.index(name)]
    _check_same_model(stage, origin, need)
    if made == need.what or (need.key == "from" and made == "reward model" and isinstance(stage, RewardModelStage)):
        return
    given = f"stage.{name}.{need.key} = {need.source!r}: "
    if need.key == "from" and made == "reward model":
        raise UserError(
            f"{given}that stage makes a reward model, which has no output layer to write text with; only a "
            "reward_model stage can start from it. Name one that trains a language model"
        )
    hint = [s.name for s in config.stage if makes(s) == need.what and not isinstance(s, ExportStage)]
    article = "an" if origin.kind == "eval" else "a"
    raise UserError(
        f"{given}{article} {origin.kind} stage makes {_shown(made)}, and {_shown(need.what)} is wanted; "
        f"stages of this recipe that make it: {', '.join(hint) or 'none'}"
    )


def _check_same_model(stage: Stage, origin: Stage, need: Need) -> None:
    """Weights fit the model they were trained for, and no other."""
    if need.key == "from":
        wanted = stage.model
    elif need.key == "teacher" and isinstance(stage, DistillStage):
        wanted = stage.teacher_model
    elif need.what == "reward model" and isinstance(stage, GrpoStage):
        wanted = next(r.model for r in stage.reward if r.init_from == need.source)
    else:
        return
    if wanted != origin.model and makes(origin) != "nothing":
        shown = ["[model]" if name is None else f"[models.{name}]" for name in (wanted, origin.model)]
        raise UserError(
            f"stage.{stage.name}.{need.key} = {need.source!r}: weights of {shown[0]} are wanted, and that stage trains "
            f"{shown[1]}; set `model` of one of the two"
        )


def _shown(what: str) -> str:
    shown: Mapping[str, str] = {
        "weights": "the weights of a language model",
        "reward model": "a reward model",
        "pairs": "preference pairs",
        "labels": "labelled answers",
        "nothing": "no weights",
    }
    return shown.get(what, what)


def _cycle(names: Sequence[str]) -> str:
    chain = " needs ".join(reversed(names))
    return (
        f"these stages need each other, so none of them can run first: {chain}. Change one of their `from` or `stage`"
    )
