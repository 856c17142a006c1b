"""Which stages of a recipe have to run, and why: those that are not done, and those whose result would be another now.

No torch. A stage is done when `stages.json` holds the digests of what it wrote. It runs again when a setting that its
result depends on, or something that it reads, is not what it was, or when what it wrote is gone. What it had is moved
to `superseded/`, never deleted. A stage behind one that runs again is looked at when its turn comes: where the other
has written the same bytes as before, it stays as it is.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from megatron_r1.config.errors import UserError
from megatron_r1.config.run import RunConfig
from megatron_r1.config.stages import EvalStage, LanguageModelStage, MixStage, RewardModelStage, Stage
from megatron_r1.observe.rundir import RunDir, StageState
from megatron_r1.pipeline import digests
from megatron_r1.pipeline.graph import data_tables, needs, run_order
from megatron_r1.pipeline.inputs import checkpoint_of

FREE = (
    *("name", "checkpoint", "log_every", "micro_batch_tokens", "packing", "verifier_workers", "workers", "chunk"),
    *("sampling.batch_size", "watch", "reference_memory", "teacher_memory", "row"),
    *("grpo.mismatch_limit", "grpo.loss.reference_memory"),
    *(f"{hook}.server.{key}" for hook in ("judge", "rewrite") for key in ("url", "api_key", "timeout", "retries")),
    *(f"{hook}.server.{key}" for hook in ("judge", "rewrite") for key in ("down", "wait_seconds", "concurrency")),
)
"""Settings of a stage on which its result does not depend, beyond rounding."""
FREE_OF_MODEL = ("recompute", "recompute_modules", "recompute_method", "recompute_layers")
_SHOWN = 3  # differences that a reason names

Action = Literal["run", "resume", "again", "keep", "depends"]


class Choice(NamedTuple):
    """Which stages a command asks for: `--only`, `--until`, and those to begin anew, `--force`."""

    only: frozenset[str] = frozenset()
    until: str | None = None
    force: frozenset[str] = frozenset()


class Decision(NamedTuple):
    """What becomes of a stage.

    run: it was not begun; resume: it was begun; again: what it has is moved aside, for the reason `why`; keep: it is
    done; depends: a stage that it reads runs first, and may write the same as before.
    """

    name: str
    action: Action
    why: str = ""


def settings_of(stage: Stage, config: RunConfig) -> dict[str, Any]:
    """Everything of the recipe that the stage's result depends on, as JSON values by dotted key.

    Only what differs from its default: a later version of this package may know more keys.
    """
    plain = json.loads(stage.model_dump_json(by_alias=True, exclude_defaults=True))
    own = {key: value for key, value in _leaves("", plain) if not _under(key, FREE)}
    tables = {stage.model, getattr(stage, "teacher_model", None) if stage.kind == "distill" else stage.model}
    tables |= {reward.model for reward in getattr(stage, "reward", []) if reward.init_from is not None}
    for name in tables:
        table = config.model if name is None else config.models[name]
        fields = json.loads(table.model_dump_json(exclude_defaults=True, exclude=set(FREE_OF_MODEL)))
        own |= dict(_leaves("model" if name is None else f"models.{name}", fields))
    tokenizer = json.loads(config.tokenizer.model_dump_json(exclude_defaults=True))
    benchmarks = {
        f"benchmark.{b.name}.{key}": value
        for b in config.benchmark
        if b.name in getattr(stage, "benchmarks", [])
        for key, value in _leaves("", json.loads(b.model_dump_json(exclude_defaults=True)))
        if not _under(key, FREE)
    }
    return own | dict(_leaves("tokenizer", tokenizer)) | benchmarks | {"seed": config.seed}


def inputs_of(config: RunConfig, index: int, states: Mapping[str, StageState], run: RunDir) -> dict[str, str]:
    """Key of the recipe -> digest of what stage `index` reads there now."""
    stage = config.stage[index]
    found = {}
    for need in needs(config, index):
        state = states.get(need.source)
        if state is not None:
            found[need.key] = digests.digest_of(state) if state.state == "done" else "not done"
        else:
            folder = checkpoint_of(run.path / need.source)
            found[need.key] = "missing" if folder is None else _digest_of_weights(folder)
    for key, table in data_tables(stage):
        path = getattr(table, "path", None)
        if path is not None:
            found[f"{key}.path"] = digests.digest_of_path(path)
    for asked in config.problem_sets(stage) if isinstance(stage, EvalStage) else []:
        if asked.benchmark is not None and asked.prompts.path is not None:
            found[f"{asked.key}.prompts.path"] = digests.digest_of_path(asked.prompts.path)
    for key, file in _called_files(stage):
        found[key] = digests.digest_of_path(file)
    return found | (_decontamination(stage, config) if isinstance(stage, MixStage) else {})


def _decontamination(stage: MixStage, config: RunConfig) -> dict[str, str]:
    """The questions that a mix leaves out, of evaluations and of its own files."""
    files = stage.decontaminate.files
    found = {f"decontaminate.files.{number}": digests.digest_of_path(path) for number, path in enumerate(files)}
    for asked in config.all_problem_sets() if stage.decontaminate.evaluations else []:
        table = asked.prompts.model_dump_json(exclude_defaults=True, exclude={"path"})
        found[asked.key] = digests.digest_of_text(f"{asked.table.problems} {table}")
        if asked.prompts.path is not None:
            found[f"{asked.key}.prompts.path"] = digests.digest_of_path(asked.prompts.path)
    return found


def decide(config: RunConfig, run: RunDir, choice: Choice) -> list[Decision]:
    """What `megatron-r1 run` would do with each stage that it looks at, in running order."""
    states = {state.name: state for state in run.read_stages()}
    moving: set[str] = set()  # stages that will write anew
    decisions = []
    for index in selected(config, choice):
        stage = config.stage[index]
        found = decide_one(config, index, states, run, forced=stage.name in choice.force)
        behind = [need.source for need in needs(config, index) if need.source in moving]
        if found.action in ("keep", "resume") and behind:
            found = Decision(stage.name, "depends", f"reads {', '.join(dict.fromkeys(behind))}, which runs first")
        if found.action != "keep":
            moving.add(stage.name)
        decisions.append(found)
    return decisions


def decide_one(
    config: RunConfig, index: int, states: Mapping[str, StageState], run: RunDir, *, forced: bool = False
) -> Decision:
    """What becomes of one stage, all that it reads being done or as it is."""
    stage = config.stage[index]
    state = states.get(stage.name)
    if state is None or not state.settings:  # recorded before a stage does anything
        return Decision(stage.name, "run", "" if state is None else state.why)
    if forced:
        return Decision(stage.name, "again", "asked for with --force")
    if state.kind != stage.kind:
        return Decision(stage.name, "again", f"it was a {state.kind} stage and is a {stage.kind} stage now")
    now = inputs_of(config, index, states, run)
    if changed := [key for key in now if state.inputs.get(key) != now[key] and now[key] != "not done"]:
        return Decision(stage.name, "again", f"what it reads has changed: {', '.join(changed)}")
    settings = settings_of(stage, config)
    lines = list(_differences(state.settings, settings))
    if state.state == "done":
        if lost := digests.missing(state.outputs, run.stage(stage.name).path):
            return Decision(
                stage.name, "again", f"what it wrote is gone or has another size: {', '.join(lost[:_SHOWN])}"
            )
        if lines and not _only_more_steps(stage, state, settings):
            return Decision(stage.name, "again", _shown(lines))
        return Decision(stage.name, "resume", "more steps are asked for") if lines else Decision(stage.name, "keep")
    if lines and not _may_change(stage, lines):
        return Decision(stage.name, "again", _shown(lines))
    return Decision(stage.name, "resume")


def selected(config: RunConfig, choice: Choice) -> list[int]:
    """Indices of the stages to look at, in running order.

    Raises:
        UserError: the choice names no stage.
    """
    only, until, force = choice
    order = run_order(config)
    names = [config.stage[i].name for i in order]
    for option, given in (("--until", [until] if until else []), ("--only", only), ("--force", force)):
        if unknown := sorted(set(given) - set(names)):
            raise UserError(f"{option} {unknown[0]}: there is no such stage; stages are {', '.join(names)}")
    if until is not None:
        order = order[: names.index(until) + 1]
    return [i for i in order if not only or config.stage[i].name in only]


def set_aside(run: RunDir, name: str) -> None:
    """Move what a stage has to superseded/<name>-N. Call on one process."""
    folder = run.stage(name).path
    if not folder.exists():
        return
    run.superseded.mkdir(exist_ok=True)
    number = 1
    while (target := run.superseded / f"{name}-{number}").exists():
        number += 1
    shutil.move(folder, target)


def fresh(stage: Stage, why: str = "") -> StageState:
    """The state of a stage that begins anew."""
    return StageState(name=stage.name, kind=stage.kind, steps=getattr(stage, "steps", 0), why=why)


def _only_more_steps(stage: Stage, state: StageState, settings: Mapping[str, Any]) -> bool:
    """Whether a finished training stage can simply go on: its schedule does not know how many steps there are."""
    if not isinstance(stage, LanguageModelStage | RewardModelStage) or stage.optimizer.schedule != "constant":
        return False
    changed = {key for key in settings.keys() | state.settings.keys() if settings.get(key) != state.settings.get(key)}
    more = settings.get("steps", 0) > state.settings.get("steps", 0)
    timed = any(key.endswith("last_steps") for key in settings)
    return changed == {"steps"} and more and not timed and not hasattr(stage, "corpus")


def _may_change(stage: Stage, lines: list[str]) -> bool:
    """Whether an unfinished stage goes on under other settings: training does, if model and data are the same."""
    fixed = ("seed:", "model", "tokenizer", "data.", "pairs.", "labels.", "from:")
    return isinstance(stage, LanguageModelStage | RewardModelStage) and not any(
        line.startswith(fixed) for line in lines
    )


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    for key in [*old, *(key for key in new if key not in old)]:
        if old.get(key) != new.get(key):
            yield f"{key}: was {_value(old.get(key))}, now {_value(new.get(key))}"


def _shown(lines: list[str]) -> str:
    more = f" and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else ""
    return "; ".join(lines[:_SHOWN]) + more


def _value(value: Any) -> str:
    return "left out" if value is None else json.dumps(value, ensure_ascii=False)


def _leaves(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    items: Any = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if items is None:
        yield key, value
        return
    for name, item in items:
        yield from _leaves(f"{key}.{name}" if key else str(name), item)


def _under(key: str, free: Collection[str]) -> bool:
    parts = key.split(".")
    return any(parts[: name.count(".") + 1] == name.split(".") for name in free)


def _digest_of_weights(folder: Path) -> str:
    """Of weights from outside: names and sizes, as reading terabytes at every start would take hours."""
    files = sorted((str(p.relative_to(folder)), p.stat().st_size) for p in folder.rglob("*") if p.is_file())
    return digests.digest_of_text(json.dumps([str(folder), files]))


def _called_files(stage: Stage) -> Iterator[tuple[str, Path]]:
    """Python files whose functions the stage calls."""
    for hook in ("judge", "rewrite"):
        table = getattr(stage, hook, None)
        if table is not None and table.call is not None and table.call.rpartition(":")[0].endswith(".py"):
            yield f"{hook}.call", Path(table.call.rpartition(":")[0])
