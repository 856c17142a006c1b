"""A step of the reward model against plain autograd over one sequence at a time, and its metrics by hand."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_r1.config.model import ModelConfig
from megatron_r1.config.optim import OptimizerConfig
from megatron_r1.data.batching import make_micro_batches
from megatron_r1.model.presets import architecture
from megatron_r1.parallel.world import World
from megatron_r1.types import Sample

VOCAB, PAIRS = 96, 5


def samples() -> list[Sample]:
    draw = random.Random(4)
    lengths = [draw.randint(2, 20) for _ in range(2 * PAIRS)]
    return [Sample(token_ids=[draw.randrange(VOCAB) for _ in range(n)], prompt_length=1) for n in lengths]


TOKENS = sum(len(sample.token_ids) for sample in samples())


def make_trainer(world: World, preset: str) -> Any:
    from megatron_r1.train.trainer import Trainer

    model = ModelConfig(preset=preset)
    trainer = Trainer(
        architecture(model, VOCAB), model, world, OptimizerConfig(lr=1e-3, clip_grad=0), 10, scalar_head=True
    )
    trainer.models[0].scalar_head.weight.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(3))
    trainer.optimizer.reload_model_params()
    return trainer


@pytest.mark.parametrize(("preset", "packed"), [("tiny-dense", True), ("tiny-dense", False), ("tiny-moe", True)])
def test_a_step_is_the_mean_over_pairs(world: World, preset: str, packed: bool) -> None:
    """However the pairs share micro-batches, and however long they are."""
    from megatron_r1.model.scalar_head import ValueQuery
    from megatron_r1.train.reward_objective import RewardObjective

    trainer = make_trainer(world, preset)
    model = trainer.models[0]

    def value(sample: Sample) -> torch.Tensor:
        ids = torch.tensor([sample.token_ids])
        last = ValueQuery(torch.tensor([ids.shape[1] - 1]))
        return model(ids, torch.arange(ids.shape[1])[None], None, query=last)[0].double()

    values = torch.stack([value(sample) for sample in samples()]).view(PAIRS, 2)
    margins = values[:, 0] - values[:, 1]
    loss = -torch.nn.functional.logsigmoid(margins).mean()
    # Experts of an idle router have no gradient.
    gradients = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)
    norm = torch.cat([g.flatten() for g in gradients if g is not None]).double().norm()

    batches = make_micro_batches(samples(), 40, 0, packed=packed, together=2)[0]
    assert len(batches) > 2
    result = trainer.train_step(batches, RewardObjective(PAIRS, TOKENS, world))
    assert result.sums["loss"] / PAIRS == pytest.approx(loss.item(), rel=1e-5)
    assert result.sums["correct"] == (margins > 0).sum()
    assert result.sums["chosen"] == pytest.approx(values[:, 0].sum().item(), rel=1e-5, abs=1e-5)
    assert result.sums["rejected"] == pytest.approx(values[:, 1].sum().item(), rel=1e-5, abs=1e-5)
    assert result.grad_norm == pytest.approx(norm.item(), rel=1e-4)


def test_context_ranks_share_the_gradient_and_count_once(world: World) -> None:
    """Two ranks, of which the first holds the chosen answer's last token and the second the rejected one's."""
    from megatron_r1.train.reward_objective import RewardObjective

    batch = make_micro_batches(samples()[:2], 100, 0, packed=True, together=2)[0][0]
    full = torch.tensor([1.5, 2.5])
    grads, sums, tokens = [], [], 0
    for rank in range(2):
        # A world of two context ranks whose sum is known.
        here = _Context(rank, full)
        held = batch.last_N.clone()
        held[1 - rank] = -1
        output = full[rank : rank + 1].clone().requires_grad_()
        half = batch.valid_BT.clone()
        half[:, : half.shape[1] // 2] = rank == 0
        half[:, half.shape[1] // 2 :] = rank == 1
        part = replace(batch, last_N=held, valid_BT=half)
        total, count, found = RewardObjective(4, 80, here).loss(output, part)  # type: ignore[arg-type]
        total.backward()
        grads.append(output.grad.item())
        sums.append(found)
        tokens += int(count)
    slope = 1 / (1 + torch.tensor(-1.0).exp()).item()  # the margin is -1
    assert grads == pytest.approx([-slope * 80 / 4, slope * 80 / 4])
    assert tokens == int(batch.valid_BT.sum())
    assert sums[0]["loss"] == pytest.approx(1.3132617, rel=1e-6) and sums[1]["loss"] == 0
    assert [s["correct"] for s in sums] == [0, 0]


def test_a_tie_counts_half_and_a_filler_nothing(world: World) -> None:
    from megatron_r1.train.reward_objective import RewardObjective

    objective = RewardObjective(1, 10, world)
    shards = make_micro_batches(samples()[:2], 100, 0, packed=True, together=2, shards=2)
    (pair,), (filler,) = shards
    total, _, found = objective.loss(torch.tensor([0.7, 0.7], requires_grad=True), pair)
    assert found["correct"] == 0.5
    empty = torch.zeros(0, requires_grad=True)
    total, count, found = objective.loss(empty, filler)
    total.backward()
    assert (total.item(), int(count), [float(value) for value in found.values()]) == (0, 0, [0, 0, 0, 0])


class _Context:
    """The part of a World that an objective asks."""

    def __init__(self, rank: int, full: torch.Tensor) -> None:
        self.context_rank, self._full = rank, full

    def sum_over_context(self, mine: torch.Tensor) -> torch.Tensor:
        assert not mine.requires_grad
        assert mine[self.context_rank] == self._full[self.context_rank] and mine[1 - self.context_rank] == 0
        return self._full
