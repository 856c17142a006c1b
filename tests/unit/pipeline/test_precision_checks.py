"""The launching process finds what a precision or an optimizer table cannot have, before any rank starts."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_r1.config.errors import UserError
from megatron_r1.config.run import RunConfig
from megatron_r1.pipeline.run import preflight


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
    ],
)
def test_refused(model: dict[str, Any], optimizer: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as caught:
        preflight(recipe(model, optimizer), 1)
    assert words in str(caught.value)


def test_passed() -> None:
    preflight(recipe({"precision": "fp8-emulated", "recompute": "full"}, {"log_num_zeros_in_grad": True}), 1)
