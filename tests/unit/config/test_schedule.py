"""`last_steps` that would have no effect, or leave steps without prompts, is refused."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from megatron_r1.config.schedule import first_step
from megatron_r1.config.stages import BenchmarkConfig, Stage

SUMS = {"source": "generator", "task": "chain_sum"}
REWARD = {"kind": "accuracy"}
SERVER = {"server": {"url": "http://x:1/v1", "model": "m"}}


def grpo(prompts: list[dict[str, Any]], reward: dict[str, Any], **keys: Any) -> Any:
    stage = {"kind": "grpo", "name": "rl", "steps": 100, "optimizer": {"lr": 1}, "grpo": {"minibatches": 16}}
    return TypeAdapter(Stage).validate_python({**stage, "prompts": prompts, "reward": [reward], **keys})


@pytest.mark.parametrize(
    ("steps", "last", "phase", "first"),
    [(1700, 400, 16, 1312), (1700, 404, 16, 1296), (1700, 3, 16, 1712), (60, 40, 1, 20), (8, 99, 4, 0), (9, 4, 16, 16)],
)
def test_a_phase_decides_at_its_beginning(steps: int, last: int, phase: int, first: int) -> None:
    """By hand, and against a walk over all phases."""
    assert first_step(steps, last, phase) == first
    begun = [step for step in range(0, steps, phase) if step >= steps - last]
    assert (begun[0] if begun else None) == (first if first < steps else None)


def test_last_steps_that_no_phase_begins_in() -> None:
    """Phases begin after 0, 16, ..., 96 of 100 steps."""
    grpo([SUMS, {**SUMS, "last_steps": 4}], REWARD)
    said = r"prompts\.1: last_steps = 3 has no effect.* none begins in the last 3 of 100.* last_steps >= 4"
    with pytest.raises(ValidationError, match=said):
        grpo([SUMS, {**SUMS, "last_steps": 3}], REWARD)
    with pytest.raises(ValidationError, match=r"reward 'accuracy': last_steps = 3 has no effect"):
        grpo([SUMS], {**REWARD, "last_steps": 3})
    with pytest.raises(ValidationError, match=r"minibatches x epochs = 64 steps, .* the last one begins after 128"):
        grpo([SUMS], {**REWARD, "last_steps": 3}, steps=132, grpo={"minibatches": 32, "epochs": 2})


def test_something_is_asked_in_every_step() -> None:
    late = {**SUMS, "last_steps": 50}
    with pytest.raises(ValidationError, match=r"every source has last_steps, the longest 60 of steps = 100"):
        grpo([late, {**SUMS, "last_steps": 60}], REWARD)
    grpo([late, {**SUMS, "last_steps": 100}], REWARD)


@pytest.mark.parametrize(
    "stage",
    [
        {"kind": "sample", "from": "x"},
        {"kind": "preferences", "from": "x", "judge": SERVER},
        {"kind": "distill", "teacher": "x", "steps": 9, "optimizer": {"lr": 1}},
        {"kind": "eval", "from": "x"},
    ],
)
def test_only_grpo_stages_have_last_steps(stage: dict[str, Any]) -> None:
    given = {"name": "x", **stage, "prompts": SUMS}
    TypeAdapter(Stage).validate_python(given)
    with pytest.raises(ValidationError, match=r"prompts: last_steps = 5 is for grpo stages"):
        TypeAdapter(Stage).validate_python({**given, "prompts": {**SUMS, "last_steps": 5}})


def test_nor_have_benchmarks() -> None:
    with pytest.raises(ValidationError, match="a benchmark asks its prompts from the start on"):
        BenchmarkConfig.model_validate({"name": "x", "prompts": {**SUMS, "last_steps": 5}})
