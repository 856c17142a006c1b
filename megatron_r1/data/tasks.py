"""What a procedural task is, and how its options are read; the tasks are in `data/generators.py` and `requests.py`."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from megatron_r1.config.errors import UserError
from megatron_r1.data.wording import Languages


class Problem(NamedTuple):
    """A question with its answer; `metadata` holds what it was made from."""

    question: str
    answer: str
    metadata: dict[str, Any]


class Task(Protocol):
    """What a procedural task must do."""

    name: str  # its key in TASKS
    verifier: str  # of its answers
    languages: Languages | None  # of its questions and their working; None: without words

    def draw(self, rng: random.Random) -> Problem:
        """A problem made from these random numbers."""
        ...

    def work(self, problem: Problem, rng: random.Random, error_rate: float, backwards: bool) -> tuple[str, str]:
        """(steps, the answer they end in).

        A step goes wrong with chance `error_rate`, and what follows builds on it. `backwards`
        works through the parts in the opposite order, as a re-check does.
        """
        ...

    def near_miss(self, problem: Problem, rng: random.Random) -> str:
        """A wrong answer of the kind a guess gives."""
        ...


def check_options(task: str, options: Mapping[str, Any], allowed: tuple[str, ...]) -> None:
    """Raise UserError for an option that the task does not have."""
    unknown = [key for key in options if key not in allowed]
    if unknown:
        raise UserError(f"task {task}: unknown option {', '.join(unknown)}; allowed are {', '.join(allowed)}")


def integer_range(task: str, options: Mapping[str, Any], key: str, default: int, least: int) -> tuple[int, int]:
    """(lowest, highest) of an option given as n or [low, high]; UserError for anything else."""
    given = options.get(key, default)
    pair = list(given) if isinstance(given, list | tuple) else [given, given]
    if len(pair) != 2 or any(type(value) is not int for value in pair) or not least <= pair[0] <= pair[1]:
        raise UserError(
            f"task {task}: {key} = {given!r}; allowed are an integer from {least} on or [lowest, highest] of such"
        )
    return pair[0], pair[1]


def chance(task: str, options: Mapping[str, Any], key: str, default: float) -> float:
    """A probability from 0 to 1; UserError for anything else."""
    given = options.get(key, default)
    if type(given) not in (int, float) or not 0 <= given <= 1:
        raise UserError(f"task {task}: {key} = {given!r}; allowed is a number from 0 to 1")
    return float(given)
