"""One rank of a run: joins the world, then runs the stages that are not done, in order."""

from __future__ import annotations

import errno
import gc
import logging
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

from megatron_r1.config.errors import RunFailed, UserError
from megatron_r1.config.run import (
    EvalStage,
    GrpoStage,
    PretrainStage,
    RewardModelStage,
    RunConfig,
    SftStage,
    Stage,
    TrainStage,
)
from megatron_r1.model import kernels
from megatron_r1.model.presets import Architecture
from megatron_r1.observe.rundir import RunDir, StageState
from megatron_r1.pipeline.run import checkpoint_of, preflight, start_of, with_steps

logger = logging.getLogger(__name__)

# Warnings that libraries issue about their own insides (deprecated calls, optional kernels). Matched by the module
# that the warning is attributed to, so that ours, and a library's about how we call it, are still shown.
QUIET_MODULES = r"(torch|megatron\.core|transformers|tensorboard|google)(\.|$)"
QUIET_CATEGORIES = (FutureWarning, DeprecationWarning, UserWarning)
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def main(config: RunConfig, run_dir: Path) -> int:
    """Run this rank; returns its exit status: 0, 2 after a user's mistake, 1 when it cannot go on; rank 0 says why."""
    _set_up_process(config)
    from megatron_r1.parallel import world as worlds
    from megatron_r1.train.stopping import Stopped

    try:
        world = worlds.start(config.parallel, config.seed, config.timeout_minutes)
        _run_stages(config, RunDir(run_dir), world)
    except (UserError, RunFailed) as error:
        _say(f"error: {error}")
        return 2 if isinstance(error, UserError) else 1
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        _say(f"error: cannot write to {run_dir}: {error}. Free some space, then run the same command again")
        return 2
    except Stopped as stopped:
        if os.environ.get("RANK", "0") == "0":
            _say(f"{stopped}. The same command goes on from here")
        return 0
    finally:
        worlds.stop()
    return 0


def _say(text: str) -> None:
    """A message for people. Every rank says what ended it: an error may be one rank's alone."""
    rank = os.environ.get("RANK", "0")
    print(f"megatron-r1{'' if rank == '0' else f' (rank {rank})'}: {text}", file=sys.stderr)


def _set_up_process(config: RunConfig) -> None:
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


def _run_stages(config: RunConfig, run: RunDir, world: Any) -> None:
    from megatron_r1.data.heldout import heldout_ids
    from megatron_r1.pipeline.summary import write_summary
    from megatron_r1.train.context import RunContext
    from megatron_r1.train.evaluate import heldout_prompts
    from megatron_r1.train.stopping import Stopped, StopRequest, forget_stop_file

    arch, tokenizer = preflight(config, world.size)
    config = with_steps(config)
    evals = [stage for stage in config.stage if isinstance(stage, EvalStage)]
    heldout = heldout_ids(prompt for stage in evals for prompt in heldout_prompts(stage, tokenizer))
    states = _states(config, run)
    ahead = [stage for stage, state in zip(config.stage, states, strict=True) if state.state != "done"]
    _check_on_device(ahead, config, arch, world)
    if world.rank == 0:
        run.write_stages(states)
    forget_stop_file(run.path, world)
    stop = StopRequest(run.path, world)
    context = RunContext(config, arch, world, tokenizer, run, stop, heldout, _attempt(run))
    gc.freeze()  # Megatron collects garbage twice a checkpoint: what the imports made need not be searched each time
    for index, stage in enumerate(config.stage):
        if states[index].state == "done":
            continue
        if stop.agreed():
            raise Stopped(f"stopped before stage {stage.name}")
        _run_stage(stage, index, context)
    if world.rank == 0:
        write_summary(run)


def _check_on_device(stages: list[Stage], config: RunConfig, arch: Architecture, world: Any) -> None:
    """What only Megatron or this rank's device can judge, of every stage before the first one trains. Builds no model.

    Raises UserError for a model or an optimizer that cannot be built here.
    """
    from megatron_r1.model.build import model_config
    from megatron_r1.train.optimizer import optimizer_config

    for stage in stages:
        model_config(arch, config.model, world, scalar_head=isinstance(stage, RewardModelStage))
        if isinstance(stage, TrainStage):
            optimizer_config(stage.optimizer, config.model, world, f"stage.{stage.name}.optimizer.megatron")


def _run_stage(stage: Stage, index: int, context: Any) -> None:
    from megatron_r1.pipeline.evaluation import run_evaluation
    from megatron_r1.pipeline.export import run_export
    from megatron_r1.train.grpo import grpo
    from megatron_r1.train.pretrain import pretrain
    from megatron_r1.train.reward_model import reward_model
    from megatron_r1.train.sft import sft
    from megatron_r1.train.stopping import Stopped

    run, rank = context.run, context.world.rank
    began = time.time()
    if rank == 0:
        run.update_stage(stage.name, state="running", started=began)
    start = _start_checkpoint(context.config, index, run.path)
    try:
        if isinstance(stage, PretrainStage):
            result = pretrain(stage, context, start)
        elif isinstance(stage, SftStage):
            result = sft(stage, context, start)
        elif isinstance(stage, GrpoStage):
            result = grpo(stage, context, start)
        elif isinstance(stage, RewardModelStage):
            result = reward_model(stage, context, start)
        elif isinstance(stage, EvalStage):
            result = run_evaluation(stage, context, start)
        else:
            result = run_export(stage, context, start)
    except Stopped:
        raise
    except Exception:
        if rank == 0:
            run.update_stage(stage.name, state="failed")
        raise
    if rank == 0:
        finished = time.time()
        run.update_stage(stage.name, state="done", finished=finished, result=result)
        logger.info("stage %s done in %.0f s", stage.name, finished - began)


def _start_checkpoint(config: RunConfig, index: int, run_dir: Path) -> Path | None:
    start = start_of(config, index, run_dir)
    if start is None:
        return None
    found = checkpoint_of(start)
    if found is None:
        raise UserError(f"stage {config.stage[index].name!r} starts from {start}, which holds no complete checkpoint")
    return found


def _states(config: RunConfig, run: RunDir) -> list[StageState]:
    """The recipe's stages with what stages.json knows of them."""
    known = {state.name: state for state in run.read_stages()}
    states = []
    for stage in config.stage:
        fresh = StageState(name=stage.name, kind=stage.kind, steps=getattr(stage, "steps", 0))
        old = known.get(stage.name)
        states.append(old if old is not None and old.kind == stage.kind else fresh)
    return states


def _attempt(run: RunDir) -> int:
    """Which start of this run this is; the launcher has made the log folder already."""
    found = [p.name.removeprefix("attempt-") for p in (run.path / "logs").glob("attempt-*")]
    return max((int(n) for n in found if n.isdigit()), default=1)
