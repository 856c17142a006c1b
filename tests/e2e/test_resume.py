"""A run that is killed, stopped or spoiled goes on as if nothing had happened: equal to the bit."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.e2e.conftest import Finished
from tests.e2e.recipes import (
    GRPO_EVERY,
    GRPO_STEPS,
    PRETRAIN_EVERY,
    checkpoints,
    differences,
    finish,
    lines,
    living,
    loop_state,
    metrics,
    start,
    steps,
    wait_until,
    write_recipe,
)

Moment = Callable[[Path], bool]


def in_pretraining(run: Path) -> bool:
    return any(step > PRETRAIN_EVERY + 2 for step in steps(run / "pretrain"))


def in_the_third_phase(run: Path) -> bool:
    """The newest checkpoint is from the middle of the second phase then."""
    return (run / "r1-zero" / "rollouts" / "step-000004.jsonl.gz").exists()


def while_saving(run: Path) -> bool:
    return f"step-{GRPO_STEPS:08d}.writing" in checkpoints(run, "r1-zero")


# When the launcher is killed, and what the next attempt must say that it goes on from.
MOMENTS: list[tuple[Moment, str, int]] = [
    (in_pretraining, "pretrain", PRETRAIN_EVERY),
    (in_the_third_phase, "r1-zero", GRPO_EVERY),
    (while_saving, "r1-zero", GRPO_EVERY),
]


def kill_and_go_on(run: Path, recipe: Path, *overrides: str) -> str:
    """A run killed at every one of MOMENTS and begun again each time; returns all it printed."""
    output = run.with_suffix(".log")
    arguments: tuple[str | Path, ...] = ("run", recipe, *overrides, "--run-dir", run)
    for moment, stage, expected in MOMENTS:
        process = start(*arguments, output=output)
        wait_until(partial(moment, run), process, moment.__name__)
        os.kill(process.pid, signal.SIGKILL)  # the launcher alone: the ranks must die with it
        process.wait()
        orphans_gone(process.pid)
        complete = [name for name in checkpoints(run, stage) if not name.endswith(".writing")]
        assert complete[-1] == f"step-{expected:08d}", f"killed at another moment than {moment.__name__}: {complete}"
    assert f"step-{GRPO_STEPS:08d}.writing" in checkpoints(run, "r1-zero"), "the last kill did not hit the save"
    last = finish(*arguments)
    assert last.returncode == 0, last.stderr
    return output.read_text() + last.stdout + last.stderr


def orphans_gone(session: int) -> None:
    deadline = time.monotonic() + 10
    while left := living(session):
        assert time.monotonic() < deadline, f"these outlived the launcher: {left}"
        time.sleep(0.02)


def check_killed_run(run: Path, printed: str, uninterrupted: Path) -> None:
    assert printed.count("goes on from") == len(MOMENTS)
    assert differences(uninterrupted, run) == []
    assert [row["step"] for row in lines(run / "r1-zero")] == list(range(1, GRPO_STEPS + 1))
    assert checkpoints(run, "r1-zero") == checkpoints(uninterrupted, "r1-zero"), "leftovers of the killed save"
    logs = sorted(path.name for path in (run / "logs").iterdir())
    assert logs == [f"attempt-{i}" for i in range(1, len(MOMENTS) + 2)]


def test_the_recipe_tests_something(reference: Finished) -> None:
    """A gradient, a policy that leaves its reference behind, a checkpoint in the middle of a phase."""
    rows = metrics(reference.folder)["r1-zero"]
    assert sum(row["optim/grad_norm"] > 0.01 for row in rows) >= GRPO_STEPS - 1
    assert any(row["policy/ratio"] != 1 for row in rows)
    assert all(row["policy/kl"] > 0 for row in rows[2:])
    phases = [row for row in rows if "groups/no_signal" in row]  # written once a phase, with its first step
    assert [row["step"] for row in phases] == [1, 3, 5]
    assert sum(row["groups/no_signal"] < 1 for row in phases) >= 2
    folder = reference.folder / "r1-zero" / "checkpoints" / f"step-{GRPO_EVERY:08d}"
    state = loop_state(folder)
    assert (state["phase"]["taken"], len(state["phase"]["order"]), state["reference_step"]) == (1, 2, 0)


def test_a_killed_run_goes_on_to_the_same_bits(reference: Finished, tmp_path: Path) -> None:
    run = tmp_path / "killed"
    printed = kill_and_go_on(run, reference.recipe)
    check_killed_run(run, printed, reference.folder)


# With this width Megatron pads the gradient bucket before the first stage's embedding, which has a bucket of its own
# because multi-token prediction shares it with the last stage: the optimizer state behind a padded bucket.
PADDED = ("parallel.pipeline=2", "model.override.q_lora_rank=24")


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [("parallel.data=2",), PADDED], ids=["DP2", "PP2"])
def test_a_killed_run_of_two_processes_goes_on_to_the_same_bits(overrides: tuple[str, ...], tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    whole = finish("run", recipe, *overrides, "--run-dir", tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    printed = kill_and_go_on(tmp_path / "killed", recipe, *overrides)
    check_killed_run(tmp_path / "killed", printed, tmp_path / "whole")


def test_a_stopped_run_goes_on_to_the_same_bits(reference: Finished, tmp_path: Path) -> None:
    run, output = tmp_path / "stopped", tmp_path / "stopped.log"
    arguments = ("run", reference.recipe, "--run-dir", run)

    # 1. a file called `stop`
    process = start(*arguments, output=output)
    wait_until(lambda: len(steps(run / "pretrain")) > 2, process, "the first steps")
    (run / "stop").touch()
    assert process.wait(60) == 0
    done = steps(run / "pretrain")[-1]
    assert PRETRAIN_EVERY > done > 2
    assert checkpoints(run, "pretrain") == [f"step-{done:08d}"]
    said = f"stage pretrain stopped after step {done}; its state is saved. The same command goes on from here"
    assert said in output.read_text()

    # 2. SIGTERM to the launcher; the stop file is still there
    process = start(*arguments, output=output)
    wait_until(lambda: bool(steps(run / "r1-zero")), process, "a step of r1-zero")
    process.terminate()
    assert process.wait(60) == 128 + signal.SIGTERM
    orphans_gone(process.pid)
    printed = output.read_text()
    assert f"removed {run / 'stop'}" in printed
    assert not (run / "stop").exists()
    done = steps(run / "r1-zero")[-1]
    assert done < GRPO_STEPS
    assert checkpoints(run, "r1-zero")[-1] == f"step-{done:08d}"
    assert "SIGTERM: asking 1 rank(s) to save and end" in printed

    # 3. the command that the message names
    again = shlex.split(printed.rpartition("to go on from the last checkpoint: ")[2].splitlines()[0])
    assert again[0] == "megatron-r1"
    last = finish(*again[1:])
    assert last.returncode == 0, last.stderr
    assert differences(reference.folder, run) == []


def test_a_step_that_is_not_finite_ends_the_run(reference: Finished, tmp_path: Path) -> None:
    run = tmp_path / "spoiled"
    for name in ("pretrain", "eval-base"):
        shutil.copytree(reference.folder / name, run / name)
    states = json.loads((reference.folder / "stages.json").read_text())
    (run / "stages.json").write_text(json.dumps({"stages": states["stages"][:2]}))
    before = digests(run / "pretrain" / "checkpoints")

    spoiled = finish("run", reference.recipe, "--run-dir", run, *SPOIL)
    assert spoiled.returncode == 1
    assert "Traceback" not in spoiled.stderr
    assert "stage r1-zero, step 2: the loss or the gradient norm is not finite" in spoiled.stderr
    dump = run / "r1-zero" / "nonfinite-step-000002.json"
    assert str(dump) in spoiled.stderr
    batch = json.loads(dump.read_text(), parse_constant=pytest.fail)
    assert not all(isinstance(value, float) for value in (*batch["sums"].values(), batch["grad_norm"]))
    assert len(batch["samples"]) == 8  # 4 prompts x 4 completions in 2 minibatches
    assert all(sample["text"] for sample in batch["samples"])
    assert checkpoints(run, "r1-zero") == []
    assert steps(run / "r1-zero") == [1]
    assert json.loads((run / "stages.json").read_text())["stages"][2]["state"] == "failed"

    assert digests(run / "pretrain" / "checkpoints") == before
    mended = finish("run", reference.recipe, "--run-dir", run)
    assert mended.returncode == 0, mended.stderr
    assert differences(reference.folder, run) == []


# Steps so large that the second one overflows.
SPOIL = ("stage.r1-zero.optimizer.lr=1e30", "stage.r1-zero.optimizer.warmup_steps=0")


def digests(folder: Path) -> dict[str, str]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
