"""The experts that the in-process engine reports are those of a plain forward over the whole sequence."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from megatron_r1.config.model import ModelConfig, TokenizerConfig
from megatron_r1.config.optim import SamplingConfig
from megatron_r1.data.tokenizers import build_tokenizer
from megatron_r1.model.presets import architecture
from megatron_r1.parallel.world import World
from megatron_r1.types import Completion, Prompt

TOKENIZER = build_tokenizer(TokenizerConfig(kind="char"))
TEXTS = ["1+2=?", "12-3+4-5+6=?", "7=?"]


@pytest.fixture(scope="module")
def model(world: World) -> torch.nn.Module:
    """Two layers with experts; random weights."""
    from megatron_r1.model.build import build_model

    config = ModelConfig(preset="tiny-moe", override={"num_hidden_layers": 3}, mtp=False)
    model = build_model(architecture(config, TOKENIZER.vocab_size), config, world)[0]
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15, generator=draw)
    return model


@pytest.fixture
def taps(model: torch.nn.Module) -> Iterator[Any]:
    from megatron_r1.model.routing import RoutingTaps

    taps = RoutingTaps([model])
    yield taps
    taps.remove()


def generate(model: torch.nn.Module, world: World, recorder: Any, batch_size: int) -> list[tuple[Prompt, Completion]]:
    from megatron_r1.rollout.megatron import MegatronEngine

    engine = MegatronEngine([model], world, TOKENIZER, TOKENIZER.vocab_size, 64, recorder)
    prompts = [
        Prompt(id=t, question=t, text=t, token_ids=TOKENIZER.encode(t), answer=None, verifier="integer") for t in TEXTS
    ]
    groups = engine.generate(
        prompts, 5, SamplingConfig(max_new_tokens=20, batch_size=batch_size, stop=["7", "+"]), seed=3
    )
    return [(p, c) for p, group in zip(prompts, groups, strict=True) for c in group]


@pytest.mark.parametrize("batch_size", [4, 64])
def test_experts_are_those_of_a_forward_over_the_whole_sequence(
    batch_size: int, model: torch.nn.Module, taps: Any, world: World
) -> None:
    found = generate(model, world, taps, batch_size)
    assert len({len(c.token_ids) for _, c in found}) > 3
    for p, c in found:
        ids = torch.tensor([[*p.token_ids, *c.token_ids]])
        taps.begin(torch.ones(ids.shape[1], dtype=torch.bool), record=True)
        with torch.no_grad():
            model(ids, torch.arange(ids.shape[1])[None], None)
        expected = taps.recorded()[0].numpy()
        assert c.routed_experts is not None and c.routed_experts.dtype == np.int16
        np.testing.assert_array_equal(c.routed_experts[:-1], expected[:-1])
        assert (c.routed_experts[-1] == -1).all() and c.routed_experts.shape == (ids.shape[1], 2, 2)
    assert taps.collect().column("tokens").tolist() == [0, 0]  # sampling is no training


def test_recording_changes_no_token(model: torch.nn.Module, taps: Any, world: World) -> None:
    recorded, plain = generate(model, world, taps, 64), generate(model, world, None, 64)
    assert [c.token_ids for _, c in recorded] == [c.token_ids for _, c in plain]
    assert all(c.routed_experts is None for _, c in plain)
