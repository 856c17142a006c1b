"""The reward models of a `grpo` stage: what they say of a phase's completions, in this process or through a server.

Between rollout and the mixer (`rewards/mixer.py`): `RewardModels.value` fills in `Completion.values`, and only for the
models that count in this phase and the prompts of their domains. DeepSeek-R1 (arXiv 2501.12948, v2 section 3.2.2): the
helpful model is given the final summary alone, the safety model the whole response. Neither was trained on answers
without an end or without a text; what they would say of one is noise, so it gets the lowest value of the phase.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from functools import partial, reduce
from pathlib import Path
from typing import NamedTuple, Protocol

from megatron_r1.config.errors import RunFailed, UserError
from megatron_r1.config.rewards import RewardConfig
from megatron_r1.config.run import RunConfig
from megatron_r1.config.stages import GrpoStage, RewardModelStage
from megatron_r1.parallel.world import World
from megatron_r1.rewards.extract import summary_of
from megatron_r1.rewards.reward_client import Item, RewardClient
from megatron_r1.train.context import RunContext
from megatron_r1.train.reward_scoring import RewardScorer
from megatron_r1.types import Group, Sample

SERVERS = "reward-servers.jsonl"
"""File of a stage's folder: which checkpoint of which server has answered, from when on."""


class _Source(Protocol):
    """Where values come from; every call is collective."""

    def values(self, items: Sequence[Item]) -> tuple[list[float], int]:
        """Values of this replica's items, and how many of these were cut."""
        ...


class _Here:
    """In this process: all ranks score the items of all replicas together."""

    def __init__(self, scorer: RewardScorer, world: World) -> None:
        self.scorer, self.world = scorer, world

    def values(self, items: Sequence[Item]) -> tuple[list[float], int]:
        shares = self.world.all_gather_replicas(self._sequences(items))
        for share in shares:
            if isinstance(share, str):
                raise UserError(share)
        values = self.scorer.values([sample for share in shares for sample, _ in share])
        first = sum(len(share) for share in shares[: self.world.replica_rank])
        return values[first : first + len(items)], sum(cut for _, cut in shares[self.world.replica_rank])

    def _sequences(self, items: Sequence[Item]) -> list[tuple[Sample, bool]] | str:
        """What the model reads; or what is wrong with an item, for all ranks, which would wait for this one else."""
        try:
            return [self.scorer.sequence(*item) for item in items]
        except UserError as error:
            return str(error)


class _Server:
    """One rank of a replica asks for its items and tells the others; all end alike when a server stays away."""

    def __init__(self, client: RewardClient, world: World) -> None:
        self.client, self.world = client, world

    def values(self, items: Sequence[Item]) -> tuple[list[float], int]:
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
        values, cut = shares[self.world.replica_rank]
        return values, cut


class _Seen(NamedTuple):
    """What a model was asked in a phase."""

    scored: int = 0
    cut: int = 0  # of these
    unfinished: int = 0  # or empty: not scored
    lowest: float = math.inf  # value of those scored

    def joined(self, other: _Seen) -> _Seen:
        """Both together."""
        return _Seen(
            self.scored + other.scored,
            self.cut + other.cut,
            self.unfinished + other.unfinished,
            min(self.lowest, other.lowest),
        )


class RewardModels:
    """The terms of kind "model" of a stage, each with its source."""

    def __init__(self, rewards: Sequence[tuple[RewardConfig, _Source]], steps: int, world: World) -> None:
        """rewards: each with `sees` filled in; steps: optimizer steps of the whole stage."""
        self._rewards, self._steps, self._world = list(rewards), steps, world
        self._seen: dict[str, _Seen] = {}  # label -> of the phase, i.e. since the last `metrics`

    @classmethod
    def of(cls, stage: GrpoStage, context: RunContext) -> RewardModels | None:
        """Load the stage's reward models; None where it has none. Collective. Raises UserError for wrong weights."""
        rewards = [reward for reward in stage.reward if reward.kind == "model"]
        if not rewards:
            return None
        read = [reward.model_copy(update={"sees": context.config.sees(reward)}) for reward in rewards]
        return cls([(reward, _source(reward, stage, context)) for reward in read], stage.steps, context.world)

    def value(self, groups: Sequence[Group], step: int) -> None:
        """Fill in the `values` of this replica's completions, for the phase that begins after `step` optimizer steps.

        An answer that was cut off, or of which the model would see nothing, is not scored: it gets the lowest value
        that the phase's other answers got of that model so far, on whichever rank; 0 where there is none.

        Collective: every rank passes its replica's groups. Raises RunFailed when a server stays away, and UserError for
        an answer that the tokenizer cannot encode.
        """
        for reward, source in self._rewards:
            if not reward.active(step, self._steps):
                continue
            covered = [group for group in groups if reward.covers(group.prompt.domain)]
            part = summary_of if reward.sees == "summary" else str
            answers = [(c, Item(group.prompt.question, part(c.text))) for group in covered for c in group.completions]
            whole = [(c, item) for c, item in answers if c.finish_reason == "stop" and item.response.strip()]
            values, cut = source.values([item for _, item in whole])
            for (completion, _), value in zip(whole, values, strict=True):
                completion.values[reward.label] = value
            mine = _Seen(len(whole), cut, len(answers) - len(whole), min(values, default=math.inf))
            before = self._seen.get(reward.label, _Seen())
            seen = reduce(_Seen.joined, self._world.all_gather_replicas(mine), before)
            self._seen[reward.label] = seen
            for completion, _ in answers:
                completion.values.setdefault(reward.label, seen.lowest if seen.scored else 0.0)

    def metrics(self) -> dict[str, float]:
        """Of each model that was asked since the last call: share of the scored completions that were cut, and share of
        all that were not scored. Equal on all ranks; ends the phase.
        """
        found = {f"reward/model_cut/{name}": seen.cut / seen.scored for name, seen in self._seen.items() if seen.scored}
        for name, seen in self._seen.items():
            if everything := seen.scored + seen.unfinished:
                found[f"reward/model_unfinished/{name}"] = seen.unfinished / everything
        self._seen = {}
        return found


def template_of(reward: RewardConfig, config: RunConfig) -> str:
    """The template that a reward model was trained under: its stage's, else as the reward says."""
    for stage in config.stage:
        if stage.name == reward.init_from and isinstance(stage, RewardModelStage):
            return stage.template
    return reward.template or "plain"


def _note(path: Path, reward: RewardConfig, checkpoint: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    seen = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    with path.open("a", encoding="utf-8") as file:
        print(json.dumps({"name": reward.label, "url": reward.url, "checkpoint": checkpoint, "seen": seen}), file=file)


def _source(reward: RewardConfig, stage: GrpoStage, context: RunContext) -> _Source:
    if reward.url is not None:
        client = RewardClient(reward.label, reward.url, reward.timeout)
        if context.world.rank == 0:
            client.note = partial(_note, context.run.stage(stage.name).path / SERVERS, reward)
            client.look()
        return _Server(client, context.world)
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
