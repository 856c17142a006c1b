"""The `megatron-r1` command: reads the arguments, checks the recipe, then starts ranks or becomes
one.

The parent process imports neither torch nor Megatron, so help, mistakes and dry runs answer at
once.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_r1 import __version__
from megatron_r1.config.errors import RunFailed, UserError
from megatron_r1.config.run import RunConfig
from megatron_r1.config.stages import EpochStage
from megatron_r1.convert.command import add_convert
from megatron_r1.pipeline.outputs.serve_command import add_serve

if TYPE_CHECKING:
    from megatron_r1.pipeline.decide import Choice, Decision

EXIT_FAILED = 1
EXIT_USER_ERROR = 2

DESCRIPTION = "The DeepSeek-R1 recipe on Megatron-Core, from one CPU to a cluster."
EXAMPLES = """\
examples:
  megatron-r1 run examples/quickstart/recipe.toml            train a tiny R1-Zero on this machine
  megatron-r1 run recipe.toml --dry-run                      show what a recipe means, start nothing
  megatron-r1 status runs/quickstart                         which stages are done, how far the others are
  megatron-r1 report runs/quickstart                         write one HTML page about a run
  megatron-r1 convert export CHECKPOINT HF_DIR               Megatron -> Hugging Face; also import, cast, verify
  megatron-r1 config | less                                  every configuration key and its default
"""
RUN_EXAMPLES = """\
A recipe is a TOML file: the model, the layout, and the stages to run in order. `key=value`
replaces any of its keys; a stage is addressed by its name or its index, and values have TOML
syntax.

A run directory holds everything a run makes. Running the same recipe again goes on where it
stopped: stages that are done are skipped, a stage that was interrupted resumes from its last
checkpoint. A setting, or a file, that is not what it was when a stage ran makes that stage run
again, and those behind it whose input is then another; what they had moves to RUN/superseded/.

examples:
  megatron-r1 run recipe.toml
  megatron-r1 run recipe.toml seed=7 stage.r1-zero.grpo.prompts=16 stage.0.steps=10
  megatron-r1 run recipe.toml --nproc 4 parallel.tensor=2     4 processes here, TP 2 x DP 2
  megatron-r1 run recipe.toml --run-dir /scratch/me/run-7
  megatron-r1 run recipe.toml --until rl1                     stop after the stage rl1
  megatron-r1 run recipe.toml --only eval-rl1 --force eval-rl1    that evaluation, anew
  torchrun --nnodes 2 --nproc-per-node 8 -m megatron_r1.cli run recipe.toml
  srun --ntasks 16 megatron-r1 run recipe.toml                each task is one rank

Ctrl-C (or SIGTERM) lets every rank save a checkpoint and end; a second one kills them.
Exit status: 0 done; 2 a mistake in the recipe or the arguments; 130 or 143 stopped by a signal.
"""

STATUS_EXAMPLES = """\
states:
  pending   not begun                      running   at work now
  done      finished, its results kept     stopped   was running when its run ended; the same run command goes on
  failed    ended with an error            stale     runs again, for the reason in the last column

Steps are optimizer steps; chunks of prompts or rows where a stage makes data; completions where it evaluates. The time
to go is that of the last steps. A stage that was resumed counts its time from then on.

examples:
  megatron-r1 status runs/quickstart
  megatron-r1 status runs/quickstart --watch 10
  megatron-r1 status runs/quickstart --json | jq .state
  megatron-r1 status runs/quickstart --table >> README.md
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit status; a user's mistake is one message on stderr and
    status 2.
    """
    try:
        arguments = _parse(argv)
        status: int = arguments.command(arguments)
    except UserError as error:
        rank = os.environ.get("RANK", "0")
        where = f" (rank {rank})" if rank != "0" else ""
        print(f"megatron-r1{where}: error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except RunFailed as error:
        print(f"megatron-r1: error: {error}", file=sys.stderr)
        return EXIT_FAILED
    except BrokenPipeError:  # `megatron-r1 config | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return status


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _parser()
    # argparse takes positional arguments only in one run; overrides may also follow an option.
    arguments, rest = parser.parse_known_args(argv)
    late = [text for text in rest if not text.startswith("-") and "overrides" in arguments]
    if len(late) < len(rest):
        unknown = " ".join(text for text in rest if text not in late)
        parser.error(f"unknown argument: {unknown} (see `megatron-r1 --help`)")
    if late:
        arguments.overrides = [*arguments.overrides, *late]
    return arguments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="megatron-r1",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"megatron-r1 {__version__}")
    verbs = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_run(verbs)
    add_convert(verbs)
    add_serve(verbs)

    _add_status(verbs)
    report = verbs.add_parser(
        "report",
        help="write report.html into a run directory",
        description="Write one self-contained HTML page about a run, finished or not. No server is needed to read it.",
        epilog="examples:\n  megatron-r1 report runs/quickstart\n"
        "  megatron-r1 report runs/quickstart --curve learning-curve.svg",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    report.add_argument("run", type=Path, metavar="RUN", help="a run directory, e.g. runs/quickstart")
    report.add_argument(
        "--curve",
        type=Path,
        metavar="FILE.svg",
        help="also write the learning curve (accuracy, response length) as SVG",
    )
    report.set_defaults(command=_report)

    config = verbs.add_parser(
        "config",
        help="list every configuration key with its type, default and meaning",
        description="Print the reference of all configuration keys (Markdown).",
    )
    config.set_defaults(command=_config)
    return parser


def _add_status(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    status = verbs.add_parser(
        "status",
        help="show where a run stands: stages, steps, time to go",
        description="Show where a run stands. Reads the files of its directory only, so it may be asked at any time, "
        "also from another machine.",
        epilog=STATUS_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    status.add_argument("run", type=Path, metavar="RUN", help="a run directory, e.g. runs/quickstart")
    shape = status.add_mutually_exclusive_group()
    shape.add_argument("--json", action="store_true", help="print one JSON object, for programs")
    shape.add_argument("--table", action="store_true", help="print the closing table so far as Markdown, for a README")
    shape.add_argument(
        "--watch",
        type=_seconds,
        metavar="SECONDS",
        help="print it again every so often until the run is done, failed or stopped; Ctrl-C ends it",
    )
    status.set_defaults(command=_status)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.1 <= value <= 86400:
        raise argparse.ArgumentTypeError(f"got {text!r}; allowed: seconds from 0.1 to 86400")
    return value


def _add_run(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    from megatron_r1.model.presets import preset_names

    run = verbs.add_parser(
        "run",
        help="run the stages of a recipe",
        description="Run the stages of a recipe, or go on with them.",
        epilog=f"{RUN_EXAMPLES}\nmodel presets (model.preset): {', '.join(preset_names())}\n"
        "All keys: megatron-r1 config",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    run.add_argument("recipe", type=Path, metavar="RECIPE", help="the TOML file")
    run.add_argument("overrides", nargs="*", metavar="key=value", help="replace keys of the recipe, e.g. seed=7")
    run.add_argument(
        "--nproc",
        type=_positive,
        metavar="N",
        help="processes to start here (default: what the recipe's [parallel] table asks for)",
    )
    run.add_argument("--run-dir", type=Path, metavar="DIR", help="where the run lives (default: runs/<name>)")
    run.add_argument("--until", metavar="STAGE", help="run the stages up to this one")
    run.add_argument(
        "--only", action="append", default=[], metavar="STAGE", help="run this stage alone (may be given several times)"
    )
    run.add_argument(
        "--force",
        action="append",
        default=[],
        metavar="STAGE",
        help="begin this stage anew although it is done; what it had moves to superseded/ (may be given several times)",
    )
    run.add_argument(
        "--dry-run",
        action="store_true",
        help="check everything, print the resolved recipe, its departures from the paper and the layout; start nothing",
    )
    run.set_defaults(command=_run)


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}; allowed: a whole number above 0")
    return int(text)


def _run(arguments: argparse.Namespace) -> int:
    """Check, then print (--dry-run), become a rank, or start the ranks."""
    from megatron_r1.cluster.ranks import rank_variables
    from megatron_r1.config.load import load
    from megatron_r1.config.validate import check_world
    from megatron_r1.observe.rundir import RunDir
    from megatron_r1.pipeline.decide import Choice, ahead_of, decide
    from megatron_r1.pipeline.preflight import preflight

    variables = rank_variables(os.environ)
    config = load(arguments.recipe, arguments.overrides)
    if variables is not None and arguments.nproc is not None:
        raise UserError("--nproc starts processes, but this process is already a rank (RANK is set); leave it out")
    world = int(variables["WORLD_SIZE"]) if variables else arguments.nproc or config.parallel.world_size
    check_world(config.parallel, world)
    run_dir = (arguments.run_dir or Path("runs") / config.name).resolve()
    run = RunDir(run_dir)
    choice = Choice(frozenset(arguments.only), arguments.until, frozenset(arguments.force))
    decisions = decide(config, run, choice)
    preflight(config, world, ahead_of(decisions))
    if arguments.dry_run:
        print(_plan(config, world, run_dir, decisions))
        return 0
    if variables is None:
        _write_files(arguments.recipe, config, run_dir)
        _announce(decisions)
        return _start_ranks(config, world, run_dir, choice)
    os.environ.update(variables)
    own = arguments.recipe.resolve() == run_dir / "resolved.toml"  # our launcher's rank: the parent has written them
    if variables["RANK"] == "0" and not own:
        _write_files(arguments.recipe, config, run_dir)
    from megatron_r1.pipeline import worker

    return worker.main(config, run_dir, choice)


def _announce(decisions: Sequence[Decision]) -> None:
    """Which stages go on, run again, or are done; nothing where a run is new."""
    if all(decision.action == "run" for decision in decisions):
        return
    words = {"run": "to run", "resume": "goes on", "again": "runs again", "keep": "done", "depends": "looked at again"}
    for decision in decisions:
        print(f"stage {decision.name}: {words[decision.action]}{f' ({decision.why})' if decision.why else ''}")
    sys.stdout.flush()


def _plan(config: RunConfig, world: int, run_dir: Path, decisions: Sequence[Decision]) -> str:
    """What a dry run prints: valid TOML, everything else in comments."""
    from megatron_r1.config.departures import departures
    from megatron_r1.config.load import dump
    from megatron_r1.pipeline.inputs import waits_for_data, with_steps

    layout = config.parallel
    data = world // layout.model_size
    counted = [stage for stage in config.stage if isinstance(stage, EpochStage) and stage.epochs is not None]
    notes = [
        f"run directory: {run_dir}",
        f"layout: {world} process(es) = TP {layout.tensor} x PP {layout.pipeline} x CP "
        f"{layout.context} x DP {data}; "
        f"experts: EP {layout.expert} x ETP {layout.etp}; VPP {layout.virtual_pipeline}",
        f"stages: {' -> '.join(decision.name for decision in decisions)}",
        *(f"  {d.name}: {d.action}{f' ({d.why})' if d.why else ''}" for d in decisions if d.action != "run"),
        *(
            f"stage {stage.name}: {stage.epochs:g} epochs in {planned.steps} steps"
            for stage in counted
            if not waits_for_data(stage) and isinstance(planned := with_steps(stage), EpochStage)
        ),
        "departures from the paper:",
        *([f"  {item}" for item in departures(config)] or ["  none"]),
    ]
    return dump(config) + "\n" + "\n".join(f"# {line}" for line in notes)


def _write_files(recipe: Path, config: RunConfig, run_dir: Path) -> None:
    """What was asked, what it became, and in what it departs from the paper."""
    from megatron_r1.config.departures import departures
    from megatron_r1.config.load import dump
    from megatron_r1.observe.liveness import at_work
    from megatron_r1.observe.rundir import Departure, RunDir, write_text

    run = RunDir(run_dir)
    found = departures(config)
    try:
        with at_work(run):  # no files of another run that is going on are overwritten
            if recipe.resolve() != run.resolved:  # else a run is continued from its resolved recipe: keep the first
                write_text(run.recipe, recipe.read_text(encoding="utf-8"))
            write_text(run.resolved, dump(config))
            run.write_departures([Departure(key=d.key, paper=d.paper, here=d.here, why=d.why) for d in found])
    except OSError as error:
        raise UserError(
            f"the run directory {run_dir} cannot be written: {error.strerror}; choose another with --run-dir"
        ) from error
    print(f"run directory: {run_dir}")
    print("departures from the paper:", "" if found else "none")
    for item in found:
        print(f"  {item}")
    sys.stdout.flush()


def _start_ranks(config: RunConfig, world: int, run_dir: Path, choice: Choice) -> int:
    from megatron_r1.cluster.local import launch
    from megatron_r1.observe.rundir import RunDir, StageDir

    logs = StageDir(run_dir)
    command = [sys.executable, "-m", "megatron_r1.cli", "run", str(RunDir(run_dir).resolved)]
    until = ["--until", choice.until] if choice.until else []
    chosen = [*until, *(word for name in sorted(choice.only) for word in ("--only", name))]
    forced = [word for name in sorted(choice.force) for word in ("--force", name)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(config.threads)}
    status = launch(
        [*command, *chosen, *forced, "--run-dir", str(run_dir)], world, logs.log_dir(logs.next_attempt()), environment
    )
    if status > 128:
        ranks = [] if world == config.parallel.world_size else ["--nproc", str(world)]
        again = shlex.join(["megatron-r1", *command[3:], *chosen, "--run-dir", str(run_dir), *ranks])
        print(f"megatron-r1: stopped; to go on from the last checkpoint: {again}", file=sys.stderr)
    return status


def _status(arguments: argparse.Namespace) -> int:
    import json

    from megatron_r1.observe.evaluations import closing_markdown, closing_rows
    from megatron_r1.observe.rundir import RunDir
    from megatron_r1.observe.status import print_status, read_status, status_json, watch

    run = RunDir.open(arguments.run)
    if arguments.table:
        rows = closing_rows(run)
        if not rows:
            raise UserError(f"{run.path}: no evaluation is done yet, so there is no table to print")
        print(closing_markdown(rows), end="")
    elif arguments.json:
        print(json.dumps(status_json(read_status(run)), indent=2, ensure_ascii=False))
    elif arguments.watch is not None:
        try:
            watch(run, arguments.watch)
        except KeyboardInterrupt:
            print()
    else:
        print_status(read_status(run))
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from megatron_r1.observe.report import write_learning_curve, write_report
    from megatron_r1.observe.rundir import RunDir

    run = RunDir.open(arguments.run).path
    print(write_report(run))
    if arguments.curve is not None:
        print(write_learning_curve(run, arguments.curve))
    return 0


def _config(_: argparse.Namespace) -> int:
    from megatron_r1.config.load import describe

    print(describe(), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
