"""Keys that would have no effect are refused: those that a table sees alone, and those that need the architecture."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from megatron_r1.config.effects import check_effects
from megatron_r1.config.errors import UserError
from megatron_r1.config.grpo import GrpoConfig, LossConfig
from megatron_r1.config.model import ModelConfig
from megatron_r1.config.run import RunConfig
from megatron_r1.model.presets import architecture

CORPUS = [{"task": "chain_sum", "styles": {"steps": 1.0}}]


def check(
    grpo: dict[str, Any], pretrain: dict[str, Any] | None = None, rl: dict[str, Any] | None = None, **model: Any
) -> None:
    """A recipe of one stage of each kind, the architecture with its preset's values."""
    stages: list[dict[str, Any]] = [
        {"name": "base", "kind": "pretrain", "corpus": CORPUS, **(pretrain or {})},
        {
            "name": "rl",
            "kind": "grpo",
            "prompts": {"source": "generator", "task": "chain_sum"},
            "reward": [{"kind": "accuracy"}],
            "grpo": grpo,
            **(rl or {}),
        },
    ]
    table = {
        "name": "x",
        "model": {"preset": "tiny-moe", **model},
        "tokenizer": {"kind": "char"},
        "stage": [{"steps": 1, "optimizer": {"lr": 1e-3}, **stage} for stage in stages],
    }
    config = RunConfig.model_validate(table)
    check_effects(config, {None: architecture(config.model, 96)})


DENSE = {"preset": "tiny-dense"}


@pytest.mark.parametrize(
    ("grpo", "model", "words"),
    [
        ({"mtp_loss": 0.1}, DENSE, "stage.rl.grpo.mtp_loss = 0.1 without effect: the architecture has no"),
        ({"mtp_loss": 0.1}, {"mtp": False}, "multi-token-prediction layers (model.mtp = false); remove it"),
        ({"mtp_loss": 0.1}, {"override": {"num_nextn_predict_layers": 0}}, "(num_nextn_predict_layers = 0)"),
        ({}, {"mtp": True, **DENSE}, "model.mtp = true: the architecture has no multi-token-prediction layers"),
        ({"routing_replay": "rollout"}, DENSE, 'stage.rl.grpo.routing_replay = "rollout": this architecture is dense'),
        ({"routing_replay": "trainer"}, DENSE, 'set it to "none"'),
        ({"expert_bias": "updated"}, DENSE, 'stage.rl.grpo.expert_bias = "updated" without effect'),
        (
            {"expert_bias": "updated"},
            {"preset": "qwen3-30b-a3b"},
            "routers of a qwen3_moe architecture have no expert bias; remove it",
        ),
        ({"routing_replay": "rollout"}, {"megatron": {"moe_router_fusion": True}}, "remove moe_router_fusion"),
        ({}, {"megatron": {"hidden_dropout": 0.1}}, "hidden_dropout = 0.1 with the grpo stage 'rl': dropout gives"),
        ({}, {"megatron": {"attention_dropout": 0.5}}, "attention_dropout = 0.5 with the grpo stage 'rl'"),
    ],
)
def test_refused_with_this_architecture(grpo: dict[str, Any], model: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as caught:
        check(grpo, **model)
    assert words in str(caught.value)


def test_all_of_a_recipe_is_named() -> None:
    with pytest.raises(UserError) as caught:
        check({"mtp_loss": 0.1, "routing_replay": "trainer", "expert_bias": "updated"}, {"mtp_loss": 0.3}, **DENSE)
    keys = [line.split()[0] for line in str(caught.value).splitlines()]
    assert keys == [
        "stage.base.mtp_loss",
        "stage.rl.grpo.mtp_loss",
        "stage.rl.grpo.routing_replay",
        "stage.rl.grpo.expert_bias",
    ]


def test_what_has_an_effect_and_defaults_pass() -> None:
    check({"mtp_loss": 0.1, "routing_replay": "trainer", "expert_bias": "updated"}, {"mtp_loss": 0.3})
    check({})
    check({}, {"mtp_loss": 0.1}, **DENSE)  # the default, as a resolved recipe spells it


@pytest.mark.parametrize(
    ("made", "fields", "words"),
    [
        (LossConfig, {"reference_memory": "device", "kl": "none"}, 'without effect: kl = "none" keeps no reference'),
        (LossConfig, {"reference_memory": "device", "kl_coefficient": 0.0}, "without effect: kl_coefficient = 0"),
        (GrpoConfig, {"routing_replay": "trainer", "minibatches": 1}, '"trainer" has nothing to replay'),
        (ModelConfig, {"preset": "tiny-moe", "fp8_scales": "power-of-2"}, 'without effect: precision is "fp32"'),
        (ModelConfig, {"preset": "tiny-moe", "recompute_method": "block"}, "takes no `recompute_method`"),
        (
            ModelConfig,
            {
                "preset": "tiny-moe",
                "recompute": "selective",
                "recompute_modules": ["mlp"],
                "recompute_method": "block",
            },
            "recompute = 'selective' takes no `recompute_method`",
        ),
    ],
)
def test_refused_by_the_table_itself(made: Any, fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError) as caught:
        made(**fields)
    assert words in str(caught.value)


def test_their_counterparts_pass() -> None:
    LossConfig(reference_memory="device")
    LossConfig(kl="none")
    for steps in ({"minibatches": 2}, {"minibatches": 1, "epochs": 2}):
        GrpoConfig(routing_replay="trainer", **steps)
    GrpoConfig(routing_replay="rollout", minibatches=1)
    ModelConfig(preset="tiny-moe", precision="fp8-emulated", fp8_scales="power-of-2")


def test_a_watch_needs_a_reward_model() -> None:
    with pytest.raises(
        UserError, match=r"stage\.rl\.watch\.fall = 0\.1 without effect: no reward of the stage is a model"
    ):
        check({}, rl={"watch": {"fall": 0.1, "window": 8}})
    check({}, rl={"watch": {"window": 8}})  # the default, as a resolved recipe spells it
    check({}, rl={"watch": {"fall": 0.1}, "reward": [{"kind": "model", "name": "m", "url": "http://x:1"}]})
