"""One rank of a run: joins the world, then runs the stages that are not done, in order."""

from __future__ import annotations

import contextlib
import errno
import gc
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_r1.config.errors import RunFailed, UserError
from megatron_r1.config.run import RunConfig
from megatron_r1.config.stages import RewardModelStage, Stage, TrainStage
from megatron_r1.data.tokenizers import Tokenizer
from megatron_r1.model import kernels
from megatron_r1.observe.liveness import at_work
from megatron_r1.observe.rundir import RunDir, StageState
from megatron_r1.pipeline.decide import (
    Choice,
    Decision,
    ahead_of,
    decide,
    fresh,
    inputs_of,
    selected,
    set_aside,
    settings_of,
)
from megatron_r1.pipeline.digests import measure, output_files
from megatron_r1.pipeline.graph import needs, start_source
from megatron_r1.pipeline.inputs import waits_for_data, weights_of, with_paths, with_steps
from megatron_r1.pipeline.preflight import check_stage, preflight

if TYPE_CHECKING:
    from megatron_r1.train.context import RunContext

logger = logging.getLogger(__name__)

# Warnings that libraries issue about their own insides (deprecated calls, optional kernels). Matched by the module
# that the warning is attributed to, so that ours, and a library's about how we call it, are still shown.
QUIET_MODULES = r"(torch|megatron\.core|transformers|tensorboard|google)(\.|$)"
QUIET_CATEGORIES = (FutureWarning, DeprecationWarning, UserWarning)
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def main(config: RunConfig, run_dir: Path, choice: Choice) -> int:
    """Run this rank; returns its exit status: 0, 2 after a user's mistake, 1 when it cannot go on; rank 0 says why."""
    set_up_process(config)
    from megatron_r1.parallel import world as worlds
    from megatron_r1.train.stopping import Stopped

    try:
        world = worlds.start(config.parallel, config.seed, config.timeout_minutes)
        with at_work(RunDir(run_dir)) if world.rank == 0 else contextlib.nullcontext():
            _run_stages(config, RunDir(run_dir), choice, world)
    except (UserError, RunFailed) as error:
        say(f"error: {error}")
        return 2 if isinstance(error, UserError) else 1
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        say(f"error: cannot write to {run_dir}: {error}. Free some space, then run the same command again")
        return 2
    except Stopped as stopped:
        if os.environ.get("RANK", "0") == "0":
            say(f"{stopped}. The same command goes on from here")
        return 0
    finally:
        worlds.stop()
    return 0


def say(text: str) -> None:
    """A message for people. Every rank says what ended it: an error may be one rank's alone."""
    rank = os.environ.get("RANK", "0")
    print(f"megatron-r1{'' if rank == '0' else f' (rank {rank})'}: {text}", file=sys.stderr)


def set_up_process(config: RunConfig) -> None:
    """Logging, warnings, threads and kernels of a rank."""
    for category in QUIET_CATEGORIES:
        warnings.filterwarnings("ignore", category=category, module=QUIET_MODULES)
    rank = int(os.environ.get("RANK", "0"))
    logging.basicConfig(
        level=logging.INFO if rank == 0 else logging.WARNING, format="%(asctime)s %(name)s: %(message)s", force=True
    )
    logging.getLogger("megatron.core").setLevel(logging.WARNING)
    kernels.start(config.model)
    import torch

    torch.set_num_threads(config.threads)


def _run_stages(config: RunConfig, run: RunDir, choice: Choice, world: Any) -> None:
    from megatron_r1.data.heldout import heldout_ids
    from megatron_r1.model.presets import architecture
    from megatron_r1.pipeline.summary import write_summary
    from megatron_r1.train.context import RunContext
    from megatron_r1.train.evaluate import heldout_prompts
    from megatron_r1.train.stopping import Stopped, StopRequest, forget_stop_file

    ahead = ahead_of(world.broadcast_from_0(decide(config, run, choice) if world.rank == 0 else None))
    tokenizer = preflight(config, world.size, ahead)
    heldout = heldout_ids(prompt for asked in config.all_problem_sets() for prompt in heldout_prompts(asked, tokenizer))
    order = selected(config, choice)
    _check_on_device([config.stage[i] for i in order if config.stage[i].name in ahead], config, tokenizer, world)
    if world.rank == 0:
        run.write_stages(_states(config, run))
    forget_stop_file(run.path, world)
    context = RunContext(
        config=config,
        arch=architecture(config.model, tokenizer.vocab_size),
        model=config.model,
        world=world,
        tokenizer=tokenizer,
        run=run,
        stop=StopRequest(run.path, world),
        heldout=heldout,
        attempt=_attempt(run),
        checkpoint=partial(weights_of, config=config, run=run),
    )
    gc.freeze()  # Megatron collects garbage twice a checkpoint: what the imports made need not be searched each time
    for index in order:
        decision = _on_rank_0(world, partial(_prepare, config, index, run, choice))
        choice = choice._replace(force=choice.force - {decision.name})  # once
        if decision.action == "keep":
            continue
        if context.stop.agreed():
            raise Stopped(f"stopped before stage {decision.name}")
        _run_stage(config.stage[index], index, context.of(config.stage[index]))
    if world.rank == 0:
        write_summary(run)


def _prepare(config: RunConfig, index: int, run: RunDir, choice: Choice) -> Decision:
    """Decide about a stage, move aside what it has where it begins anew, and record what it depends on."""
    stage = config.stage[index]
    decision = next(each for each in decide(config, run, choice) if each.name == stage.name)
    states = run.known_states()
    if decision.action == "keep":
        logger.info("stage %s is done", stage.name)
        return decision
    for need in needs(config, index):
        if need.source in states and states[need.source].state != "done":
            raise UserError(
                f"stage {stage.name!r} reads stage {need.source!r}, which is not done; run that first (leave out "
                "--only, or name both)"
            )
    if decision.action == "again":
        logger.info("stage %s runs again: %s", stage.name, decision.why)
        set_aside(run, stage.name)
        run.replace_stage(fresh(stage, decision.why))
    elif decision.why:
        logger.info("stage %s goes on: %s", stage.name, decision.why)
    settings, inputs = settings_of(stage, config), inputs_of(config, index, states, run)
    run.update_stage(stage.name, state="pending", settings=settings, inputs=inputs, outputs={})
    return decision


def _check_on_device(stages: list[Stage], config: RunConfig, tokenizer: Tokenizer, world: Any) -> None:
    """What only Megatron or this rank's device can judge, of every stage before the first one trains. Builds no model.

    Raises UserError for a model or an optimizer that cannot be built here.
    """
    from megatron_r1.model.build import model_config
    from megatron_r1.model.presets import architecture
    from megatron_r1.train.optimizer import optimizer_config

    for stage in stages:
        model = config.model_of(stage)
        arch = architecture(model, tokenizer.vocab_size)
        model_config(arch, model, world, scalar_head=isinstance(stage, RewardModelStage))
        if isinstance(stage, TrainStage):
            optimizer_config(stage.optimizer, model, world, f"stage.{stage.name}.optimizer.megatron")


def _run_stage(stage: Stage, index: int, context: RunContext) -> None:
    from megatron_r1.parallel.world import seed_generators
    from megatron_r1.pipeline.stage_kinds import runner
    from megatron_r1.train.stopping import Stopped

    run, world, config = context.run, context.world, context.config
    began = time.time()
    seed_generators(config.seed)
    try:
        ready = with_steps(with_paths(stage, run))
        if waits_for_data(stage):
            check_stage(ready, config, world.size, context.tokenizer, context.arch)
        if world.rank == 0:
            run.update_stage(stage.name, state="running", started=began, steps=getattr(ready, "steps", 0))
        source = start_source(config, index)
        result = runner(stage.kind)(ready, context, None if source is None else context.checkpoint(source))
    except Stopped:
        raise
    except Exception:
        if world.rank == 0:
            run.update_stage(stage.name, state="failed")
        raise
    folder = run.stage(stage.name)
    parts = _gather(world, measure(output_files(stage, folder)[world.rank :: world.size], folder.path))
    if world.rank == 0:
        finished = time.time()
        outputs = {name: part[name] for part in parts for name in part}
        run.update_stage(stage.name, state="done", finished=finished, result=result, outputs=outputs)
        logger.info("stage %s done in %.0f s", stage.name, finished - began)


def _on_rank_0(world: Any, action: Callable[[], Any]) -> Any:
    """What rank 0 finds, on all ranks; its UserError, too."""
    found: Any = None
    if world.rank == 0:
        try:
            found = action()
        except UserError as error:
            found = error
    found = world.broadcast_from_0(found)
    if isinstance(found, UserError):
        raise found
    return found


def _gather(world: Any, value: Any) -> list[Any]:
    import torch.distributed as dist

    parts: list[Any] = [None] * world.size
    dist.all_gather_object(parts, value)
    return parts


def _states(config: RunConfig, run: RunDir) -> list[StageState]:
    """The recipe's stages with what stages.json knows of them."""
    known = run.known_states()
    return [known.get(stage.name) or fresh(stage) for stage in config.stage]


def _attempt(run: RunDir) -> int:
    """Which start of this run this is; the launcher has made the log folder already."""
    found = [p.name.removeprefix("attempt-") for p in (run.path / "logs").glob("attempt-*")]
    return max((int(n) for n in found if n.isdigit()), default=1)
