"""The three modules that plug into Megatron's layer specs, against slow plain-torch twins."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_r1.config.model import ModelConfig
from megatron_r1.model.presets import architecture
from megatron_r1.parallel.world import World
from tests.reference.attention import rms_norm, slow_attention


def config(**fields: Any) -> Any:
    from megatron.core.transformer.transformer_config import TransformerConfig

    return TransformerConfig(num_layers=1, hidden_size=24, num_attention_heads=4, **fields)


def core_attention(width: int, scale: float | None = None) -> torch.nn.Module:
    from megatron_r1.model.attention import TorchCoreAttention

    return TorchCoreAttention(config(), 1, None, "self", softmax_scale=scale, k_channels=width)


def qkv(queries: int, keys: int, heads: int, groups: int, width: int, value_width: int) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(queries + keys)
    shapes = ((queries, 2, heads, width), (keys, 2, groups, width), (keys, 2, groups, value_width))
    return [torch.randn(shape, generator=draw).requires_grad_() for shape in shapes]


def assert_same(found: torch.Tensor, expected: torch.Tensor, inputs: list[torch.Tensor]) -> None:
    """Values, and gradients of a random projection of them."""
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)
    above = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0))
    for mine, slow in zip(
        torch.autograd.grad(found, inputs, above), torch.autograd.grad(expected, inputs, above), strict=True
    ):
        torch.testing.assert_close(mine, slow, rtol=0, atol=5e-6)


CASES = {
    "causal": (7, 7, 4, 4, 6, 6),
    "grouped queries": (7, 7, 4, 2, 6, 6),
    "wider keys than values": (7, 7, 4, 4, 10, 6),
    "grouped, other value width": (5, 5, 4, 1, 6, 8),
    "decode one token": (1, 7, 4, 2, 6, 6),
    "decode a chunk": (3, 7, 4, 4, 10, 6),
}


@pytest.mark.parametrize("case", CASES)
def test_core_attention_equals_the_slow_one(world: World, case: str) -> None:
    inputs = qkv(*CASES[case])
    found = core_attention(CASES[case][4])(*inputs)
    assert_same(found, slow_attention(*inputs, scale=None), inputs)


def test_the_softmax_scale_of_the_model_is_used(world: World) -> None:
    inputs = qkv(6, 6, 4, 4, 6, 6)
    found = core_attention(6, scale=0.9)(*inputs)
    assert_same(found, slow_attention(*inputs, scale=0.9), inputs)
    assert core_attention(16).scale == pytest.approx(1 / 4)


def test_packed_sequences_equal_each_alone(world: World) -> None:
    draw = torch.Generator().manual_seed(1)
    query = torch.randn(11, 4, 10, generator=draw).requires_grad_()
    key = torch.randn(11, 2, 10, generator=draw).requires_grad_()
    value = torch.randn(11, 2, 6, generator=draw).requires_grad_()
    bounds = [0, 4, 5, 11]
    packed = SimpleNamespace(cu_seqlens_q=torch.tensor(bounds))
    found = core_attention(10)(query, key, value, packed_seq_params=packed)
    alone = [
        slow_attention(query[a:b, None], key[a:b, None], value[a:b, None], scale=None)[:, 0]
        for a, b in pairwise(bounds)
    ]
    assert found.shape == (11, 4 * 6)
    assert_same(found, torch.cat(alone), [query, key, value])


def test_a_later_token_changes_nothing_before_it(world: World) -> None:
    query, key, value = qkv(6, 6, 4, 2, 6, 6)
    before = core_attention(6)(query, key, value)
    with torch.no_grad():
        key[4], value[4] = 100.0, -100.0
    after = core_attention(6)(query, key, value)
    assert torch.equal(before[:4], after[:4])
    assert (before[4:] != after[4:]).all()


@pytest.mark.parametrize("eps", [1e-6, 1e-2])
def test_rms_norm_equals_the_formula(world: World, eps: float) -> None:
    from megatron_r1.model.specs import TorchRMSNorm

    norm = TorchRMSNorm(config(), 8, eps=eps)
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(8, generator=draw))
    x = (0.1 * torch.randn(3, 5, 8, generator=draw)).requires_grad_()
    assert_same(norm(x), rms_norm(x, norm.weight, eps), [x, norm.weight])


def test_norms_tell_whether_their_gradient_is_partial(world: World) -> None:
    from megatron_r1.model.specs import TorchRMSNorm

    assert TorchRMSNorm(config(), 8).weight.sequence_parallel is False
    sharded = config(sequence_parallel=True, tensor_model_parallel_size=2)
    assert TorchRMSNorm(sharded, 8).weight.sequence_parallel is True
    assert TorchRMSNorm(config(params_dtype=torch.bfloat16), 8).weight.dtype == torch.bfloat16


def modules_of(preset: str, world: World) -> dict[str, torch.nn.Module]:
    from megatron_r1.model.build import build_model

    model = ModelConfig(preset=preset)
    return dict(build_model(architecture(model, 96), model, world)[0].named_modules())


@pytest.mark.parametrize("preset", ["tiny-moe", "tiny-dense"])
def test_every_norm_and_attention_of_a_model_is_ours(world: World, preset: str) -> None:
    from megatron.core.transformer.identity_op import IdentityOp

    from megatron_r1.model.attention import TorchCoreAttention
    from megatron_r1.model.specs import ReplicatedLinear, ReplicatedMLASelfAttention, TorchRMSNorm

    modules = modules_of(preset, world)
    norms = {type(m) for name, m in modules.items() if "norm" in name.rsplit(".", 1)[-1]}
    assert norms - {IdentityOp} == {TorchRMSNorm}  # the place of a cross-attention norm is empty
    assert {type(m) for name, m in modules.items() if name.endswith("core_attention")} == {TorchCoreAttention}
    if preset == "tiny-moe":
        attentions = {type(m) for name, m in modules.items() if name.endswith("self_attention")}
        assert attentions == {ReplicatedMLASelfAttention}
        down = {type(m) for name, m in modules.items() if name.endswith("down_proj")}
        assert down == {ReplicatedLinear}
        assert "mtp.layers.0.transformer_layer.self_attention.core_attention" in modules


def test_the_latent_softmax_scale_has_yarn_s_factor(world: World, tmp_path: Path) -> None:
    """m = 0.1 mscale_all_dim ln(factor) + 1, squared, over sqrt(qk_nope_head_dim + qk_rope_head_dim)."""
    from megatron_r1.model.build import build_model

    sizes = {"qk_nope_head_dim": 16, "qk_rope_head_dim": 8}
    model = ModelConfig(preset="tiny-moe", override=sizes)
    arch = architecture(model, 96)
    assert (arch["rope_scaling"]["factor"], arch["rope_scaling"]["mscale_all_dim"]) == (4, 1)
    attention = build_model(arch, model, world)[0].decoder.layers[0].self_attention
    assert attention.core_attention.scale == pytest.approx((0.1 * math.log(4) + 1) ** 2 / math.sqrt(24), rel=1e-6)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**arch, "rope_scaling": None}))
    plain = ModelConfig(config=file)
    attention = build_model(architecture(plain, 96), plain, world)[0].decoder.layers[0].self_attention
    assert attention.core_attention.scale == pytest.approx(1 / math.sqrt(24), rel=1e-6)
