"""Each rule of a layout, alone and together; the shipped presets under layouts that are known to
run.
"""

from __future__ import annotations

import json
from importlib import resources
from typing import Any

import pytest

from megatron_r1.config.errors import UserError
from megatron_r1.config.model import ParallelConfig
from megatron_r1.config.validate import check_layout, check_world

DENSE: dict[str, Any] = {
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
}
MOE: dict[str, Any] = {
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "hidden_size": 64,
    "intermediate_size": 128,
    "kv_lora_rank": 16,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "moe_intermediate_size": 32,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
}


def preset(name: str) -> dict[str, Any]:
    text = (resources.files("megatron_r1.model") / "presets" / f"{name}.json").read_text(encoding="utf-8")
    return dict(json.loads(text))


def problems(architecture: dict[str, Any], world: int | None = None, **layout: int) -> list[str]:
    """The violated rules, one a line, without the heading."""
    try:
        check_layout(architecture, ParallelConfig(**layout), world)
    except UserError as error:
        return [line.strip() for line in str(error).splitlines()[1:]]
    return []


@pytest.mark.parametrize(
    ("name", "world", "layout"),
    [
        ("tiny-moe", 1, {}),
        ("tiny-dense", 1, {}),
        ("moonlight-16b-a3b", 8, {"tensor": 2, "pipeline": 1, "expert": 8}),
        ("qwen2.5-7b", 8, {"tensor": 4}),
        ("deepseek-v3", 64, {"expert": 64}),
        ("qwen3-30b-a3b", 16, {"tensor": 4, "pipeline": 2, "expert": 8}),
    ],
)
def test_layouts_that_run(name: str, world: int, layout: dict[str, int]) -> None:
    assert problems(preset(name), world, **layout) == []


@pytest.mark.parametrize(
    ("base", "change", "world", "layout", "expected"),
    [
        (
            DENSE,
            {"num_key_value_heads": 8},
            None,
            {"tensor": 3},
            "tensor (3) must divide num_attention_heads (8",
        ),
        (
            DENSE,
            {},
            None,
            {"tensor": 4},
            "tensor (4) must divide num_key_value_heads (2; allowed: 1, 2)",
        ),
        (
            DENSE,
            {"intermediate_size": 129},
            None,
            {"tensor": 2},
            "must divide intermediate_size (129",
        ),
        (DENSE, {}, None, {"expert": 2}, "expert is 2, but this architecture is dense"),
        (
            DENSE,
            {},
            None,
            {"expert_tensor": 2},
            "expert_tensor is 2, but this architecture is dense",
        ),
        (
            DENSE,
            {},
            None,
            {"pipeline": 3},
            "pipeline (3) must divide num_hidden_layers (4; allowed: 1, 2, 4)",
        ),
        (DENSE, {}, None, {"pipeline": 8}, "pipeline is 8, more than the 4 layers"),
        (
            DENSE,
            {"num_hidden_layers": 6},
            None,
            {"pipeline": 2, "virtual_pipeline": 2},
            "virtual_pipeline (4)",
        ),
        (DENSE, {}, None, {"virtual_pipeline": 2}, "virtual_pipeline is 2, but pipeline is 1"),
        (
            DENSE,
            {"num_key_value_heads": 3},
            None,
            {},
            "must be a multiple of num_key_value_heads (3)",
        ),
        (
            DENSE,
            {"hidden_size": 66},
            None,
            {},
            "hidden_size (66) must be a multiple of num_attention_heads (8)",
        ),
        (
            MOE,
            {},
            None,
            {"expert": 3},
            "expert (3) must divide the number of routed experts (8; allowed: 1, 2, 4, 8)",
        ),
        (
            MOE,
            {},
            None,
            {"expert_tensor": 3},
            "expert_tensor (3) must divide moe_intermediate_size (32",
        ),
        (
            MOE,
            {"moe_intermediate_size": 33},
            None,
            {"tensor": 2},
            "n_shared_experts x moe_intermediate_size (33",
        ),
        (
            MOE,
            {"num_experts_per_tok": 2},
            None,
            {},
            "num_experts_per_tok (2) must be 2 x topk_group (2 x 2 = 4)",
        ),
        (MOE, {"n_group": 3}, None, {}, "n_group (3) must divide the number of routed experts (8"),
        (
            MOE,
            {"num_experts_per_tok": 10, "topk_group": 5},
            None,
            {},
            "topk_group (5) must not exceed n_group (4)",
        ),
        (
            MOE,
            {"n_group": 1, "num_experts_per_tok": 9},
            None,
            {},
            "must not exceed the number of routed experts (8)",
        ),
        (MOE, {"n_group": 8}, None, {}, "leaves 1 expert in a group"),
        (
            DENSE,
            {},
            3,
            {"tensor": 2},
            "tensor x pipeline x context = 2 must divide the number of processes (3), e.g. 4",
        ),
        (
            DENSE,
            {},
            6,
            {"tensor": 2, "data": 2},
            "tensor x pipeline x context x data = 4, but 6 processes",
        ),
        (
            MOE,
            {},
            2,
            {"expert": 4},
            "expert x expert_tensor x pipeline = 4 must divide the number of processes (2)",
        ),
    ],
)
def test_each_rule(
    base: dict[str, Any],
    change: dict[str, Any],
    world: int | None,
    layout: dict[str, int],
    expected: str,
) -> None:
    assert any(expected in line for line in problems({**base, **change}, world, **layout))
    assert problems(base, 8) == []


def test_all_violations_are_listed() -> None:
    found = problems({**MOE, "num_experts_per_tok": 3}, 7, tensor=3, pipeline=3, expert=5)
    # heads, intermediate, shared; experts, router; pipeline; dense world, expert world
    assert len(found) == 8


def test_no_group_rule_without_groups() -> None:
    assert problems({**MOE, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 3}) == []


def test_uneven_stages_need_a_pipeline_key() -> None:
    layout = ParallelConfig(pipeline=3)
    check_layout(DENSE, layout, megatron={"num_layers_in_first_pipeline_stage": 2})
    with pytest.raises(UserError, match="num_layers_in_first_pipeline_stage"):
        check_layout(DENSE, layout, megatron={"moe_router_dtype": "fp32"})


def test_an_architecture_without_its_numbers() -> None:
    with pytest.raises(UserError, match="num_hidden_layers must be a whole number above 0, got nothing"):
        check_layout({k: v for k, v in DENSE.items() if k != "num_hidden_layers"}, ParallelConfig())


def test_check_world_alone() -> None:
    check_world(ParallelConfig(tensor=2, expert=4), 4)
    with pytest.raises(UserError, match=r"does not fit 3 process"):
        check_world(ParallelConfig(tensor=2), 3)


def test_experts_in_every_layer_leave_no_dense_width_to_divide() -> None:
    qwen3 = {**preset("qwen3-30b-a3b"), "intermediate_size": 6143}
    assert problems(qwen3, tensor=2, expert=2) == []
    assert problems({**qwen3, "model_type": "deepseek_v3"}, tensor=2)
    (line,) = problems(qwen3, data=3, expert=3)
    assert line.startswith("expert (3) must divide the number of routed experts (128; ")
