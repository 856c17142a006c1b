"""Which of two answers is better, and whether an answer is safe: what reward models are trained on.

DeepSeek-R1 (arXiv 2501.12948 v2), section 3.1.2 and appendix B.2: a judge compares two answers by Arena-Hard's prompt,
four times with the answers in random order, and the verdicts are averaged. The paper gives the five verdicts no
numbers; here they are 3, 1, 0, -1, -3, Arena-Hard's own weights. In the flow of a `preferences` stage.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from megatron_r1.judges.hook import Hook, read_json

VERDICTS = {"A>>B": 3.0, "A>B": 1.0, "A=B": 0.0, "B>A": -1.0, "B>>A": -3.0}
LARGEST = 3.0

_VERDICT = re.compile(r"\[\[\s*([AB](?:>>|>|=)[AB])\s*\]\]")


class Pair(NamedTuple):
    """Two answers to one request; `id` is stable across runs and seeds the order that the judge sees them in."""

    id: str
    question: str
    answer_a: str
    answer_b: str


class Comparison(NamedTuple):
    """What the votes on a pair say."""

    mean: float | None  # of the readable votes, in [-3, 3], above 0: answer_a is better; None: none was readable
    votes: list[float]  # the readable ones, in the order asked, turned back
    unreadable: int


class Answered(NamedTuple):
    """A request and its answer."""

    question: str
    answer: str


def compare(hook: Hook, items: Sequence[Pair], votes: int, seed: int) -> list[Comparison]:
    """The mean of `votes` verdicts on each pair, each with the answers in an order drawn by (seed, id, vote).

    Raises JudgeDown (see `judges/endpoint.py`), or UserError where a function fails.
    """
    asked = [(pair, swapped(seed, pair.id, vote)) for pair in items for vote in range(votes)]
    fields = []
    for pair, turned in asked:
        first, second = (pair.answer_b, pair.answer_a) if turned else (pair.answer_a, pair.answer_b)
        fields.append({"question": pair.question, "answer_a": first, "answer_b": second})
    verdicts = hook.ask(fields, read_pair, _accept_pair)
    signed = [
        None if verdict is None else (0.0 - verdict if turned else verdict)
        for verdict, (_, turned) in zip(verdicts, asked, strict=True)
    ]
    return [_comparison(signed[i * votes : (i + 1) * votes]) for i in range(len(items))]


def swapped(seed: int, name: str, vote: int) -> bool:
    """Whether this vote sees the second answer first."""
    return bool(hashlib.blake2b(f"{seed}\0{name}\0{vote}".encode(), digest_size=1).digest()[0] & 1)


def _comparison(votes: Sequence[float | None]) -> Comparison:
    readable = [vote for vote in votes if vote is not None]
    mean = sum(readable) / len(readable) if readable else None
    return Comparison(mean, readable, len(votes) - len(readable))


def read_pair(reply: str) -> float | None:
    """The one verdict of a reply; None if it gives none, or two that differ."""
    found = set(_VERDICT.findall(reply))
    return VERDICTS.get(found.pop()) if len(found) == 1 else None


def _accept_pair(result: Any) -> float | None:
    if isinstance(result, bool) or not isinstance(result, int | float) or not math.fabs(result) <= LARGEST:
        raise ValueError(f"it returned {result!r}; a comparison is a number from -3 (the second is better) to 3")
    return float(result)


def label(hook: Hook, items: Sequence[Answered]) -> list[bool | None]:
    """Whether each answer is good (safe); None where the judge could not be understood.

    Raises JudgeDown (see `judges/endpoint.py`), or UserError where a function fails.
    """
    return hook.ask([item._asdict() for item in items], read_label, _accept_label)


def read_label(reply: str) -> bool | None:
    """Whether a reply says safe; None if it says neither safe nor unsafe."""
    return {"safe": True, "unsafe": False}.get(read_json(reply, "label") or "")


def _accept_label(result: Any) -> bool | None:
    if not isinstance(result, bool):
        raise ValueError(f"it returned {result!r}; a label is True (good, safe) or False")
    return result
