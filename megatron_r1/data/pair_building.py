"""Which sampled answers can be compared, which comparisons make preference pairs, and the balance of their lengths.

DeepSeek-R1 (arXiv 2501.12948 v2), section 3.1.2: of two answers a judge prefers one clearly, or the pair is left out;
chosen and rejected answers are about as long, so that the reward model cannot learn length. Pure functions, in the flow
of a `preferences` stage (`pipeline/making/preferences.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_r1.data.generators import keyed_random

Reason = Literal["truncated", "empty", "not written", "duplicate", "unreadable", "undecided", "length balance"]
"""Why an answer or a pair is dropped, in the order in which it is looked at; it counts under the first:

- truncated: it did not end by itself; empty: it says nothing after its thought, or at all;
- not written: the tokenizer cannot write its text, which a reward model would have to read;
- duplicate: both answers of a pair are the same; of labelled answers, an earlier one to the same prompt is;
- unreadable: the judge could not be understood; undecided: its mean verdict is within the margin;
- length balance: see `balance_lengths`.
"""

TOLERANCE = 0.01
"""Largest difference of the mean lengths of chosen and rejected answers, as a share of the mean length of both."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A sampled answer as a judge and a reward model get to see it."""

    sample: int  # which of its prompt's samples
    text: str
    tokens: int  # of the text; -1 where the tokenizer cannot write it
    finished: bool  # ended by itself


def fault(answer: Answer) -> Reason | None:
    """Why nobody can be asked about this answer; None: it is good enough to be judged."""
    if not answer.finished:
        return "truncated"
    if not answer.text.strip():
        return "empty"
    return "not written" if answer.tokens < 0 else None


def pair_fault(first: Answer, second: Answer) -> Reason | None:
    """The same of a pair: the first answer's, else the second's reason."""
    found = fault(first) or fault(second)
    return "duplicate" if found is None and first.text == second.text else found


def preferred(mean: float | None, margin: float) -> Reason | Literal["first", "second"]:
    """Which answer of a pair is preferred, from the mean verdict (above 0: the first), or why neither is.

    Exactly the margin is undecided, as in the paper, where the difference must be larger than 1.
    """
    if mean is None:
        return "unreadable"
    if abs(mean) <= margin:
        return "undecided"
    return "first" if mean > 0 else "second"


def balance_lengths(lengths: Sequence[tuple[int, int]], seed: int) -> list[int]:
    """The pairs that stay, in order, so that chosen and rejected answers are about as long on average.

    Let D be the sum of (chosen - rejected) lengths over the pairs that are left. The pairs are visited once, in a
    random order drawn by the seed. A pair is left out when its own difference has the sign of D and is not larger than
    D, so that D comes nearer to 0 and never changes sign. That ends as soon as the mean lengths differ by at most
    TOLERANCE of the mean length of all answers left. What remains of D is else less than the difference of any one pair
    on the longer side. Where every chosen answer is longer, or every rejected one, only pairs of equal lengths stay.

    Args:
        lengths: (chosen, rejected) of each pair, e.g. in tokens.
    """
    order = list(range(len(lengths)))
    keyed_random("balance", seed).shuffle(order)
    chosen, rejected = (sum(pair[side] for pair in lengths) for side in (0, 1))
    gone = set()
    for index in order:
        difference = chosen - rejected
        # |D| / pairs <= TOLERANCE x (chosen + rejected) / (2 pairs)
        if abs(difference) <= TOLERANCE * (chosen + rejected) / 2:
            break
        own = lengths[index][0] - lengths[index][1]
        if own * difference > 0 and abs(own) <= abs(difference):
            chosen, rejected = chosen - lengths[index][0], rejected - lengths[index][1]
            gone.add(index)
    return [index for index in range(len(lengths)) if index not in gone]
