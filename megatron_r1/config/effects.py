"""Keys of the stages that would have no effect with this architecture, or contradict another table. No torch.

Each table refuses what it can see alone (`config/grpo.py`, `config/model.py`); `pipeline/preflight.py` calls
`check_effects` before any process starts, when the architecture is known.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from megatron_r1.config.errors import UserError
from megatron_r1.config.grpo import GrpoConfig
from megatron_r1.config.model import ModelConfig
from megatron_r1.config.run import RunConfig
from megatron_r1.config.stages import GrpoStage, PretrainStage, SftStage
from megatron_r1.config.validate import EXPERT_COUNTS

_DENSE = f"this architecture is dense (no {EXPERT_COUNTS[0]})"


def check_effects(config: RunConfig, architectures: Mapping[str | None, Mapping[str, Any]]) -> None:
    """Refuse keys that ask for what is not there.

    Only values other than the default are judged: a resolved recipe spells all of them.

    Args:
        config: the recipe.
        architectures: name of a model (None: `[model]`) -> the keys of its Hugging Face config.json.

    Raises:
        UserError: one line per key, with its value, the reason and the cure.
    """
    problems: list[str] = []
    for name, architecture in architectures.items():
        model = config.model if name is None else config.models[name]
        if model.mtp and not architecture.get("num_nextn_predict_layers"):
            table = "model" if name is None else f"models.{name}"
            problems.append(f"{table}.mtp = true: {_no_mtp(model, architecture)}; remove it")
    for stage in config.stage:
        model, architecture = config.model_of(stage), architectures[stage.model]
        if isinstance(stage, (PretrainStage, SftStage)):
            problems += _default_mtp_loss(stage, model, architecture)
        if isinstance(stage, SftStage):
            problems += [f"stage.{stage.name}.{line}" for line in _expert_bias("expert_bias", stage, architecture)]
        elif isinstance(stage, GrpoStage):
            problems += [f"stage.{stage.name}.{line}" for line in _mtp_loss(stage, model, architecture)]
            problems += [f"stage.{stage.name}.{line}" for line in _experts(stage, model, architecture)]
            problems += _dropout(stage, model)
            problems += _watch(stage)
    if problems:
        raise UserError("\n  ".join(problems))


def _has_mtp(model: ModelConfig, architecture: Mapping[str, Any]) -> bool:
    return bool(architecture.get("num_nextn_predict_layers")) and model.mtp is not False


def _no_mtp(model: ModelConfig, architecture: Mapping[str, Any]) -> str:
    if architecture.get("num_nextn_predict_layers"):
        return "the model has no multi-token-prediction layers (model.mtp = false)"
    layers = architecture.get("num_nextn_predict_layers")
    given = "it has no num_nextn_predict_layers" if layers is None else "num_nextn_predict_layers = 0"
    return f"the architecture has no multi-token-prediction layers ({given})"


def _default_mtp_loss(
    stage: PretrainStage | SftStage, model: ModelConfig, architecture: Mapping[str, Any]
) -> Iterator[str]:
    default = type(stage).model_fields["mtp_loss"].default
    if stage.mtp_loss not in (0, default) and not _has_mtp(model, architecture):
        reason = _no_mtp(model, architecture)
        yield f"stage.{stage.name}.mtp_loss = {stage.mtp_loss:g} without effect: {reason}; remove it"


def _mtp_loss(stage: GrpoStage, model: ModelConfig, architecture: Mapping[str, Any]) -> Iterator[str]:
    if stage.grpo.mtp_loss > 0 and not _has_mtp(model, architecture):
        yield (
            f"grpo.mtp_loss = {stage.grpo.mtp_loss:g} without effect: {_no_mtp(model, architecture)}; remove it or set "
            "it to 0"
        )


def _experts(stage: GrpoStage, model: ModelConfig, architecture: Mapping[str, Any]) -> Iterator[str]:
    replay = stage.grpo.routing_replay
    if replay != "none" and not _has_experts(architecture):
        yield f'grpo.routing_replay = "{replay}": {_DENSE}, there is no routing; set it to "none"'
    elif replay != "none" and model.megatron.get("moe_router_fusion"):
        yield (
            f'grpo.routing_replay = "{replay}" with [model.megatron] moe_router_fusion = true: the fused router '
            "chooses its experts inside one kernel, and recorded ones cannot be put in; remove moe_router_fusion"
        )
    yield from _expert_bias("grpo.expert_bias", stage.grpo, architecture)


def _expert_bias(key: str, table: GrpoConfig | SftStage, architecture: Mapping[str, Any]) -> Iterator[str]:
    if table.expert_bias == "frozen":
        return
    if not _has_experts(architecture):
        yield f'{key} = "{table.expert_bias}" without effect: {_DENSE}; remove it'
    elif architecture.get("model_type") != "deepseek_v3":
        yield (
            f'{key} = "{table.expert_bias}" without effect: routers of a {architecture.get("model_type")} architecture '
            "have no expert bias; remove it"
        )


def _has_experts(architecture: Mapping[str, Any]) -> bool:
    return any(architecture.get(key) for key in EXPERT_COUNTS)


def _watch(stage: GrpoStage) -> Iterator[str]:
    given = sorted(key for key in stage.watch.model_fields_set if getattr(stage.watch, key) != _default(stage, key))
    if given and not any(reward.kind == "model" for reward in stage.reward):
        yield (
            f"stage.{stage.name}.watch.{given[0]} = {getattr(stage.watch, given[0]):g} without effect: no reward of "
            "the stage is a model; remove it"
        )


def _default(stage: GrpoStage, key: str) -> Any:
    return type(stage.watch).model_fields[key].default


def _dropout(stage: GrpoStage, model: ModelConfig) -> Iterator[str]:
    for key in ("hidden_dropout", "attention_dropout"):
        if model.megatron.get(key):
            yield (
                f"[model.megatron] {key} = {model.megatron[key]:g} with the grpo stage {stage.name!r}: dropout gives "
                "the same tokens other log-probs in every pass, so old and new ones would differ without an update; "
                "leave it out, or train that stage in a recipe of its own"
            )
