"""One rollout phase of GRPO: sample, score, filter, advantages, old and reference log-probs.

Its result is the same on every rank: replicas sample their share of the prompts and exchange the scored groups.
"""

from __future__ import annotations

import dataclasses
import logging
import random
import statistics
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch

from megatron_r1.algorithms.advantage import group_advantages
from megatron_r1.algorithms.filters import filter_no_signal, signal
from megatron_r1.algorithms.pass_at_k import majority_vote
from megatron_r1.algorithms.shaping import overlong_penalty
from megatron_r1.config.errors import RunFailed
from megatron_r1.config.grpo import AdvantageConfig
from megatron_r1.config.run import GrpoStage
from megatron_r1.data.cursor import PromptCursor
from megatron_r1.parallel.world import World
from megatron_r1.rewards.language import language_metrics
from megatron_r1.rewards.mixer import Scorer
from megatron_r1.rollout.engine import Progress, RolloutEngine
from megatron_r1.types import Group, Prompt, Sample

logger = logging.getLogger(__name__)

_MOST_ROUNDS = 64  # rollout rounds of one phase


class NoSignal(RunFailed):
    """No group of a phase gives a gradient."""


@dataclass(slots=True)
class Phase:
    """A rollout phase being trained on. `taken` minibatches of `order` are done."""

    samples: list[Sample]
    order: list[list[int]]  # indices into samples, one list an optimizer step
    taken: int
    metrics: dict[str, float]

    def minibatch(self) -> list[Sample]:
        """The samples of the next optimizer step."""
        return [self.samples[i] for i in self.order[self.taken]]

    @property
    def is_spent(self) -> bool:
        """Whether every minibatch has been trained on."""
        return self.taken >= len(self.order)

    def state(self) -> dict[str, Any]:
        """For a checkpoint in the middle of the phase."""
        samples = [dataclasses.asdict(sample) for sample in self.samples]
        for sample in samples:  # Megatron reads a checkpoint's plain objects without trust: no numpy among them
            if sample["routed_experts"] is not None:
                sample["routed_experts"] = torch.from_numpy(sample["routed_experts"])
        return {"samples": samples, "order": self.order, "taken": self.taken, "metrics": self.metrics}

    @classmethod
    def restore(cls, state: dict[str, Any]) -> Phase:
        """The phase as it was when `state` was taken."""
        samples = [Sample(**sample) for sample in state["samples"]]
        for sample in samples:
            if isinstance(sample.routed_experts, torch.Tensor):
                sample.routed_experts = sample.routed_experts.numpy()
        return cls(samples, state["order"], state["taken"], state["metrics"])


@dataclass(frozen=True, slots=True)
class Rollout:
    """What a phase sampled: every scored group, those that are trained on, and what it cost."""

    groups: list[Group]
    kept: list[Group]
    metrics: dict[str, float]


def sample_groups(
    stage: GrpoStage,
    cursor: PromptCursor,
    engine: RolloutEngine,
    scorer: Scorer,
    world: World,
    seed: int,
    progress: Progress | None,
) -> Rollout:
    """Sample and score one phase, the same on every rank and in prompt order. Collective.

    With dynamic sampling, groups without signal are replaced by those of further prompts, for at most
    max_resampling rounds. Where dropping leaves no group at all, further prompts are sampled in any case; raises
    NoSignal when that goes on.
    """
    grpo = stage.grpo
    groups: list[Group] = []
    kept: list[Group] = []
    spent = {"time/rollout": 0.0, "time/reward": 0.0}
    rounds = 0
    while not kept or (grpo.dynamic_sampling and len(kept) < grpo.prompts and rounds < grpo.max_resampling):
        prompts = distinct(cursor.take(grpo.prompts))
        found = _one_round(stage, prompts, engine, scorer, world, seed + rounds, progress, spent)
        groups += found
        kept += filter_no_signal(found, grpo.no_signal).kept
        rounds += 1
        if not kept and rounds == _MOST_ROUNDS:
            raise NoSignal(
                f"{len(groups)} groups in a row had rewards that were all equal, and "
                f'stage.{stage.name}.grpo.no_signal = "drop" leaves nothing to train on. Give easier or harder '
                'prompts, another reward, or no_signal = "keep"'
            )
    kept = kept[: grpo.prompts]
    # A checkpoint in the middle of the phase holds these metrics, so they must not differ between ranks.
    spent = {name: world.largest(seconds) for name, seconds in spent.items()}
    metrics = {**spent, **group_metrics(groups), "groups/dropped": float(len(groups) - len(kept))}
    metrics["groups/rounds"] = float(rounds)
    metrics["rollout/tokens_per_second"] = metrics["rollout/tokens"] / max(1e-9, spent["time/rollout"])
    return Rollout(groups, kept, metrics)


def phase_seed(seed: int, step: int) -> int:
    """Seed of the phase that begins after `step` optimizer steps of a run with this seed."""
    return (seed * 1_000_003 + step) * _MOST_ROUNDS


def distinct(prompts: list[Prompt]) -> list[Prompt]:
    """The prompts with repeats renamed "<id>#2", "<id>#3", ...

    A phase larger than its source draws a prompt more than once; under one id the repeats would be sampled with the
    same random numbers.
    """
    seen: Counter[str] = Counter()
    renamed = []
    for prompt in prompts:
        seen[prompt.id] += 1
        again = seen[prompt.id]
        renamed.append(prompt if again == 1 else dataclasses.replace(prompt, id=f"{prompt.id}#{again}"))
    return renamed


def _one_round(
    stage: GrpoStage,
    prompts: list[Prompt],
    engine: RolloutEngine,
    scorer: Scorer,
    world: World,
    seed: int,
    progress: Progress | None,
    spent: dict[str, float],
) -> list[Group]:
    mine = prompts[world.replica_rank :: world.replicas]
    began = time.monotonic()
    completions = engine.generate(mine, stage.grpo.group_size, stage.sampling, seed, progress)
    spent["time/rollout"] += time.monotonic() - began
    began = time.monotonic()
    groups = [Group(prompt=p, completions=c) for p, c in zip(mine, completions, strict=True)]
    if world.is_leader:
        stats = scorer.score_groups(groups)
        if stats.unknown:
            logger.warning("verdicts unknown, by reason: %s", stats.unknown)
        _shape_overlong(groups, stage)
    # One rank of a replica judges and tells the others: a verifier that misses its deadline on one rank only must
    # not give tensor-parallel ranks different advantages.
    shares = world.all_gather_replicas(world.broadcast_in_replica(groups))
    spent["time/reward"] += time.monotonic() - began
    return [shares[i % world.replicas][i // world.replicas] for i in range(len(prompts))]


def _shape_overlong(groups: list[Group], stage: GrpoStage) -> None:
    if stage.grpo.overlong is None:
        return
    for group in groups:
        for completion in group.completions:
            penalty = overlong_penalty(len(completion.token_ids), stage.grpo.overlong)
            if completion.score is not None:
                completion.score.parts["overlong"] = penalty
                completion.score.total += penalty


def advantages_of(group: Group, config: AdvantageConfig) -> list[float]:
    """[G] advantages of a group's completions."""
    return group_advantages(torch.tensor(group.rewards, dtype=torch.float64), config).tolist()


def group_samples(groups: list[Group], config: AdvantageConfig) -> list[Sample]:
    """One training sample a completion, with its advantage."""
    samples: list[Sample] = []
    for group in groups:
        for completion, advantage in zip(group.completions, advantages_of(group, config), strict=True):
            samples.append(
                Sample(
                    token_ids=[*group.prompt.token_ids, *completion.token_ids],
                    prompt_length=len(group.prompt.token_ids),
                    advantage=advantage,
                    rollout_log_probs=completion.log_probs,
                    routed_experts=completion.routed_experts,
                )
            )
    return samples


def minibatch_order(count: int, minibatches: int, epochs: int, seed: int) -> list[list[int]]:
    """Random minibatches, the same on every rank: `epochs` passes, each split in `minibatches` near-equal parts."""
    draw = random.Random(f"minibatches {seed}")
    order: list[list[int]] = []
    for _ in range(epochs):
        indices = list(range(count))
        draw.shuffle(indices)
        order += [part for i in range(minibatches) if (part := indices[i::minibatches])]
    return order


def group_metrics(groups: list[Group]) -> dict[str, float]:
    """Means over all completions of a phase, dropped groups included."""
    completions = [c for group in groups for c in group.completions]
    lengths = [len(c.token_ids) for c in completions]
    scores = [c.score for c in completions if c.score is not None]
    correct = [score.verdict.status == "correct" for score in scores]
    metrics = {
        "reward/mean": _mean([score.total for score in scores]),
        "reward/std": _mean([statistics.pstdev(group.rewards) for group in groups]),
        "reward/accuracy": _mean(correct),
        "reward/majority": _mean([_majority_is_right(group) for group in groups]),
        "rollout/length": _mean(lengths),
        "rollout/length_max": float(max(lengths)),
        "rollout/truncated": _mean([c.finish_reason == "length" for c in completions]),
        "rollout/completions": float(len(completions)),
        "rollout/tokens": float(sum(lengths)),
        "verdict/unknown": _mean([score.verdict.status == "unknown" for score in scores]),
        "groups/no_signal": _mean([not signal(group).keep for group in groups]),
        "groups/all_correct": _mean([all(_statuses(group, "correct")) for group in groups]),
        "groups/all_wrong": _mean([not any(_statuses(group, "correct")) for group in groups]),
        **language_metrics(groups, "reward/language"),
    }
    if scores and "format" in scores[0].parts:
        metrics["reward/format"] = _mean([score.parts["format"] != 0 for score in scores])
    if scores and "overlong" in scores[0].parts:
        metrics["reward/overlong"] = _mean([score.parts["overlong"] for score in scores])
    for name, wanted in (("rollout/length_correct", True), ("rollout/length_wrong", False)):
        part = [n for n, c in zip(lengths, correct, strict=True) if c is wanted]
        if part:
            metrics[name] = _mean(part)
    return metrics


def _statuses(group: Group, status: str) -> list[bool]:
    return [c.score is not None and c.score.verdict.status == status for c in group.completions]


def _majority_is_right(group: Group) -> bool:
    verdicts = [c.score.verdict for c in group.completions if c.score is not None]
    winner = majority_vote([verdict.extracted for verdict in verdicts])
    return winner is not None and any(
        verdict.extracted == winner and verdict.status == "correct" for verdict in verdicts
    )


def _mean(values: list[Any]) -> float:
    return float(sum(values)) / len(values) if values else 0.0
