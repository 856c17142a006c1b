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


LABELS = [i % 3 == 0 for i in range(2 * PAIRS)]


@pytest.mark.parametrize(("preset", "packed"), [("tiny-dense", True), ("tiny-dense", False), ("tiny-moe", True)])
def test_a_pointwise_step_is_torchs_cross_entropy(world: World, preset: str, packed: bool) -> None:
    """Its value, its gradient and the metrics, however the answers share micro-batches."""
    from megatron_r1.model.scalar_head import ValueQuery
    from megatron_r1.train.reward_objective import PointwiseObjective

    trainer = make_trainer(world, preset)
    model = trainer.models[0]

    def value(sample: Sample) -> torch.Tensor:
        ids = torch.tensor([sample.token_ids])
        last = ValueQuery(torch.tensor([ids.shape[1] - 1]))
        return model(ids, torch.arange(ids.shape[1])[None], None, query=last)[0].double()

    values = torch.stack([value(sample) for sample in samples()])
    good = torch.tensor(LABELS)
    loss = torch.nn.functional.binary_cross_entropy_with_logits(values, good.double())
    gradients = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)
    norm = torch.cat([g.flatten() for g in gradients if g is not None]).double().norm()

    batches = make_micro_batches(samples(), 40, 0, packed=packed)[0]
    assert len(batches) > 2
    objective = PointwiseObjective(LABELS, TOKENS)
    result = trainer.train_step(batches, objective)
    assert result.grad_norm == pytest.approx(norm.item(), rel=1e-4)
    assert objective.metrics(result.sums) == {
        "loss/pointwise": pytest.approx(loss.item(), rel=1e-5),
        "reward_model/accuracy": pytest.approx(((values > 0) == good).double().mean().item()),
        "reward_model/good": pytest.approx(values[good].mean().item(), rel=1e-4, abs=1e-5),
        "reward_model/bad": pytest.approx(values[~good].mean().item(), rel=1e-4, abs=1e-5),
    }


def test_pointwise_by_hand_under_context_parallelism() -> None:
    """Values 2 (good) and -1 (bad) on the first rank, 0 (good) on the second; sequences in another order than given."""
    from megatron_r1.train.reward_objective import PointwiseObjective

    three = [Sample(token_ids=[1] * n, prompt_length=1) for n in (4, 8, 6)]
    (batch,) = make_micro_batches(three, 100, 0, packed=True)[0]
    order = batch.sample_indices
    value = {0: 2.0, 1: -1.0, 2: 0.0}
    objective = PointwiseObjective([True, False, True], tokens=18)
    totals, gradients, sums = 0.0, {}, dict.fromkeys(objective.metric_names, 0.0)
    for mine in ({0, 1}, {2}):
        held = torch.tensor([last if i in mine else -1 for i, last in zip(order, batch.last_N.tolist(), strict=True)])
        here = [i for i in order if i in mine]
        output = torch.tensor([value[i] for i in here], requires_grad=True)
        total, _, found = objective.loss(output, replace(batch, last_N=held))
        total.backward()
        totals += total.item()
        assert output.grad is not None
        gradients |= dict(zip(here, output.grad.tolist(), strict=True))
        sums = {name: sums[name] + float(found[name]) for name in sums}
    # log(1 + e^-2) = 0.126928, log(1 + e^-1) = 0.313262, log 2 = 0.693147
    assert totals == pytest.approx((0.126928 + 0.313262 + 0.693147) * 18 / 3, rel=1e-5)
    assert gradients == {
        0: pytest.approx((0.880797 - 1) * 6, rel=1e-4),
        1: pytest.approx(0.268941 * 6, rel=1e-4),
        2: pytest.approx((0.5 - 1) * 6),
    }
    assert sums == {"loss": pytest.approx(1.133337, rel=1e-5), "correct": 2.5, "good": 2.0, "bad": -1.0}


def test_pointwise_fillers_and_batches_of_one_kind() -> None:
    from megatron_r1.train.reward_objective import PointwiseObjective

    _, (filler,) = make_micro_batches(samples()[:1], 100, 0, packed=True, shards=2)
    objective = PointwiseObjective([True], tokens=10)
    total, count, found = objective.loss(torch.zeros(0, requires_grad=True), filler)
    total.backward()
    assert (total.item(), int(count), [float(value) for value in found.values()]) == (0, 0, [0, 0, 0, 0])
    shown = objective.metrics({"loss": 0.5, "correct": 1.0, "good": 2.0, "bad": 0.0})
    assert shown == {"loss/pointwise": 0.5, "reward_model/accuracy": 1.0, "reward_model/good": 2.0}


class _Context:
    """The part of a World that an objective asks."""

    def __init__(self, rank: int, full: torch.Tensor) -> None:
        self.context_rank, self._full = rank, full

    def sum_over_context(self, mine: torch.Tensor) -> torch.Tensor:
        assert not mine.requires_grad
        assert mine[self.context_rank] == self._full[self.context_rank] and mine[1 - self.context_rank] == 0
        return self._full
