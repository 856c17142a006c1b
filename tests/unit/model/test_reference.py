"""The KL reference: swapped in and out to the bit, replaced as a whole, expert biases included."""

from __future__ import annotations

import pytest
import torch

from megatron_r1.config.model import ModelConfig
from megatron_r1.model.presets import architecture
from megatron_r1.model.reference import Reference
from megatron_r1.parallel.world import World

TOKENS = torch.arange(2, 26).reshape(2, 12)
POSITIONS = torch.arange(12).expand(2, 12)


@pytest.fixture
def model(world: World) -> torch.nn.Module:
    from megatron_r1.model.build import build_model

    config = ModelConfig(preset="tiny-moe", mtp=False)
    return build_model(architecture(config, 96), config, world)[0].eval()


def state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items() if isinstance(v, torch.Tensor)}


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS, POSITIONS, None)


def train(model: torch.nn.Module, seed: int) -> None:
    """Move every parameter and every expert bias."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict(keep_vars=True).items():
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                tensor.add_(0.05 * torch.randn(tensor.shape, generator=draw))
                assert name


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [k for k in expected if not torch.equal(found[k], expected[k])] == []


def test_swapping_in_gives_the_old_weights_and_restores_the_new_ones_to_the_bit(model: torch.nn.Module) -> None:
    old, old_logits = state(model), logits(model)
    pointers = [p.data_ptr() for p in model.parameters()]
    reference = Reference([model], step=0)
    train(model, seed=1)
    new, new_logits = state(model), logits(model)
    assert not torch.equal(new_logits, old_logits)
    with reference.swapped_in():
        assert_equal(state(model), old)
        assert torch.equal(logits(model), old_logits)
    assert_equal(state(model), new)
    assert torch.equal(logits(model), new_logits)
    assert [p.data_ptr() for p in model.parameters()] == pointers, "optimizers and buckets hold these tensors"


def test_expert_biases_belong_to_the_reference(model: torch.nn.Module) -> None:
    router = model.decoder.layers[-1].mlp.router
    router.expert_bias[:] = torch.linspace(0, 0.1, len(router.expert_bias))
    reference = Reference([model], step=0)
    router.expert_bias[:] = 7.0
    with reference.swapped_in():
        assert torch.equal(router.expert_bias, torch.linspace(0, 0.1, len(router.expert_bias)))
    assert router.expert_bias.tolist() == [7.0] * len(router.expert_bias)


def test_an_error_inside_restores_the_policy(model: torch.nn.Module) -> None:
    reference = Reference([model], step=0)
    train(model, seed=1)
    new = state(model)
    with pytest.raises(ZeroDivisionError), reference.swapped_in():
        raise ZeroDivisionError
    assert_equal(state(model), new)


def test_replace_takes_the_policy_of_now(model: torch.nn.Module) -> None:
    reference = Reference([model], step=0)
    train(model, seed=1)
    middle = state(model)
    reference.replace(400)
    assert reference.step == 400
    train(model, seed=2)
    with reference.swapped_in():
        assert_equal(state(model), middle)


def test_the_copy_shares_no_memory_and_needs_no_gradient(model: torch.nn.Module) -> None:
    reference = Reference([model], step=0)
    mine = {p.data_ptr() for p in model.state_dict().values() if isinstance(p, torch.Tensor)}
    assert not mine & {w.data_ptr() for w in reference.weights}
    assert {w.device.type for w in reference.weights} == {"cpu"}
    assert not any(w.requires_grad for w in reference.weights)
    with reference.swapped_in():
        assert all(p.requires_grad for p in model.parameters())
