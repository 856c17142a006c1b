"""Verdicts of correctness where no rule can tell: a judge compares an answer with the reference.

DeepSeek-R1 (arXiv 2501.12948 v2), appendix B.3.3 and Listing 4: the judge model is given question, reference and answer
and replies as JSON. In the flow of a `sample` stage, between sampling and its filters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from megatron_r1.judges.hook import Hook, read_json
from megatron_r1.types import VerdictStatus


class Claim(NamedTuple):
    """An answer to a question whose right answer is known."""

    question: str
    reference: str
    answer: str


def judge_correctness(hook: Hook, claims: Sequence[Claim]) -> list[VerdictStatus]:
    """A verdict for each claim; `unknown` where the judge could not be understood, never `wrong`.

    Equal claims are asked once. Raises JudgeDown (see `judges/endpoint.py`), or UserError where a function fails.
    """
    distinct = list(dict.fromkeys(claims))
    answers = hook.ask([claim._asdict() for claim in distinct], read_verdict, _accept)
    statuses: dict[bool | None, VerdictStatus] = {True: "correct", False: "wrong", None: "unknown"}
    found = {claim: statuses[answer] for claim, answer in zip(distinct, answers, strict=True)}
    return [found[claim] for claim in claims]


def read_verdict(reply: str) -> bool | None:
    """Whether a reply says correct; None if it says neither correct nor incorrect."""
    return {"correct": True, "incorrect": False}.get(read_json(reply, "correctness") or "")


def _accept(result: Any) -> bool | None:
    if result is not None and not isinstance(result, bool):
        raise ValueError(f"it returned {result!r}; correctness is True, False, or None for unknown")
    return result
