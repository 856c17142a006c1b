"""`last_steps` of prompts and rewards: which steps of a `grpo` stage they take part in, and values that say nothing.

Every rollout phase decides at its beginning: it serves `minibatches` x `epochs` optimizer steps, so `last_steps` rounds
down to whole phases. DeepSeek-R1 (arXiv 2501.12948, v2 section 3.2.2): 400 of 1,700 steps; with 16 steps a phase these
are the 388 from the phase of step 1,312 on.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_r1.config.data import PromptsConfig
from megatron_r1.config.rewards import RewardConfig


def first_step(steps: int, last_steps: int, phase: int) -> int:
    """Steps done when the first phase begins that is within the last `last_steps` of `steps`; `steps` or more: none is.

    phase: optimizer steps that a rollout phase serves.
    """
    return -(-max(0, steps - last_steps) // phase) * phase


def check_schedule(steps: int, phase: int, prompts: Sequence[PromptsConfig], rewards: Sequence[RewardConfig]) -> None:
    """Raise ValueError for a `last_steps` in which no phase begins, and for steps in which no source is asked."""
    given = [(_source_key(prompts, i), source.last_steps) for i, source in enumerate(prompts)]
    given += [(f"reward {reward.label!r}", reward.last_steps) for reward in rewards]
    for key, last_steps in given:
        if last_steps is not None and first_step(steps, last_steps, phase) >= steps:
            last = (steps - 1) // phase * phase
            raise ValueError(
                f"{key}: last_steps = {last_steps} has no effect: a rollout phase serves minibatches x epochs = "
                f"{phase} steps, and none begins in the last {last_steps} of {steps}; the last one begins after "
                f"{last}, so use last_steps >= {steps - last}, or smaller phases"
            )
    if all(source.last_steps is not None and source.last_steps < steps for source in prompts):
        longest = max(source.last_steps or 0 for source in prompts)
        raise ValueError(
            f"prompts: every source has last_steps, the longest {longest} of steps = {steps}, so nothing is asked "
            "before; leave last_steps out of the sources that are asked from the start on"
        )


def check_always(prompts: Sequence[PromptsConfig], kind: str) -> None:
    """Raise ValueError for `last_steps` in a stage whose prompts are always asked."""
    for i, source in enumerate(prompts):
        if source.last_steps is not None:
            raise ValueError(
                f"{_source_key(prompts, i)}: last_steps = {source.last_steps} is for grpo stages; {kind} asks its "
                "prompts from the start on: remove it"
            )


def _source_key(prompts: Sequence[PromptsConfig], number: int) -> str:
    return f"prompts.{number}" if len(prompts) > 1 else "prompts"
