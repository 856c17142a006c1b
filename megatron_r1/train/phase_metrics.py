"""What a rollout phase's scored groups say in numbers: rewards, lengths, verdicts, values of reward models.

Called by `train/phase.py` once a phase, dropped groups included. A term of the reward is measured on the prompts that
it covers only, so that general prompts do not dilute the accuracy of the rule-judged ones.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from megatron_r1.algorithms.filters import signal
from megatron_r1.algorithms.pass_at_k import majority_vote
from megatron_r1.config.rewards import RewardConfig
from megatron_r1.rewards.language import language_metrics
from megatron_r1.rewards.mixer import NOT_JUDGED
from megatron_r1.types import Completion, Group


def group_metrics(groups: list[Group], rewards: Sequence[RewardConfig] = ()) -> dict[str, float]:
    """Means over all completions of a phase that a metric is about; every completion must have been scored.

    rewards: the terms of the reward, for the domains that they cover.
    """
    completions = [c for group in groups for c in group.completions]
    lengths = [len(c.token_ids) for c in completions]
    scores = [c.score for c in completions if c.score is not None]
    metrics = {
        "reward/mean": _mean([score.total for score in scores]),
        "reward/std": _mean([statistics.pstdev(group.rewards) for group in groups]),
        "rollout/length": _mean(lengths),
        "rollout/length_max": float(max(lengths)),
        "rollout/truncated": _mean([c.finish_reason == "length" for c in completions]),
        "rollout/completions": float(len(completions)),
        "rollout/tokens": float(sum(lengths)),
        "groups/no_signal": _mean([not signal(group).keep for group in groups]),
        **_accuracy(groups),
        **language_metrics(_covered(groups, rewards, "language"), "reward/language"),
        **_values(completions),
        **_domains(groups),
    }
    covered = _scores(_covered(groups, rewards, "format"))
    formats = [score.in_format for score in covered if score.in_format is not None]
    if formats:
        metrics["reward/format"] = _mean(formats)
    if scores and "overlong" in scores[0].parts:
        metrics["reward/overlong"] = _mean([score.parts["overlong"] for score in scores])
    return metrics


def _accuracy(groups: list[Group]) -> dict[str, float]:
    """What the verifiers found, over the groups that were judged; nothing where none was."""
    judged = [group for group in groups if any(score.verdict.detail != NOT_JUDGED for score in _scores([group]))]
    if not judged:
        return {}
    completions = [c for group in judged for c in group.completions]
    lengths, statuses = [len(c.token_ids) for c in completions], [_status(c) for c in completions]
    metrics = {
        "reward/accuracy": _mean([status == "correct" for status in statuses]),
        "reward/majority": _mean([_majority_is_right(group) for group in judged]),
        "verdict/unknown": _mean([status == "unknown" for status in statuses]),
        "groups/all_correct": _mean([all(_status(c) == "correct" for c in group.completions) for group in judged]),
        "groups/all_wrong": _mean([all(_status(c) != "correct" for c in group.completions) for group in judged]),
    }
    for name, wanted in (("rollout/length_correct", True), ("rollout/length_wrong", False)):
        part = [n for n, status in zip(lengths, statuses, strict=True) if (status == "correct") is wanted]
        if part:
            metrics[name] = _mean(part)
    return metrics


def _values(completions: Sequence[Completion]) -> dict[str, float]:
    """Mean and standard deviation of each reward model's values, over the completions that it scored."""
    metrics: dict[str, float] = {}
    for name in sorted({name for c in completions for name in c.values}):
        values = [c.values[name] for c in completions if name in c.values]
        metrics[f"reward/model/{name}"] = _mean(values)
        metrics[f"reward/model_std/{name}"] = statistics.pstdev(values)
    return metrics


def _domains(groups: list[Group]) -> dict[str, float]:
    """Prompts and mean reward of each domain, in a phase that has several."""
    counts = Counter(group.prompt.domain for group in groups)
    if len(counts) < 2:
        return {}
    metrics: dict[str, float] = {}
    for domain in sorted(counts):
        metrics[f"groups/prompts/{domain}"] = float(counts[domain])
        totals = [score.total for score in _scores([group for group in groups if group.prompt.domain == domain])]
        metrics[f"reward/mean/{domain}"] = _mean(totals)
    return metrics


def _covered(groups: list[Group], rewards: Sequence[RewardConfig], kind: str) -> list[Group]:
    """The groups whose prompts the term of this kind covers; all where there is no such term."""
    term = next((reward for reward in rewards if reward.kind == kind), None)
    return groups if term is None else [group for group in groups if term.covers(group.prompt.domain)]


def _scores(groups: Sequence[Group]) -> Iterator[Any]:
    return (c.score for group in groups for c in group.completions if c.score is not None)


def _status(completion: Completion) -> str | None:
    return None if completion.score is None else completion.score.verdict.status


def _majority_is_right(group: Group) -> bool:
    verdicts = [score.verdict for score in _scores([group])]
    winner = majority_vote([verdict.extracted for verdict in verdicts])
    return winner is not None and any(
        verdict.extracted == winner and verdict.status == "correct" for verdict in verdicts
    )


def _mean(values: list[Any]) -> float:
    return float(sum(values)) / len(values) if values else 0.0
