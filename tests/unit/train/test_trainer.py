"""One optimizer step against plain autograd and AdamW written out."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from megatron_r1.algorithms.weights import count
from megatron_r1.config.grpo import CorrectionConfig, LossConfig
from megatron_r1.config.model import ModelConfig
from megatron_r1.config.optim import OptimizerConfig
from megatron_r1.data.batching import MicroBatch, make_micro_batches
from megatron_r1.model.presets import architecture
from megatron_r1.parallel.world import World
from megatron_r1.types import Sample
from tests.reference.log_probs import slow_log_probs

VOCAB = 96
TEMPERATURE = 0.8
OPTIMIZER = OptimizerConfig(lr=1e-2, weight_decay=0.1, clip_grad=0.5, warmup_steps=2, eps=1e-6)


def samples(number: int = 6) -> list[Sample]:
    draw = random.Random(4)
    made = []
    for _ in range(number):
        prompt, response = draw.randint(1, 6), draw.randint(1, 15)
        made.append(
            Sample(
                token_ids=[draw.randrange(VOCAB) for _ in range(prompt + response)],
                prompt_length=prompt,
                advantage=draw.gauss(0, 1),
                reference_log_probs=[-4.5 + draw.gauss(0, 0.2) for _ in range(response)],
            )
        )
    return made


def make_trainer(world: World, preset: str = "tiny-dense", **arguments: Any) -> Any:
    from megatron_r1.train.trainer import Trainer

    model = ModelConfig(preset=preset)
    return Trainer(architecture(model, VOCAB), model, world, OPTIMIZER, steps=10, **arguments)


def batches(max_tokens: int = 40, *, packed: bool = True, mtp_depths: int = 0) -> list[MicroBatch]:
    return make_micro_batches(samples(), max_tokens, 0, packed=packed, mtp_depths=mtp_depths)[0]


def response_log_probs(model: torch.nn.Module, sample: Sample, temperature: float) -> torch.Tensor:
    """[R] differentiable, one sample alone."""
    ids = torch.tensor([sample.token_ids])
    logits = model(ids, torch.arange(ids.shape[1])[None], None)
    start = sample.prompt_length
    return slow_log_probs(logits[:, start - 1 : -1], ids[:, start:], VOCAB, temperature)[0][0]


def gradients(model: torch.nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    named = dict(model.named_parameters())
    found = torch.autograd.grad(loss, list(named.values()))
    return dict(zip(named, found, strict=True))


def norm(tensors: dict[str, torch.Tensor]) -> float:
    return float(torch.sqrt(sum(t.double().square().sum() for t in tensors.values())))


def language_loss(model: torch.nn.Module) -> torch.Tensor:
    """Mean negative log-likelihood of all response tokens of the batch."""
    return -torch.cat([response_log_probs(model, sample, 1.0) for sample in samples()]).mean()


def policy_loss(model: torch.nn.Module) -> torch.Tensor:
    """On-policy GRPO: 1/N sum over samples of the mean over tokens of -ratio A + beta k3 (ratio 1 in value)."""
    total = torch.zeros((), dtype=torch.float64)
    for sample in samples():
        log_probs = response_log_probs(model, sample, TEMPERATURE)
        ratio = torch.exp(log_probs - log_probs.detach())
        delta = torch.tensor(sample.reference_log_probs).double() - log_probs
        k3 = torch.exp(delta) - delta - 1
        total = total + (-ratio * sample.advantage + 0.04 * k3).mean()
    return total / len(samples())


def objective(kind: str, world: World) -> Any:
    from megatron_r1.train.objectives import LanguageModelObjective, PolicyObjective

    if kind == "language":
        return LanguageModelObjective(mtp_loss=0.3)
    config = LossConfig(kl_coefficient=0.04)
    return PolicyObjective(config, CorrectionConfig(), (), count(samples()), 64, TEMPERATURE, world)


@pytest.mark.parametrize("kind", ["language", "policy"])
@pytest.mark.parametrize("max_tokens", [1, 40, 10_000])
@pytest.mark.parametrize("packed", [True, False])
def test_loss_and_gradient_equal_plain_autograd(world: World, kind: str, max_tokens: int, packed: bool) -> None:
    trainer = make_trainer(world)
    loss = {"language": language_loss, "policy": policy_loss}[kind](trainer.models[0])
    expected = gradients(trainer.models[0], loss)
    result = trainer.train_step(batches(max_tokens, packed=packed), objective(kind, world))
    found = {name: p.main_grad for name, p in trainer.models[0].named_parameters()}
    scale = min(1.0, OPTIMIZER.clip_grad / (norm(expected) + 1e-6))  # main_grad is what was clipped
    assert result.grad_norm == pytest.approx(norm(expected), rel=1e-5)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient * scale, rtol=1e-4, atol=2e-6, msg=name)
    value = result.sums["nll"] / result.sums["tokens"] if kind == "language" else result.sums["loss"]
    assert value == pytest.approx(float(loss.detach()), rel=1e-5)
    assert result.sums["tokens"] == sum(sample.response_length for sample in samples())


def test_two_steps_of_adam_by_hand(world: World) -> None:
    """Decoupled weight decay on matrices only, warm-up from 0, gradients clipped by their global norm."""
    trainer = make_trainer(world)
    model = trainer.models[0]
    named = dict(model.named_parameters())
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in named.items()}
    expected = {name: p.detach().clone() for name, p in named.items()}
    for step, lr in ((1, 0.0), (2, OPTIMIZER.lr / 2)):
        found = gradients(model, language_loss(model))
        scale = min(1.0, OPTIMIZER.clip_grad / (norm(found) + 1e-6))
        result = trainer.train_step(batches(), objective("language", world))
        assert result.lr == pytest.approx(lr)
        for name, parameter in expected.items():
            gradient = found[name] * scale
            first, second = moments[name]
            first.mul_(0.9).add_(gradient, alpha=0.1)
            second.mul_(0.95).addcmul_(gradient, gradient, value=0.05)
            decay = OPTIMIZER.weight_decay if parameter.dim() > 1 else 0.0
            parameter.mul_(1 - lr * decay)
            parameter.sub_(lr * (first / (1 - 0.9**step)) / ((second / (1 - 0.95**step)).sqrt() + OPTIMIZER.eps))
    differences = torch.cat([(named[name] - p).abs().flatten() for name, p in expected.items()])
    assert differences.max() < 2e-4 and differences.mean() < 1e-6  # where a gradient is nothing but rounding
    assert trainer.step == 2


def test_what_is_frozen_stays(world: World) -> None:
    def state(trainer: Any) -> dict[str, torch.Tensor]:
        found = trainer.models[0].state_dict()
        return {k: v.clone() for k, v in found.items() if isinstance(v, torch.Tensor)}

    moved: dict[bool, set[str]] = {}
    for frozen in (True, False):
        trainer = make_trainer(world, "tiny-moe", train_mtp=not frozen, expert_bias_frozen=frozen)
        before = state(trainer)
        for _ in range(2):  # the first has learning rate 0
            trainer.train_step(batches(mtp_depths=trainer.mtp_depths), objective("language", world))
        moved[frozen] = {name for name, value in state(trainer).items() if not torch.equal(value, before[name])}
    biases = {name for name in before if name.endswith("expert_bias")}
    layers = {name for name in before if name.startswith("mtp.")}
    assert biases and layers
    assert not moved[True] & (biases | layers)
    assert biases <= moved[False] and "mtp.layers.0.eh_proj.weight" in moved[False]
    assert "decoder.final_layernorm.weight" in moved[True]


@pytest.mark.parametrize("packed", [True, False])
def test_an_expert_bias_moves_by_its_rate(world: World, packed: bool) -> None:
    """DeepSeek-V3 (arXiv 2412.19437), section 2.1.2: up by gamma where the load is below the mean, else down.

    Padding is no load.
    """
    trainer = make_trainer(world, "tiny-moe")
    router = next(m for n, m in trainer.models[0].named_modules() if n.startswith("decoder") and n.endswith("router"))
    before = router.expert_bias.clone()
    cut = batches(packed=packed)
    real = [batch.valid_BT.T.flatten() for batch in cut]  # positions first, then rows
    assigned = []
    hook = router.register_forward_hook(lambda module, inputs, output: assigned.append(output[1]))
    result = trainer.train_step(cut, objective("language", world))
    hook.remove()
    load = torch.stack([chosen[valid].sum(0) for chosen, valid in zip(assigned, real, strict=True)]).sum(0).float()
    assert load.sum() == sum(len(sample.token_ids) for sample in samples()) * router.topk
    assert load.max() > load.min()
    expected = before + 1e-3 * torch.sign(load.mean() - load)
    torch.testing.assert_close(router.expert_bias, expected, rtol=0, atol=1e-7)
    assert result.routing["moe/max_violation"] == pytest.approx(float(load.max() / load.mean()) - 1)
