"""One rollout phase of GRPO: sample, score, filter, advantages, old and reference log-probs.

Its result is the same on every rank: replicas sample their share of the prompts and exchange the scored groups.
"""

from __future__ import annotations

import dataclasses
import logging
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from megatron_r1.algorithms.advantage import group_advantages
from megatron_r1.algorithms.filters import filter_no_signal
from megatron_r1.algorithms.shaping import overlong_penalty
from megatron_r1.config.errors import RunFailed
from megatron_r1.config.grpo import AdvantageConfig
from megatron_r1.config.optim import SamplingConfig
from megatron_r1.config.stages import GrpoStage
from megatron_r1.data.prompt_mix import PromptMix
from megatron_r1.parallel.world import World
from megatron_r1.rewards.mixer import NOT_JUDGED, Scorer
from megatron_r1.rollout.engine import Progress, RolloutEngine
from megatron_r1.train.phase_metrics import group_metrics
from megatron_r1.train.reward_models import RewardModels
from megatron_r1.types import Completion, Group, Prompt, Sample

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
    prompts: PromptMix,
    step: int,
    engine: RolloutEngine,
    scorer: Scorer,
    world: World,
    seed: int,
    progress: Progress | None,
    models: RewardModels | None = None,
) -> Rollout:
    """Sample and score the phase that begins after `step` optimizer steps, the same on every rank and in prompt order.
    Collective.

    With dynamic sampling, groups without signal are replaced by those of further prompts, for at most
    max_resampling rounds, until every source has given as many as its share. Where dropping leaves no group at all,
    further prompts are sampled in any case; raises NoSignal when that goes on. models: those of the stage's rewards,
    where it has any.
    """
    grpo, judge = stage.grpo, partial(_judge, stage, scorer, step)
    value = None if models is None else partial(models.value, step=step)
    groups: list[Group] = []
    kept: list[Group] = []
    spent = {"time/rollout": 0.0, "time/reward": 0.0}
    quotas: Counter[int] = Counter()  # of each source: prompts of the first round
    rounds = 0
    while not kept or (grpo.dynamic_sampling and rounds < grpo.max_resampling and not _sources(kept) >= quotas):
        asked = distinct(prompts.take(grpo.prompts, step, stage.steps))
        quotas = quotas or Counter(prompt.source for prompt in asked)
        found = sample_round(
            asked, grpo.group_size, stage.sampling, engine, world, seed + rounds, judge, progress, spent, value
        )
        groups += found
        kept += filter_no_signal(found, grpo.no_signal).kept
        rounds += 1
        if not kept and rounds == _MOST_ROUNDS:
            raise NoSignal(
                f"{len(groups)} groups in a row had rewards that were all equal, and "
                f'stage.{stage.name}.grpo.no_signal = "drop" leaves nothing to train on. Give easier or harder '
                'prompts, another reward, or no_signal = "keep"'
            )
    kept = within_quotas(kept, quotas)
    # A checkpoint in the middle of the phase holds these metrics, so they must not differ between ranks.
    spent = {name: world.largest(seconds) for name, seconds in spent.items()}
    metrics = {**spent, **group_metrics(groups, stage.reward), "groups/dropped": float(len(groups) - len(kept))}
    metrics["groups/rounds"] = float(rounds)
    metrics |= {} if models is None else models.metrics()
    metrics["rollout/tokens_per_second"] = metrics["rollout/tokens"] / max(1e-9, spent["time/rollout"])
    return Rollout(groups, kept, metrics)


def within_quotas(groups: list[Group], quotas: Counter[int]) -> list[Group]:
    """The first groups of each source, as many as its quota; where a source has too few, the first ones left of the
    others take the places. At most as many groups as the quotas add up to, in their order.
    """
    left = Counter(quotas)
    chosen = [False] * len(groups)
    for i, group in enumerate(groups):
        chosen[i] = left[group.prompt.source] > 0
        left[group.prompt.source] -= chosen[i]
    free = quotas.total() - sum(chosen)
    for i in [i for i, taken in enumerate(chosen) if not taken][:free]:
        chosen[i] = True
    return [group for group, taken in zip(groups, chosen, strict=True) if taken]


def _sources(groups: list[Group]) -> Counter[int]:
    return Counter(group.prompt.source for group in groups)


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


def sample_round(
    prompts: list[Prompt],
    n: int,
    sampling: SamplingConfig,
    engine: RolloutEngine,
    world: World,
    seed: int,
    judge: Callable[[list[Group]], None],
    progress: Progress | None,
    spent: dict[str, float],
    value: Callable[[list[Group]], None] | None = None,
) -> list[Group]:
    """Sample n completions of each prompt and judge them; the replicas share the prompts, and every rank gets all
    groups, in the order of the prompts. Collective.

    prompts: a multiple of the replicas. value: before that, fills in the values of reward models, on all ranks. judge:
    fills in the scores of a replica's groups, on one of its ranks. spent: the seconds of sampling and of both others
    are added to its "time/rollout" and "time/reward".
    """
    mine = prompts[world.replica_rank :: world.replicas]
    began = time.monotonic()
    completions = engine.generate(mine, n, sampling, seed, progress)
    spent["time/rollout"] += time.monotonic() - began
    began = time.monotonic()
    groups = [Group(prompt=p, completions=c) for p, c in zip(mine, completions, strict=True)]
    if value is not None:
        value(groups)
    if world.is_leader:
        judge(groups)
    # One rank of a replica judges and tells the others: a verifier that misses its deadline on one rank only must
    # not give tensor-parallel ranks different advantages.
    shares = world.all_gather_replicas(world.broadcast_in_replica(groups))
    spent["time/reward"] += time.monotonic() - began
    return [shares[i % world.replicas][i // world.replicas] for i in range(len(prompts))]


def _judge(stage: GrpoStage, scorer: Scorer, step: int, groups: list[Group]) -> None:
    stats = scorer.score_groups(groups, step, stage.steps)
    unknown = {reason: number for reason, number in stats.unknown.items() if reason != NOT_JUDGED}
    if unknown:
        logger.warning("verdicts unknown, by reason: %s", unknown)
    _shape_overlong(groups, stage)


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
            samples.append(to_sample(group.prompt, completion, advantage))
    return samples


def to_sample(prompt: Prompt, completion: Completion, advantage: float) -> Sample:
    """What is trained on of one completion."""
    return Sample(
        token_ids=[*prompt.token_ids, *completion.token_ids],
        prompt_length=len(prompt.token_ids),
        advantage=advantage,
        rollout_log_probs=completion.log_probs,
        routed_experts=completion.routed_experts,
    )


def minibatch_order(count: int, minibatches: int, epochs: int, seed: int) -> list[list[int]]:
    """Random minibatches, the same on every rank: `epochs` passes, each split in `minibatches` near-equal parts."""
    draw = random.Random(f"minibatches {seed}")
    order: list[list[int]] = []
    for _ in range(epochs):
        indices = list(range(count))
        draw.shuffle(indices)
        order += [part for i in range(minibatches) if (part := indices[i::minibatches])]
    return order
