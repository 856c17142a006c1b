"""Recomputed activations: the keys of [model], the same gradients to the bit, and that it does happen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError

from megatron_r1.config.errors import UserError
from megatron_r1.config.model import ModelConfig, ParallelConfig
from megatron_r1.model import megatron_config
from megatron_r1.model.megatron_traps import check_traps
from megatron_r1.model.presets import architecture
from megatron_r1.parallel.world import World

VOCAB = 96
TOKENS = torch.arange(2, 50).reshape(2, 24)
POSITIONS = torch.arange(24).expand(2, 24)
OFFLOADING = {
    "fine_grained_activation_offloading": True,
    "offload_modules": ["core_attn", "attn_proj", "expert_fc1", "moe_act"],
    "min_offloaded_tensor_size": 4096,
}


def model(preset: str = "tiny-moe", **fields: Any) -> ModelConfig:
    return ModelConfig.model_validate({"preset": preset, **fields})


def megatron(on_cpu: bool = True, **fields: Any) -> Any:
    chosen = model(**fields)
    return megatron_config.transformer_config(architecture(chosen, VOCAB), chosen, ParallelConfig(), on_cpu=on_cpu)


def asked(config: Any) -> tuple[Any, ...]:
    return (
        config.recompute_granularity,
        config.recompute_method,
        config.recompute_num_layers,
        config.recompute_modules,
    )


def test_what_reaches_megatron(world: World) -> None:
    unused = ["core_attn"]  # Megatron's default, read only with "selective"
    assert asked(megatron()) == (None, None, None, unused)
    assert asked(megatron(recompute="full")) == ("full", "uniform", 1, unused)
    assert asked(megatron(recompute="full", recompute_method="block", recompute_layers=2)) == (
        *("full", "block", 2),
        unused,
    )
    chosen = ["mla_up_proj", "mlp"]
    assert asked(megatron(recompute="selective", recompute_modules=chosen)) == ("selective", None, None, chosen)
    assert asked(megatron(megatron={"recompute_granularity": "selective", "recompute_modules": ["moe"]})) == (
        *("selective", None, None),
        ["moe"],
    )


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"recompute": "selective"}, "recompute = 'selective' needs `recompute_modules`"),
        ({"recompute": "full", "recompute_modules": ["mlp"]}, "recompute = 'full' takes no `recompute_modules`"),
        ({"recompute_modules": ["mlp"]}, "recompute = 'none' takes no `recompute_modules`"),
        ({"recompute_layers": 2}, "recompute = 'none' takes no `recompute_layers`"),
        ({"recompute_method": "block"}, "recompute = 'none' takes no `recompute_method`"),
        ({"recompute": "selective", "recompute_modules": ["attention"]}, "'core_attn', 'moe_act'"),
        ({"recompute": "full", "megatron": {"recompute_num_layers": 2}}, "recompute_num_layers: set only one of them"),
    ],
)
def test_keys_that_contradict_each_other(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError) as caught:
        model(**fields)
    assert words in str(caught.value)


@pytest.mark.parametrize("module", ["layernorm", "moe_act"])
@pytest.mark.parametrize("through", ["key", "megatron"])
def test_what_a_cpu_cannot_recompute_is_refused(world: World, module: str, through: str) -> None:
    modules = ["mlp", module]
    fields: dict[str, Any] = {"recompute": "selective", "recompute_modules": modules}
    if through == "megatron":
        fields = {"megatron": {"recompute_granularity": "selective", "recompute_modules": modules}}
    with pytest.raises(UserError) as caught:
        megatron(**fields)
    said = str(caught.value)
    assert f'"{module}" does not work on a CPU in Megatron-Core 0.16.1' in said and 'use "mlp", "moe"' in said


def test_with_transformer_engine_they_are_allowed(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: dict[str, Any] = {"preset": "tiny-dense", "recompute": "selective", "recompute_modules": ["layernorm"]}
    with pytest.raises(UserError, match="without Transformer Engine"):
        megatron(on_cpu=False, **chosen)
    monkeypatch.setattr(megatron_config, "transformer_engine_installed", lambda: True)
    assert asked(megatron(on_cpu=False, **chosen))[3] == ["layernorm"]
    v3 = model(recompute="selective", recompute_modules=["layernorm", "mla_up_proj", "moe_act"])
    check_traps(architecture(v3, VOCAB), v3, ParallelConfig(), on_cpu=False, transformer_engine=True)


def test_offloading_is_reachable(world: World) -> None:
    config = megatron(megatron=OFFLOADING)
    assert {key: getattr(config, key) for key in OFFLOADING} == OFFLOADING
    layers = megatron(preset="tiny-dense", megatron={"cpu_offloading": True, "cpu_offloading_num_layers": 1})
    assert (layers.cpu_offloading, layers.cpu_offloading_num_layers) == (True, 1)
    with pytest.raises(UserError, match="CPU offloading does not work when activation recomputation is enabled"):
        megatron(recompute="full", megatron={"cpu_offloading": True, "cpu_offloading_num_layers": 1})


@pytest.fixture(scope="module")
def plain(world: World) -> Any:
    from megatron_r1.model.build import build_model

    chosen = model(mtp=False)
    return build_model(architecture(chosen, VOCAB), chosen, world)[0].train()


def gradients(found: Any, counted: str | None = None) -> tuple[dict[str, torch.Tensor], int]:
    """Gradients of a cross entropy, and how often the modules of that name ran."""
    calls: list[str] = []
    hooks = [
        part.register_forward_hook(lambda *_: calls.append(""))
        for name, part in found.named_modules()
        if counted and name.endswith(counted)
    ]
    logits = found(TOKENS, POSITIONS, None)
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())
    found.zero_grad()
    loss.backward()
    for hook in hooks:
        hook.remove()
    return {name: p.grad.clone() for name, p in found.named_parameters()}, len(calls)


@pytest.mark.parametrize(
    ("fields", "counted", "layers"),
    [
        ({"recompute": "full"}, "self_attention", 2),
        ({"recompute": "full", "recompute_layers": 2}, "self_attention", 2),
        ({"recompute": "full", "recompute_method": "block", "recompute_layers": 1}, "self_attention", 2),
        ({"recompute": "selective", "recompute_modules": ["core_attn"]}, "core_attention", 2),
        ({"recompute": "selective", "recompute_modules": ["mla_up_proj"]}, "linear_kv_up_proj", 2),
        ({"recompute": "selective", "recompute_modules": ["mlp"]}, "layers.0.mlp.linear_fc1", 1),
        ({"recompute": "selective", "recompute_modules": ["moe"]}, "layers.1.mlp.router", 1),
        ({"recompute": "selective", "recompute_modules": ["shared_experts"]}, "shared_experts.linear_fc1", 1),
    ],
)
def test_the_same_gradients_to_the_bit(
    world: World, plain: Any, fields: dict[str, Any], counted: str, layers: int
) -> None:
    from megatron_r1.model.build import build_model

    chosen = model(mtp=False, **fields)
    again = build_model(architecture(chosen, VOCAB), chosen, world)[0].train()
    again.load_state_dict(plain.state_dict())
    expected, once = gradients(plain, counted)
    found, twice = gradients(again, counted)
    assert once == layers
    assert twice == (layers + 1 if fields.get("recompute_method") == "block" else 2 * layers)
    assert expected.keys() == found.keys()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
