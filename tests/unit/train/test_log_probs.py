"""The no-grad log-prob pass equals a forward of each sample alone, in the samples' order."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import numpy as np
import pytest
import torch

from megatron_r1.config.model import ModelConfig
from megatron_r1.config.optim import OptimizerConfig
from megatron_r1.model.presets import architecture
from megatron_r1.parallel.world import World
from megatron_r1.types import Sample
from tests.reference.log_probs import slow_log_probs

VOCAB = 96


@pytest.fixture(scope="module", params=["tiny-moe", "tiny-dense"])
def trainer(request: pytest.FixtureRequest, world: World) -> Any:
    from megatron_r1.train.trainer import Trainer

    model = ModelConfig(preset=request.param)
    return Trainer(architecture(model, VOCAB), model, world, OptimizerConfig(lr=1e-3), steps=5)


def log_probs(
    trainer: Any, samples: list[Sample], tokens: int, temperature: float = 1.0, **keys: Any
) -> list[list[float]]:
    from megatron_r1.train.log_probs import compute_log_probs
    from megatron_r1.train.micro_batches import Batcher

    batcher = Batcher(trainer.world, tokens, **{"pad_id": 0, **keys})
    return [scored.log_probs for scored in compute_log_probs(trainer, samples, batcher, temperature=temperature)]


def ragged(number: int) -> list[Sample]:
    """Samples with responses of 0, 1, 2 and more tokens."""
    draw = random.Random(2)
    made = []
    for response in [0, 1, 2, *(draw.randint(3, 25) for _ in range(number - 3))]:
        prompt = draw.randint(1, 9)
        ids = [draw.randrange(VOCAB) for _ in range(prompt + response)]
        made.append(Sample(token_ids=ids, prompt_length=prompt))
    return made


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_equal_to_each_sample_alone(trainer: Any, temperature: float) -> None:
    samples = ragged(9)
    found = log_probs(trainer, samples, 70, temperature=temperature)
    for sample, values in zip(samples, found, strict=True):
        assert len(values) == sample.response_length
        ids = sample.token_ids
        with torch.no_grad():
            logits = trainer.models[0](torch.tensor([ids]), torch.arange(len(ids))[None], None)
        response = torch.tensor([ids[sample.prompt_length :]])
        expected, _ = slow_log_probs(logits[:, sample.prompt_length - 1 : -1], response, VOCAB, temperature)
        torch.testing.assert_close(torch.tensor(values).double(), expected[0], rtol=0, atol=1e-5)


def test_packing_padding_and_batching_do_not_matter(trainer: Any) -> None:
    samples = ragged(9)
    one = log_probs(trainer, samples, 10_000)
    for keys in ({"tokens": 1}, {"tokens": 60}, {"tokens": 60, "packed": False, "pad_id": 5}):
        for a, b in zip(one, log_probs(trainer, samples, **keys), strict=True):
            assert a == pytest.approx(b, abs=1e-5)


def test_a_loss_mask_does_not_hide_response_tokens(trainer: Any) -> None:
    (sample,) = ragged(5)[-1:]
    masked = dataclasses.replace(sample, loss_mask=[0] * len(sample.token_ids))
    assert log_probs(trainer, [masked], 100) == log_probs(trainer, [sample], 100)


def test_recorded_experts_are_those_of_each_sample_alone(world: World) -> None:
    from megatron_r1.train.log_probs import compute_log_probs
    from megatron_r1.train.micro_batches import Batcher
    from megatron_r1.train.trainer import Trainer

    model = ModelConfig(preset="tiny-moe", override={"num_hidden_layers": 3})
    arch = architecture(model, VOCAB)
    trainer = Trainer(arch, model, world, OptimizerConfig(lr=1e-3), steps=5)
    samples = ragged(7)
    batchers = [Batcher(world, 60, 0), Batcher(world, 60, 0, packed=False), Batcher(world, 1, 0)]
    together, padded, alone = (
        compute_log_probs(trainer, samples, batcher, temperature=1.0, record=True) for batcher in batchers
    )
    for sample, *others in zip(samples, together, padded, alone, strict=True):
        shape = (len(sample.token_ids), 2, arch["num_experts_per_tok"])
        first = others[0].experts
        assert first.shape == shape and first.min() >= 0 and first.max() < arch["n_routed_experts"]
        assert all((np.sort(first, -1) == np.sort(other.experts, -1)).all() for other in others[1:])
    for sample, scored in zip(samples, together, strict=True):
        sample.routed_experts = scored.experts
    again = compute_log_probs(trainer, samples, batchers[2], temperature=1.0, replay=True)
    for found, expected in zip(again, alone, strict=True):
        assert found.log_probs == pytest.approx(expected.log_probs, abs=1e-5)
    for sample in samples:  # other experts, other log-probs: the replay is really used
        sample.routed_experts = (sample.routed_experts + 1) % arch["n_routed_experts"]
    other = compute_log_probs(trainer, samples, batchers[2], temperature=1.0, replay=True)
    assert (
        max(
            abs(a - b) for x, y in zip(other, alone, strict=True) for a, b in zip(x.log_probs, y.log_probs, strict=True)
        )
        > 1e-3
    )


def test_nothing_is_counted_or_trained(trainer: Any) -> None:
    before = {k: v.clone() for k, v in trainer.models[0].state_dict().items() if isinstance(v, torch.Tensor)}
    log_probs(trainer, ragged(5), 70)
    for name, value in trainer.models[0].state_dict().items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, before[name]), name
    assert trainer.step == 0
