"""Group filters: after the rewards, before the advantages. What is dropped is counted by reason.

Used for `[stage.grpo] no_signal` and, through it, for dynamic sampling (DAPO), which refills what
was dropped.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import torch

from megatron_r1.algorithms.advantage import has_signal
from megatron_r1.types import Group


@dataclass(frozen=True, slots=True)
class Decision:
    """What a predicate says of one group. Example: Decision(keep=False, reason="all_equal")."""

    keep: bool
    reason: str = ""  # empty exactly when the group is kept


@dataclass(frozen=True, slots=True)
class FilterResult:
    """What a filter left and why.

    Example: FilterResult(kept=[...], dropped={"all_equal_wrong": 3}, found={"all_equal_wrong": 3}).
    """

    kept: list[Group]  # in the order they came
    dropped: dict[str, int]  # number of groups removed, by reason
    found: dict[str, int]  # number of groups the predicates refused, by reason, removed or not


GroupPredicate = Callable[[Group], Decision]


def signal(group: Group) -> Decision:
    """Keep a group whose rewards differ; otherwise say which kind of equality it is.

    Reasons: "all_equal_correct" and "all_equal_wrong" where every verdict is that, "all_equal" for
    anything else (mixed or unknown verdicts under one reward). DAPO (arXiv 2503.14476) filters on
    the number of correct answers; this filters on the total reward, so a group that is all correct
    but differs in format or length has signal.

    Raises:
        ValueError: a completion has no score, or a reward is not finite.
    """
    if has_signal(torch.tensor(group.rewards, dtype=torch.float64)):
        return Decision(keep=True)
    statuses = {c.score.verdict.status for c in group.completions if c.score is not None}
    if statuses == {"correct"}:
        return Decision(keep=False, reason="all_equal_correct")
    if statuses == {"wrong"}:
        return Decision(keep=False, reason="all_equal_wrong")
    return Decision(keep=False, reason="all_equal")


def apply_filters(groups: Iterable[Group], predicates: Iterable[GroupPredicate]) -> FilterResult:
    """Drop every group that some predicate refuses, counted once, under the first that refused it.

    `found` equals `dropped` here.
    """
    rules = list(predicates)
    kept: list[Group] = []
    found: Counter[str] = Counter()
    for group in groups:
        refusal = next((d for rule in rules if not (d := rule(group)).keep), None)
        if refusal is None:
            kept.append(group)
        else:
            found[refusal.reason] += 1
    return FilterResult(kept=kept, dropped=dict(found), found=dict(found))


def filter_no_signal(groups: Iterable[Group], no_signal: Literal["keep", "drop"]) -> FilterResult:
    """Carry out the `no_signal` key: "drop" removes groups without signal, "keep" only counts them.

    `found` holds the counts either way; `dropped` is empty with "keep".
    """
    every = list(groups)
    result = apply_filters(every, [signal])
    if no_signal == "drop":
        return result
    return FilterResult(kept=every, dropped={}, found=result.found)
