"""Which stages of a recipe have to run, and why: those that are not done, and those whose result would be another now.

No torch. A stage is done when `stages.json` holds the digests of what it wrote. It runs again when a setting that its
result depends on, or something that it reads, is not what it was. What it had is moved to `superseded/`, never deleted.
A stage behind one that runs again is looked at when its turn comes: where the other has written the same bytes as
before, it stays as it is. A finished stage whose files are gone is made again only if a stage that has to run reads it.
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
    *("grpo.mismatch_limit", "grpo.loss.reference_memory", "reward.url", "reward.timeout"),
    *(f"{hook}.server.{key}" for hook in ("judge", "rewrite") for key in ("url", "api_key", "timeout", "retries")),
    *(f"{hook}.server.{key}" for hook in ("judge", "rewrite") for key in ("down", "wait_seconds", "concurrency")),
)
"""Settings of a stage, list elements without their number, on which its result does not depend, beyond rounding."""
PLACES = ("path", "config", "like", "from", "teacher", "stage", "files", "evaluations")
"""Last parts of keys that say where something is read: its digest is among the inputs instead."""
FREE_OF_MODEL = ("recompute", "recompute_modules", "recompute_method", "recompute_layers")
IN_FLIGHT = (
    *("optimizer", "steps", "mtp_loss", "expert_bias"),
    *("grpo.loss", "grpo.correction", "grpo.mtp_loss", "grpo.expert_bias"),
)
"""Settings of an unfinished training stage that may change: it goes on from its checkpoint."""
FORCED = "asked for with --force"
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
    own = _settings("", stage)
    tables = set() if isinstance(stage, MixStage) else {stage.model}
    tables |= {stage.teacher_model} if stage.kind == "distill" else set()
    tables |= {reward.model for reward in getattr(stage, "reward", []) if reward.init_from is not None}
    for name in tables:
        table = config.model if name is None else config.models[name]
        own |= _settings("model" if name is None else f"models.{name}", table, FREE_OF_MODEL)
    for benchmark in config.benchmark:
        if benchmark.name in getattr(stage, "benchmarks", []):
            own |= _settings(f"benchmark.{benchmark.name}", benchmark)
    return own | _settings("tokenizer", config.tokenizer) | {"seed": config.seed}


def _settings(key: str, table: Any, free: Collection[str] = FREE) -> dict[str, Any]:
    plain = json.loads(table.model_dump_json(by_alias=True, exclude_defaults=True))
    found = {}
    for name, value in _leaves("", plain):
        bare = [part for part in name.split(".") if not part.isdigit()]
        if any(bare[: each.count(".") + 1] == each.split(".") for each in free) or bare[-1] in PLACES:
            continue
        if bare[-1] == "call" and ".py:" in value:
            value = value.rpartition(":")[2]
        found[f"{key}.{name}" if key else name] = value
    return found


def inputs_of(config: RunConfig, index: int, states: Mapping[str, StageState], run: RunDir) -> dict[str, str]:
    """Key of the recipe -> digest of what stage `index` reads there now."""
    stage = config.stage[index]
    found = {}
    for need in needs(config, index):
        state = states.get(need.source)
        if state is not None:
            found[need.key] = digests.digest_of(state) if state.outputs else "not done"
        else:
            folder = checkpoint_of(run.path / need.source)
            found[need.key] = "missing" if folder is None else digests.digest_of_path(folder)
    found |= {key: digests.digest_of_path(path) for key, path in _files_of(stage, config)}
    return found | (_decontamination(stage, config) if isinstance(stage, MixStage) else {})


def _files_of(stage: Stage, config: RunConfig) -> Iterator[tuple[str, Path]]:
    """Files of the user's that the stage reads: data, functions, architectures, tokenizers."""
    for key, table in data_tables(stage):
        if (path := getattr(table, "path", None)) is not None:
            yield f"{key}.path", path
    for asked in config.problem_sets(stage) if isinstance(stage, EvalStage) else []:
        if asked.benchmark is not None and asked.prompts.path is not None:
            yield f"{asked.key}.prompts.path", asked.prompts.path
    for name in ("judge", "rewrite"):
        hook = getattr(stage, name, None)
        if hook is not None and hook.call is not None and ".py:" in hook.call:
            yield f"{name}.call", Path(hook.call.rpartition(":")[0])
    places = {"model.config": config.model_of(stage).config, "tokenizer.path": config.tokenizer.path}
    places["like"] = getattr(stage, "like", None)
    for key, path in places.items():
        if path is not None:
            yield from ((f"{key}/{file.name}", file) for file in _described(path))


def _described(path: Path) -> list[Path]:
    """The file, or of a model's folder its small files: config.json, tokenizer, templates."""
    if not path.is_dir():
        return [path]
    return sorted(file for file in path.iterdir() if file.suffix in (".json", ".model", ".jinja", ".txt"))


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
    states = run.known_states()
    order = selected(config, choice)
    single = {i: decide_one(config, i, states, run, forced=config.stage[i].name in choice.force) for i in order}
    while True:
        found = _with_those_behind(config, order, single)
        reading = {need.source for i, each in found.items() if each.action != "keep" for need in needs(config, i)}
        lost = {
            i: Decision(each.name, "again", f"what it wrote is gone or has another size: {', '.join(gone[:_SHOWN])}")
            for i, each in found.items()
            if each.action == "keep" and each.name in reading
            if (gone := digests.missing(states[each.name].outputs, run.stage(each.name).path))
        }
        if not lost:
            return [found[i] for i in order]
        single |= lost


def ahead_of(decisions: Collection[Decision]) -> frozenset[str]:
    """Names of the stages that have something to do."""
    return frozenset(decision.name for decision in decisions if decision.action != "keep")


def _with_those_behind(config: RunConfig, order: list[int], single: Mapping[int, Decision]) -> dict[int, Decision]:
    """The decisions, with "depends" for stages that read one that runs before them."""
    moving: set[str] = set()
    found = {}
    for index in order:
        decision = single[index]
        behind = [need.source for need in needs(config, index) if need.source in moving]
        if decision.action in ("keep", "resume") and behind:
            why = f"reads {', '.join(dict.fromkeys(behind))}, which runs first"
            decision = Decision(decision.name, "depends", why)
        if decision.action != "keep":
            moving.add(decision.name)
        found[index] = decision
    return found


def decide_one(
    config: RunConfig, index: int, states: Mapping[str, StageState], run: RunDir, *, forced: bool = False
) -> Decision:
    """What becomes of one stage, all that it reads being done or as it is, and its files being there."""
    stage = config.stage[index]
    state = states.get(stage.name)
    if state is None or not state.settings:  # recorded before a stage does anything
        if run.stage(stage.name).path.exists():
            return Decision(stage.name, "again", "nothing is known of how what lies in its folder was made")
        return Decision(stage.name, "run", "" if state is None else state.why)
    begun = state.state != "done"
    if forced and not (begun and state.why == FORCED):  # the same command again goes on with what it began
        return Decision(stage.name, "again", FORCED)
    if state.kind != stage.kind:
        return Decision(stage.name, "again", f"it was a {state.kind} stage and is a {stage.kind} stage now")
    now = inputs_of(config, index, states, run)
    keys = [*now, *(key for key in state.inputs if key not in now)]
    if changed := [key for key in keys if state.inputs.get(key) != now.get(key) and now.get(key) != "not done"]:
        return Decision(stage.name, "again", f"what it reads has changed: {', '.join(changed)}")
    settings = settings_of(stage, config)
    lines = list(_differences(state.settings, settings))
    if begun:
        return Decision(stage.name, "resume" if _may_go_on(stage, state, settings) else "again", _shown(lines))
    if lines and not _only_more_steps(stage, state, settings):
        return Decision(stage.name, "again", _shown(lines))
    return Decision(stage.name, "resume", "more steps are asked for") if lines else Decision(stage.name, "keep")


def selected(config: RunConfig, choice: Choice) -> list[int]:
    """Indices of the stages to look at, in running order.

    Raises:
        UserError: the choice names no stage, or forces one that is not looked at.
    """
    only, until, force = choice
    order = run_order(config)
    names = [config.stage[i].name for i in order]
    for option, given in (("--until", [until] if until else []), ("--only", only), ("--force", force)):
        if unknown := sorted(set(given) - set(names)):
            raise UserError(f"{option} {unknown[0]}: there is no such stage; stages are {', '.join(names)}")
    if until is not None:
        order = order[: names.index(until) + 1]
    order = [i for i in order if not only or config.stage[i].name in only]
    if left := sorted(force - {config.stage[i].name for i in order}):
        raise UserError(f"--force {left[0]}: --only or --until leaves that stage out; name it there too")
    return order


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


def _changed(state: StageState, settings: Mapping[str, Any]) -> set[str]:
    return {key for key in settings.keys() | state.settings.keys() if settings.get(key) != state.settings.get(key)}


def _only_more_steps(stage: Stage, state: StageState, settings: Mapping[str, Any]) -> bool:
    """Whether a finished training stage can simply go on: its schedule does not know how many steps there are."""
    if not isinstance(stage, LanguageModelStage | RewardModelStage) or stage.optimizer.schedule != "constant":
        return False
    more = settings.get("steps", 0) > state.settings.get("steps", 0)
    timed = any(key.endswith("last_steps") for key in settings)
    return _changed(state, settings) == {"steps"} and more and not timed and not hasattr(stage, "corpus")


def _may_go_on(stage: Stage, state: StageState, settings: Mapping[str, Any]) -> bool:
    """Whether an unfinished stage goes on under these settings: training does, where only IN_FLIGHT ones differ."""
    changed = _changed(state, settings)
    if not changed:
        return True
    if not isinstance(stage, LanguageModelStage | RewardModelStage):
        return False
    allowed = all(any(key == free or key.startswith(f"{free}.") for free in IN_FLIGHT) for key in changed)
    return allowed and ("steps" not in changed or settings.get("steps", 0) > state.steps_done)


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
