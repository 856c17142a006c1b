"""The launching process finds what a precision or an optimizer table cannot have, before any rank starts."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_r1.config.errors import UserError
from megatron_r1.config.model import ParallelConfig
from megatron_r1.config.run import RunConfig
from megatron_r1.model.precision import row_alignment, row_multiple
from megatron_r1.pipeline import preflight as run
from megatron_r1.pipeline.preflight import preflight


def recipe(model: dict[str, Any], optimizer: dict[str, Any]) -> RunConfig:
    stage = {
        "name": "base",
        "kind": "pretrain",
        "steps": 1,
        "optimizer": {"lr": 1e-3, "megatron": optimizer},
        "corpus": [{"task": "chain_sum", "styles": {"steps": 1.0}}],
    }
    table = {"name": "x", "model": {"preset": "tiny-moe", **model}, "tokenizer": {"kind": "char"}, "stage": [stage]}
    return RunConfig.model_validate(table)


@pytest.mark.parametrize(
    ("model", "optimizer", "words"),
    [
        ({"precision": "fp8-blockwise"}, {}, "moe_intermediate_size = 96: the next multiple of 128 is 128"),
        ({}, {"lr": 1.0}, "stage.base.optimizer.megatron: lr follows from stage.optimizer.lr"),
        ({"megatron": {"fp8": "hybrid"}}, {}, "[model.megatron] fp8: this field follows from [model]"),
        ({"megatron": {"moe_z_loss_coeff": 0.1}}, {}, "[model.megatron] moe_z_loss_coeff = 0.1: Megatron-Core"),
        ({}, {"exp_avg_dtype": "bf16"}, 'exp_avg_dtype = "bf16" needs use_precision_aware_optimizer = true'),
        ({}, {"pin_cpu_grads": False}, "pin_cpu_grads has no effect without optimizer_cpu_offload = true"),
        ({}, {"muon_momentum": 0.9}, "muon_momentum has no effect: the optimizer is Adam, without fp16"),
    ],
)
def test_refused(model: dict[str, Any], optimizer: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as caught:
        preflight(recipe(model, optimizer), 1)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"recompute": "selective", "recompute_modules": ["layernorm"]}, '"layernorm" does not work without Transf'),
        ({"megatron": {"attention_backend": "flash"}}, 'attention_backend = "flash" is Transformer Engine\'s'),
    ],
)
def test_refused_without_transformer_engine(
    fields: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for installed in (True, False):
        monkeypatch.setattr(run, "transformer_engine_installed", lambda installed=installed: installed)
        if installed:
            preflight(recipe(fields, {}), 1)
            continue
        with pytest.raises(UserError) as caught:
            preflight(recipe(fields, {}), 1)
        assert words in str(caught.value)


@pytest.mark.parametrize(
    ("layout", "precision", "least"),
    [
        ({}, "fp32", 1),
        ({"tensor": 2}, "fp32", 2),
        ({"context": 2}, "fp32", 4),
        ({"context": 4}, "fp32", 8),
        ({"tensor": 2, "context": 2}, "bf16", 4),
        ({"tensor": 3, "context": 2}, "fp8-emulated", 12),
        ({"tensor": 2, "context": 2}, "fp8-blockwise", 512),
    ],
)
def test_the_fewest_tokens_of_a_micro_batch(layout: dict[str, int], precision: Any, least: int) -> None:
    assert row_alignment(ParallelConfig(**layout), row_multiple(precision)) == least


def test_a_micro_batch_below_a_rows_alignment_is_refused() -> None:
    def config(tokens: int) -> RunConfig:
        table = recipe({}, {}).model_dump(by_alias=True, exclude_none=True)
        table["parallel"]["context"] = 4
        table["stage"][0]["micro_batch_tokens"] = tokens
        return RunConfig.model_validate(table)

    preflight(config(8), 4)
    with pytest.raises(UserError) as caught:
        preflight(config(7), 4)
    said = str(caught.value)
    assert "stage.base.micro_batch_tokens = 7" in said and "parallel.context = 4" in said
    assert said.endswith("set micro_batch_tokens = 8 or more")


def test_passed() -> None:
    preflight(recipe({"precision": "fp8-emulated", "recompute": "full"}, {"log_num_zeros_in_grad": True}), 1)
