"""Blockwise FP8 against its definition written out: every E4M3 value decoded from its bits, blocks in a slow loop."""

from __future__ import annotations

import math
import weakref
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from megatron_r1.config.errors import UserError
from megatron_r1.config.model import ModelConfig
from megatron_r1.model.presets import architecture
from megatron_r1.parallel.world import World

VOCAB = 96
BLOCKS = [(1, 128), (128, 1), (128, 128)]
TOKENS = torch.arange(2, 50).reshape(2, 24)
POSITIONS = torch.arange(24).expand(2, 24)


def e4m3_values() -> list[tuple[float, int]]:
    """(value, mantissa) of every finite non-negative E4M3 number: 4 exponent bits (bias 7), 3 mantissa bits, no
    infinity, and the pattern 1111.111 is NaN.
    """
    found = []
    for bits in range(0x7F):
        exponent, mantissa = bits >> 3, bits & 7
        value = mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
        found.append((value, mantissa))
    return found


GRID = e4m3_values()


def nearest(value: float) -> float:
    """The nearest E4M3 number, ties to the even mantissa, beyond 448 saturated."""
    best = min(GRID, key=lambda entry: (abs(entry[0] - abs(value)), entry[1] % 2))
    return math.copysign(best[0], value)


def slow_scale(amax: np.float32, power_of_2: bool) -> np.float32:
    scale = np.float32(amax) / np.float32(448)
    if scale == 0:
        return np.float32(1)
    return np.float32(2.0 ** math.ceil(math.log2(float(scale)))) if power_of_2 else scale


def slow_rounded(x: torch.Tensor, block: tuple[int, int], power_of_2: bool = False) -> torch.Tensor:
    """What quantising and multiplying back leaves, one block and one value at a time."""
    values = x.float().numpy()
    result = np.zeros_like(values)
    for top in range(0, values.shape[0], block[0]):
        for left in range(0, values.shape[1], block[1]):
            part = values[top : top + block[0], left : left + block[1]]
            scale = slow_scale(np.abs(part).max(), power_of_2)
            for (i, j), value in np.ndenumerate(part):
                result[top + i, left + j] = np.float32(nearest(float(value / scale))) * scale
    return torch.from_numpy(result)


def spread(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Values over many magnitudes: E4M3's subnormals and zeros within blocks, whole blocks far apart, one of zeros."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=draw)
    x = x * torch.exp(3 * torch.randn(rows, columns, generator=draw))
    x = x * torch.exp2(torch.randint(-30, 30, (rows, 1), generator=draw))
    x[: rows // 2, : columns // 2] *= torch.rand(rows // 2, columns // 2, generator=draw) > 0.2
    x[-1] = 0
    return x


@pytest.mark.parametrize("scales", ["fp32", "power-of-2"])
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("shape", [(3, 256), (130, 40), (2, 300)], ids=str)
def test_rounding_bit_for_bit(world: World, shape: tuple[int, int], block: tuple[int, int], scales: Any) -> None:
    from megatron_r1.model.block_fp8 import rounded

    x = spread(*shape)
    assert torch.equal(rounded(x, block, scales), slow_rounded(x, block, scales == "power-of-2"))


def test_every_boundary_of_e4m3(world: World) -> None:
    """In a block whose largest value is 448 the scale is 1: all values stay, ties go to even, 465 saturates."""
    from megatron_r1.model.block_fp8 import quantise

    values = [value for value, _ in GRID]
    ties = [(a + b) / 2 for a, b in pairwise(values)]
    row = torch.tensor([448.0, *values, 448.0, *ties, 448.0])[:254]  # 448 opens both tiles of 127 numbers
    assert row[127 + 1] == 448.0 and len(values) == 127
    quantised, scale = quantise(torch.stack([row, -row]), (1, 128))
    assert quantised.dtype == torch.float8_e4m3fn and torch.equal(scale, torch.ones(2, 2))
    assert quantised.float()[0, :128].tolist() == row[:128].tolist()  # representable: untouched
    assert quantised.float()[0].tolist() == [nearest(value) for value in row.tolist()]
    assert torch.equal(quantised.float()[1], -quantised.float()[0])
    assert nearest(465.0) == 448.0 and nearest(2.0**-10) == 0.0 and nearest(1.5 * 2.0**-9) == 2.0**-8


@pytest.mark.parametrize(
    ("amax", "fp32", "power"),
    [
        (448.0, 1.0, 1.0),
        (449.0, 449 / 448, 2.0),
        (224.0, 0.5, 0.5),
        (1.0, 1 / 448, 2.0**-8),
        (3.0, 3 / 448, 2.0**-7),
        (0.0, 1.0, 1.0),
        (1e-45, 1.0, 1.0),  # amax / 448 is 0 in float32
    ],
)
def test_scales_by_hand(world: World, amax: float, fp32: float, power: float) -> None:
    from megatron_r1.model.block_fp8 import block_scales

    assert block_scales(torch.tensor(amax), "fp32").item() == np.float32(fp32)
    assert block_scales(torch.tensor(amax), "power-of-2").item() == power


def test_what_is_not_finite_spoils_its_block_only(world: World) -> None:
    from megatron_r1.model.block_fp8 import rounded

    for scales in ("fp32", "power-of-2"):
        for bad in (math.inf, -math.inf, math.nan):
            x = torch.ones(2, 256)
            x[0, 3] = bad
            found = rounded(x, (1, 128), scales)  # type: ignore[arg-type]
            assert torch.isnan(found[0, :128]).all() and torch.equal(found[0, 128:], torch.ones(128))
            assert torch.equal(found[1], torch.ones(256))


def test_the_published_block_format(world: World) -> None:
    """As in the checkpoint: one scale a block, the last block partial (576 = 4.5 x 128 rows in DeepSeek-V3)."""
    from megatron_r1.model.block_fp8 import dequantise, quantise

    weight = torch.randn(192, 136)
    values, scale = quantise(weight, (128, 128))
    assert values.shape == weight.shape and scale.shape == (2, 2) and scale.dtype == torch.float32
    assert scale[1, 1] == weight[128:, 128:].abs().max() / 448
    assert torch.equal(dequantise(values, scale, (128, 128)), slow_rounded(weight, (128, 128)))


@pytest.mark.parametrize("scales", ["fp32", "power-of-2"])
def test_the_three_products(world: World, scales: Any) -> None:
    """Tiles lie along the width that is summed over: inputs, then outputs, then tokens. Products in float64."""
    from megatron_r1.model.fp8 import Fp8Linear

    power = scales == "power-of-2"
    draw = torch.Generator().manual_seed(5)
    x = torch.randn(3, 45, 136, generator=draw).requires_grad_()
    weight = torch.randn(132, 136, generator=draw).requires_grad_()
    grad = torch.randn(3, 45, 132, generator=draw) * torch.exp(2 * torch.randn(3, 45, 1, generator=draw))
    output = Fp8Linear.apply(x, weight, scales)
    output.backward(grad)
    x_MK, grad_MN = x.detach().flatten(0, 1), grad.flatten(0, 1)

    def wide(values: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
        return slow_rounded(values, block, power).double()

    weight_NK = wide(weight.detach(), (128, 128))
    expected = {
        "output": (output.detach().flatten(0, 1), wide(x_MK, (1, 128)) @ weight_NK.t()),
        "input": (x.grad.flatten(0, 1), wide(grad_MN, (1, 128)) @ weight_NK),
        "weight": (weight.grad, wide(grad_MN, (128, 1)).t() @ wide(x_MK, (128, 1))),
    }
    for name, (found, slow) in expected.items():
        torch.testing.assert_close(found.double(), slow, rtol=1e-5, atol=1e-5 * float(slow.abs().max()), msg=name)


def test_no_tokens_no_gradient(world: World) -> None:
    """An expert may be sent nothing; a frozen weight asks for no gradient."""
    from megatron_r1.model.fp8 import Fp8Linear

    weight = torch.randn(136, 160).requires_grad_()
    empty = torch.zeros(0, 160).requires_grad_()
    output = Fp8Linear.apply(empty, weight, "fp32")
    output.sum().backward()
    assert output.shape == (0, 136) and torch.equal(weight.grad, torch.zeros(136, 160))
    frozen = weight.detach()
    x = torch.randn(4, 160).requires_grad_()
    Fp8Linear.apply(x, frozen, "fp32").sum().backward()
    assert x.grad is not None and frozen.grad is None


def build(world: World, preset: str, **fields: Any) -> Any:
    from megatron_r1.model.build import build_model

    model = ModelConfig(preset=preset, **fields)
    return build_model(architecture(model, VOCAB), model, world)[0]


def pair(world: World, preset: str, **fields: Any) -> tuple[Any, Any]:
    """The same weights in fp32 and emulated."""
    plain = build(world, preset)
    emulated = build(world, preset, precision="fp8-emulated", **fields)
    emulated.load_state_dict(plain.state_dict())
    return plain, emulated


def emulated_layers(model: Any) -> set[str]:
    return {name for name, part in model.named_modules() if {"_forward_impl", "forward"} & vars(part).keys()}


def test_which_layers_are_quantised(world: World) -> None:
    """Every linear layer of the blocks; not the embedding, the router, the output head, norms or the core."""
    found = emulated_layers(build(world, "tiny-moe", precision="fp8-emulated"))
    attention = {f"linear_{name}" for name in ("q_down_proj", "q_up_proj", "kv_down_proj", "kv_up_proj", "proj")}
    moe = {f"shared_experts.linear_fc{n}" for n in (1, 2)}
    moe |= {f"experts.local_experts.{e}.linear_fc{n}" for e in range(8) for n in (1, 2)}
    expected = {"mtp.layers.0.eh_proj"}
    for layer, mlp in (
        ("decoder.layers.0", {"linear_fc1", "linear_fc2"}),
        ("decoder.layers.1", moe),
        ("mtp.layers.0.transformer_layer", moe),
    ):
        expected |= {f"{layer}.self_attention.{name}" for name in attention} | {f"{layer}.mlp.{name}" for name in mlp}
    assert found == expected
    assert emulated_layers(build(world, "tiny-moe")) == set()


def test_first_and_last_layers_can_be_kept(world: World) -> None:
    kept = {"first_last_layers_bf16": True, "num_layers_at_end_in_bf16": 0}
    found = emulated_layers(build(world, "tiny-dense", precision="fp8-emulated", megatron=kept))
    layers = {name.split(".")[2] for name in found}
    assert "0" not in layers and "1" in layers


@pytest.mark.parametrize("scales", ["fp32", "power-of-2"])
@pytest.mark.parametrize(("preset", "largest"), [("tiny-dense", 0.15), ("tiny-moe", 0.25)])
def test_log_probs_differ_from_fp32_within_a_bound(world: World, preset: str, largest: float, scales: str) -> None:
    """E4M3 keeps 3 mantissa bits, a relative error of at most 1/16 a value; it must show, and must stay small.

    Bounds of the mean over the whole vocabulary, for these random models whose log-probs spread by about 0.8; another
    choice of experts makes single values larger.
    """
    plain, emulated = pair(world, preset, fp8_scales=scales)
    with torch.no_grad():
        one, two = (model(TOKENS, POSITIONS, None).log_softmax(-1) for model in (plain, emulated))
    mean = float((one - two).abs().mean())
    assert 1e-3 < mean < largest, (mean, one.std())


def test_gradients_point_the_same_way(world: World) -> None:
    plain, emulated = pair(world, "tiny-dense")
    found = []
    for model in (plain, emulated):
        logits = model(TOKENS, POSITIONS, None)
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())
        loss.backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    cosine = torch.nn.functional.cosine_similarity(*found, dim=0)
    assert 0.97 < cosine < 0.9999, cosine


def test_it_trains(world: World) -> None:
    """Twenty steps of Adam on one batch: the emulated model learns it nearly as fast as fp32."""
    losses = []
    for model in pair(world, "tiny-moe"):
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for _ in range(20):
            logits = model(TOKENS, POSITIONS, None)
            loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert losses[0] < 1.5 and losses[1] == pytest.approx(losses[0], abs=0.3), losses


def test_layers_of_transformer_engine_are_not_emulated_silently(world: World) -> None:
    from megatron_r1.model.fp8 import emulate

    model = build(world, "tiny-dense")
    for layer in model.decoder.layers:
        layer.self_attention = layer.mlp = torch.nn.Identity()
    with pytest.raises(UserError, match='"fp8-emulated" replaces the products of Megatron\'s own linear layers'):
        emulate(model, model.config, "fp32")


def test_decoding_pads_for_transformer_engine_and_training_does_not(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Megatron's wrapper stays on the modules it met; here it comes off again, also after an error."""
    from megatron.core import fp8_utils

    from megatron_r1.model.fp8 import any_token_count

    wrapped: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()

    def prepare(model: torch.nn.Module) -> None:
        for name, module in model.named_modules():
            if name.endswith("linear_proj"):
                module.forward = "padded"  # type: ignore[assignment]
                wrapped.add(module)

    monkeypatch.setattr(fp8_utils, "prepare_model_for_fp8_inference", prepare)
    monkeypatch.setattr(fp8_utils, "_fp8_inference_wrapped_modules", wrapped, raising=False)
    model = build(world, "tiny-dense")
    with any_token_count([model]):
        assert emulated_layers(model) == set()  # another precision
    model.config.fp8 = "e4m3"
    with pytest.raises(ZeroDivisionError), any_token_count([model]):
        layers = range(model.config.num_layers)
        assert emulated_layers(model) == {f"decoder.layers.{i}.self_attention.linear_proj" for i in layers}
        raise ZeroDivisionError
    assert emulated_layers(model) == set() and not wrapped
