"""The reward models of a `grpo` stage: what they say of a phase's completions, in this process or through a server.

Between rollout and the mixer (`rewards/mixer.py`): `RewardModels.value` fills in `Completion.values`, and only for the
models that count in this phase and the prompts of their domains. DeepSeek-R1 (arXiv 2501.12948, v2 section 3.2.2): the
helpful model is given the final summary alone, the safety model the whole response.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from megatron_r1.config.errors import RunFailed
from megatron_r1.config.rewards import RewardConfig
from megatron_r1.config.run import RunConfig
from megatron_r1.config.stages import GrpoStage, RewardModelStage
from megatron_r1.parallel.world import World
from megatron_r1.rewards.extract import summary_of
from megatron_r1.rewards.reward_client import Item, RewardClient
from megatron_r1.train.context import RunContext
from megatron_r1.train.reward_scoring import RewardScorer
from megatron_r1.types import Group


class _Source(Protocol):
    """Where values come from; every call is collective."""

    def values(self, items: Sequence[Item]) -> tuple[list[float], int, int]:
        """Values of this replica's items; of all replicas' items the number that was cut, and the number."""
        ...


class _Here:
    """In this process: all ranks score the items of all replicas together."""

    def __init__(self, scorer: RewardScorer, world: World) -> None:
        self.scorer, self.world = scorer, world

    def values(self, items: Sequence[Item]) -> tuple[list[float], int, int]:
        shares = self.world.all_gather_replicas([self.scorer.sequence(*item) for item in items])
        everyone = [entry for share in shares for entry in share]
        values = self.scorer.values([sample for sample, _ in everyone])
        first = sum(len(share) for share in shares[: self.world.replica_rank])
        return values[first : first + len(items)], sum(cut for _, cut in everyone), len(everyone)


class _Server:
    """One rank of a replica asks for its items and tells the others; all end alike when a server stays away."""

    def __init__(self, client: RewardClient, world: World) -> None:
        self.client, self.world = client, world

    def values(self, items: Sequence[Item]) -> tuple[list[float], int, int]:
        found: tuple[list[float], int] | str = ([], 0)
        if self.world.is_leader:
            try:
                found = self.client.score(items)
            except RunFailed as error:
                found = str(error)
        shares = self.world.all_gather_replicas(self.world.broadcast_in_replica(found))
        for share in shares:
            if isinstance(share, str):
                raise RunFailed(share)
        mine: list[float] = shares[self.world.replica_rank][0]
        return mine, sum(cut for _, cut in shares), sum(len(values) for values, _ in shares)


class RewardModels:
    """The terms of kind "model" of a stage, each with its source."""

    def __init__(self, rewards: Sequence[tuple[RewardConfig, _Source]], steps: int) -> None:
        """steps: optimizer steps of the whole stage."""
        self._rewards, self._steps = list(rewards), steps
        self._counts: dict[str, tuple[int, int]] = {}  # label -> (cut, scored) since the last `metrics`

    @classmethod
    def of(cls, stage: GrpoStage, context: RunContext) -> RewardModels | None:
        """Load the stage's reward models; None where it has none. Collective. Raises UserError for wrong weights."""
        rewards = [reward for reward in stage.reward if reward.kind == "model"]
        return cls([(reward, _source(reward, stage, context)) for reward in rewards], stage.steps) if rewards else None

    def value(self, groups: Sequence[Group], step: int) -> None:
        """Fill in the `values` of this replica's completions, for the phase that begins after `step` optimizer steps.

        Collective: every rank passes its replica's groups. Raises RunFailed when a server stays away.
        """
        for reward, source in self._rewards:
            if not reward.active(step, self._steps):
                continue
            covered = [group for group in groups if reward.covers(group.prompt.domain)]
            completions = [(group.prompt.question, c) for group in covered for c in group.completions]
            seen = summary_of if reward.sees == "summary" else str
            values, cut, scored = source.values([Item(question, seen(c.text)) for question, c in completions])
            for (_, completion), value in zip(completions, values, strict=True):
                completion.values[reward.label] = value
            before = self._counts.get(reward.label, (0, 0))
            self._counts[reward.label] = (before[0] + cut, before[1] + scored)

    def metrics(self) -> dict[str, float]:
        """Share of the completions that were cut, of each model that scored since the last call; equal on all ranks."""
        found = {f"reward/model_cut/{name}": cut / scored for name, (cut, scored) in self._counts.items() if scored}
        self._counts = {}
        return found


def template_of(reward: RewardConfig, config: RunConfig) -> str:
    """The template that a reward model was trained under: its stage's, else as the reward says."""
    for stage in config.stage:
        if stage.name == reward.init_from and isinstance(stage, RewardModelStage):
            return stage.template
    return reward.template or "plain"


def _source(reward: RewardConfig, stage: GrpoStage, context: RunContext) -> _Source:
    if reward.url is not None:
        return _Server(RewardClient(reward.label, reward.url, reward.timeout), context.world)
    assert reward.init_from is not None, "a reward model has `from` or `url`"
    model, arch = context.model_named(reward.model)
    scorer = RewardScorer.load(
        context.checkpoint(reward.init_from),
        model,
        arch,
        context.world,
        context.tokenizer,
        template=template_of(reward, context.config),
        micro_batch_tokens=stage.micro_batch_tokens,
        packed=stage.packing,
        parked=True,  # sampling and training have the device to themselves
    )
    return _Here(scorer, context.world)
