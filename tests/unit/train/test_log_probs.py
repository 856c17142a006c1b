"""The no-grad log-prob pass equals a forward of each sample alone, in the samples' order."""

from __future__ import annotations

import random
from typing import Any

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
    from megatron_r1.train.log_probs import compute_log_probs

    samples = ragged(9)
    found = compute_log_probs(trainer, samples, temperature=temperature, max_tokens=70, pad_id=0)
    for sample, values in zip(samples, found, strict=True):
        assert len(values) == sample.response_length
        ids = sample.token_ids
        with torch.no_grad():
            logits = trainer.models[0](torch.tensor([ids]), torch.arange(len(ids))[None], None)
        response = torch.tensor([ids[sample.prompt_length :]])
        expected, _ = slow_log_probs(logits[:, sample.prompt_length - 1 : -1], response, VOCAB, temperature)
        torch.testing.assert_close(torch.tensor(values).double(), expected[0], rtol=0, atol=1e-5)


def test_padding_and_batching_do_not_matter(trainer: Any) -> None:
    from megatron_r1.train.log_probs import compute_log_probs

    samples = ragged(9)
    one, other = (
        compute_log_probs(trainer, samples, temperature=1.0, max_tokens=size, pad_id=pad)
        for size, pad in ((10_000, 0), (1, 5))
    )
    for a, b in zip(one, other, strict=True):
        assert a == pytest.approx(b, abs=1e-5)


def test_nothing_is_counted_or_trained(trainer: Any) -> None:
    from megatron_r1.train.log_probs import compute_log_probs

    before = {k: v.clone() for k, v in trainer.models[0].state_dict().items() if isinstance(v, torch.Tensor)}
    compute_log_probs(trainer, ragged(5), temperature=1.0, max_tokens=70, pad_id=0)
    for name, value in trainer.models[0].state_dict().items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, before[name]), name
    assert trainer.step == 0
