"""RewardModel: w . (hidden state of the last token), in float32, without an output layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_r1.config.model import ModelConfig
from megatron_r1.model.presets import architecture
from megatron_r1.parallel.world import World

VOCAB = 96
TOKENS = torch.arange(2, 26).reshape(2, 12)
POSITIONS = torch.arange(12).expand(2, 12)
INDEX = torch.tensor([11, 17, 23])  # flat positions b * 12 + t


def build(world: World, preset: str, **fields: object) -> Any:
    from megatron_r1.model.build import build_model

    config = ModelConfig(preset=preset, **fields)
    return build_model(architecture(config, VOCAB), config, world, scalar_head=True)[0].eval()


def query() -> Any:
    from megatron_r1.model.scalar_head import ValueQuery

    return ValueQuery(INDEX)


@pytest.mark.parametrize("preset", ["tiny-moe", "tiny-dense"])
def test_values_of_the_asked_positions(world: World, preset: str) -> None:
    model = build(world, preset)
    seen: list[torch.Tensor] = []
    model.decoder.register_forward_hook(lambda module, arguments, output: seen.append(output.detach()))
    assert not model(TOKENS, POSITIONS, None, query=query()).any(), "the head starts at 0"
    head = model.scalar_head.weight
    head.data.normal_(generator=torch.Generator().manual_seed(3))
    values = model(TOKENS, POSITIONS, None, query=query())
    hidden = seen[-1].transpose(0, 1).flatten(0, 1)[INDEX].double()  # [B * S, H]
    torch.testing.assert_close(values.double(), hidden @ head[0].double(), rtol=1e-5, atol=1e-5)
    assert values.dtype == torch.float32
    (values * torch.tensor([1.0, 2.0, -3.0])).sum().backward()
    expected = torch.tensor([1.0, 2.0, -3.0], dtype=torch.float64) @ hidden
    torch.testing.assert_close(head.grad[0].double(), expected, rtol=1e-4, atol=1e-5)
    assert model.embedding.word_embeddings.weight.grad.any(), "the trunk learns"


def test_float32_of_a_bf16_trunk(world: World) -> None:
    """Rounding the product to bf16 would be off by up to 2^-9 of each value; float32 is off by the inputs' rounding."""
    model = build(world, "tiny-dense", precision="bf16")
    bare = model.module
    seen: list[torch.Tensor] = []
    bare.decoder.register_forward_hook(lambda module, arguments, output: seen.append(output.detach()))
    bare.scalar_head.weight.data.normal_(generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        values = model(TOKENS, POSITIONS, None, query=query())
    assert seen[-1].dtype == bare.scalar_head.weight.dtype == torch.bfloat16
    hidden = seen[-1].transpose(0, 1).flatten(0, 1)[INDEX].double()
    expected = hidden @ bare.scalar_head.weight[0].detach().double()
    torch.testing.assert_close(values.double(), expected, rtol=1e-5, atol=1e-5)


def test_there_is_no_output_layer_and_no_multi_token_prediction(world: World) -> None:
    for preset in ("tiny-moe", "tiny-dense"):  # the second ties its embedding in a language model
        model = build(world, preset)
        names = {name.split(".")[0] for name, _ in model.named_parameters()}
        assert names == {"embedding", "decoder", "scalar_head"}
        keys = {tensor.key for tensor in model.sharded_state_dict().values() if hasattr(tensor, "data")}
        assert "scalar_head.weight" in keys and not any("output_layer" in key for key in keys)


def test_only_sequences_can_be_asked_for(world: World) -> None:
    with pytest.raises(ValueError, match="a reward model scores sequences: its forward needs a ValueQuery"):
        build(world, "tiny-dense")(TOKENS, POSITIONS, None)
