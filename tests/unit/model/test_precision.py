"""What a precision asks for before any process starts."""

from __future__ import annotations

import os
from typing import Any

import pytest

from megatron_r1.config.errors import UserError
from megatron_r1.config.model import ModelConfig, ParallelConfig
from megatron_r1.model import precision
from megatron_r1.model.presets import architecture

SHIPPED = (
    "qwen3-30b-a3b",
    "qwen3-8b",
    "deepseek-v3",
    "moonlight-16b-a3b",
    "qwen2.5-1.5b",
    "qwen2.5-7b",
    "qwen2.5-32b",
    "llama-3.1-8b",
)


def model(preset: str = "deepseek-v3", kind: str = "fp8-blockwise", **fields: Any) -> ModelConfig:
    return ModelConfig.model_validate({"preset": preset, "precision": kind, **fields})


def check(preset: str = "deepseek-v3", kind: str = "fp8-blockwise", **layout: int) -> None:
    chosen = model(preset, kind)
    precision.check_precision(chosen, architecture(chosen, 96), ParallelConfig(**layout))


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "transformer_engine_installed", lambda: True)


@pytest.mark.parametrize("preset", SHIPPED)
def test_every_shipped_large_model_is_whole_blocks(installed: None, preset: str) -> None:
    check(preset)


def test_deepseek_v3_under_its_layout(installed: None) -> None:
    check(tensor=8, pipeline=1, expert=64, expert_tensor=4)


@pytest.mark.parametrize(
    ("preset", "layout", "lines"),
    [
        (
            "qwen2.5-7b",
            {"tensor": 4},  # 18944 / 4 = 37 x 128; the projection to queries, keys and values: 4608 / 4 = 9 x 128
            [],
        ),
        (
            "qwen2.5-7b",
            {"tensor": 8},
            [
                "intermediate_size / parallel.tensor (18944 / 8) = 2368: the next multiple of 128 is 2432",
                "num_attention_heads * head_dim / parallel.tensor (3584 / 8) = 448: the next multiple of 128 is 512",
                "* head_dim / parallel.tensor (4608 / 8) = 576: the next multiple of 128 is 640",
            ],
        ),
        (
            "deepseek-v3",
            {"expert_tensor": 32},
            ["moe_intermediate_size / parallel.expert_tensor (2048 / 32) = 64: the next multiple of 128 is 128"],
        ),
        (
            "qwen3-30b-a3b",
            {"expert_tensor": 4},  # no dense layer: 6144 / tensor does not matter
            ["moe_intermediate_size / parallel.expert_tensor (768 / 4) = 192: the next multiple of 128 is 256"],
        ),
        (
            "tiny-moe",
            {},
            [
                "q_lora_rank = 96: the next multiple of 128 is 128",
                "kv_lora_rank = 64: the next multiple of 128 is 128",
                "num_attention_heads * (qk_nope_head_dim + v_head_dim) = 192: the next multiple of 128 is 256",
                "  moe_intermediate_size = 96: the next multiple of 128 is 128",
                "n_shared_experts * moe_intermediate_size = 96: the next multiple of 128 is 128",
            ],
        ),
    ],
)
def test_widths_that_are_no_whole_blocks_are_named(
    installed: None, preset: str, layout: dict[str, int], lines: list[str]
) -> None:
    if not lines:
        return check(preset, **layout)
    with pytest.raises(UserError) as caught:
        check(preset, **layout)
    said = str(caught.value)
    assert len(said.splitlines()) == 1 + len(lines), said
    assert [line for line in lines if line not in said] == [], said
    assert 'precision = "bf16"' in said


def test_without_transformer_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "transformer_engine_installed", lambda: False)
    with pytest.raises(UserError, match=r"needs Transformer Engine, which is not installed: pip install 'megatron-r1"):
        check()
    for other in ("fp32", "bf16", "fp8-emulated"):
        check("tiny-moe", other)


def test_rows_and_parameters() -> None:
    assert [precision.row_multiple(kind) for kind in ("fp32", "bf16", "fp8-blockwise", "fp8-emulated")] == [
        *(1, 1, 128, 1)
    ]
    assert [precision.bf16_parameters(kind) for kind in ("fp32", "bf16", "fp8-blockwise", "fp8-emulated")] == [
        *(False, True, True, False)
    ]


def test_the_scales_are_told_through_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(precision.FP32_SCALES, raising=False)
    precision.set_environment(model(kind="bf16"))
    assert precision.FP32_SCALES not in os.environ
    precision.set_environment(model())
    assert os.environ[precision.FP32_SCALES] == "1"
    precision.set_environment(model(fp8_scales="power-of-2"))
    assert os.environ[precision.FP32_SCALES] == "0"
