"""`megatron-r1 serve RUN STAGE`: a reward model behind an HTTP address. Arguments, checks, and the ranks; no torch.

Starts `pipeline/outputs/serve.py` in as many processes as the layout asks for, or becomes one of them under torchrun or
srun.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from megatron_r1.config.errors import UserError
from megatron_r1.config.run import RunConfig
from megatron_r1.config.stages import RewardModelStage

EPILOG = """\
POST /score {"items": [{"prompt": "...", "response": "..."}]} -> {"values": [...], "cut": 0, "checkpoint": "..."}
GET /health -> {"status": "ok", "stage": "...", "checkpoint": "..."}

A prompt is the question without its template; the server writes it under the template that the model was trained with.
A grpo stage asks it with [[stage.reward]] kind = "model", url = "http://HOST:PORT".

examples:
  megatron-r1 serve runs/x helpful
  megatron-r1 serve runs/x helpful --host 0.0.0.0 --port 8124 parallel.tensor=4 parallel.data=1
  megatron-r1 serve runs/x helpful --checkpoint runs/x/helpful/checkpoints/step-00000200
  torchrun --nproc-per-node 8 -m megatron_r1.cli serve runs/x helpful parallel.tensor=8

Nothing asks for a password: let only hosts that you trust reach the port. Ctrl-C or SIGTERM ends it.
"""


def add_serve(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb to the command line."""
    serve = verbs.add_parser(
        "serve",
        help="score answers with a reward model over HTTP",
        description="Serve the reward model of a stage of a run, in the layout of the run's recipe.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    serve.add_argument("run", type=Path, metavar="RUN", help="a run directory, e.g. runs/x")
    serve.add_argument("stage", metavar="STAGE", help='its stage of kind "reward_model"')
    serve.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="replace keys, as in run")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen at (default: 127.0.0.1)")
    serve.add_argument("--port", type=_port, default=8123, help="port to listen at (default: 8123; 0: any free one)")
    serve.add_argument("--nproc", type=int, metavar="N", help="processes to start here (default: as [parallel] asks)")
    serve.add_argument("--checkpoint", type=Path, metavar="DIR", help="instead of the stage's newest checkpoint")
    serve.set_defaults(command=_serve)


def _port(text: str) -> int:
    if not text.isdigit() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"got {text!r}; allowed: 0 to 65535")
    return int(text)


def _serve(arguments: argparse.Namespace) -> int:
    """Check, then become a rank, or start the ranks."""
    from megatron_r1.cluster.local import launch
    from megatron_r1.cluster.ranks import rank_variables
    from megatron_r1.config.load import load
    from megatron_r1.config.validate import check_world
    from megatron_r1.observe.rundir import RunDir

    run = RunDir.open(arguments.run.resolve())
    config = load(run.resolved, arguments.overrides)
    stage = _stage(config, arguments.stage)
    checkpoint = _checkpoint(arguments.checkpoint or run.stage(stage.name).path)
    variables = rank_variables(os.environ)
    if variables is not None and arguments.nproc is not None:
        raise UserError("--nproc starts processes, but this process is already a rank (RANK is set); leave it out")
    world = int(variables["WORLD_SIZE"]) if variables else arguments.nproc or config.parallel.world_size
    check_world(config.parallel, world)
    if variables is None:
        command = [sys.executable, "-m", "megatron_r1.cli", "serve", str(run.path), stage.name, *arguments.overrides]
        options = ["--host", arguments.host, "--port", str(arguments.port), "--checkpoint", str(checkpoint)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(config.threads)}
        return launch([*command, *options], world, run.path / "logs" / f"serve-{stage.name}", environment)
    os.environ.update(variables)
    from megatron_r1.pipeline.outputs import serve

    return serve.main(config, stage, checkpoint, arguments.host, arguments.port)


def _stage(config: RunConfig, name: str) -> RewardModelStage:
    found = {stage.name: stage for stage in config.stage}.get(name)
    if isinstance(found, RewardModelStage):
        return found
    known = [stage.name for stage in config.stage if isinstance(stage, RewardModelStage)]
    what = "there is no such stage in that run" if found is None else f'that stage is of kind "{found.kind}"'
    raise UserError(f"serve {name}: {what}; its reward_model stages: {', '.join(known) or 'none'}")


def _checkpoint(path: Path) -> Path:
    from megatron_r1.checkpoint.folders import require_reward_model
    from megatron_r1.pipeline.inputs import checkpoint_of

    found = checkpoint_of(path)
    if found is None:
        raise UserError(f"{path} holds no complete checkpoint: run the stage first, or name one with --checkpoint")
    require_reward_model(found)
    return found.resolve()
