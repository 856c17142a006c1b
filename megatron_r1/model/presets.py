"""Architectures as Hugging Face config.json dictionaries: shipped presets, a user's file, overrides. No torch.

A run asks `architecture`, checkpoint conversion `load_architecture`. What the layers built here do not compute is
refused, because ignoring it would silently give another model.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection, Mapping, Set
from importlib import resources
from pathlib import Path
from typing import Any

from megatron_r1.config.errors import UserError
from megatron_r1.config.model import ModelConfig
from megatron_r1.config.validate import EXPERT_COUNTS

Architecture = dict[str, Any]
"""The content of a config.json."""

_COMMON = (
    "hidden_size",
    "intermediate_size",
    "max_position_embeddings",
    "num_attention_heads",
    "num_hidden_layers",
    "rms_norm_eps",
    "rope_theta",
    "vocab_size",
)
# Keys that a config.json of the family must have: transformers fills a missing one with the default of a particular
# released model, which is never what a file that leaves it out means.
REQUIRED: dict[str, tuple[str, ...]] = {
    "qwen2": (*_COMMON, "num_key_value_heads"),
    "qwen3": (*_COMMON, "num_key_value_heads", "head_dim"),
    "qwen3_moe": (
        *_COMMON,
        "moe_intermediate_size",
        "norm_topk_prob",
        "num_experts",
        "num_experts_per_tok",
        "num_key_value_heads",
    ),
    "llama": _COMMON,
    "deepseek_v3": (
        *_COMMON,
        "first_k_dense_replace",
        "kv_lora_rank",
        "moe_intermediate_size",
        "n_group",
        "n_routed_experts",
        "n_shared_experts",
        "num_experts_per_tok",
        "q_lora_rank",
        "qk_nope_head_dim",
        "qk_rope_head_dim",
        "routed_scaling_factor",
        "topk_group",
        "v_head_dim",
    ),
}
FAMILIES = tuple(REQUIRED)
# Those of them that change what is computed, but no tensor: conversion can do without.
_NO_TENSOR = frozenset(
    (
        *("max_position_embeddings", "rms_norm_eps", "rope_theta"),
        *("n_group", "norm_topk_prob", "num_experts_per_tok", "routed_scaling_factor", "topk_group"),
    )
)
# The rope_scaling types a family can have, and the keys each needs.
ROPE_SCALING: dict[str, tuple[str, ...]] = {
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": (
        "factor",
        "original_max_position_embeddings",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
    ),
}
# What the layers built here compute. Another value of such a key would be ignored and give another model, silently.
ONLY: dict[str, Any] = {
    "attention_bias": False,  # in these families also a bias of the output projection
    "decoder_sparse_step": 1,
    "hidden_act": "silu",
    "mlp_bias": False,
    "mlp_only_layers": [],
    "moe_layer_freq": 1,
    "partial_rotary_factor": 1.0,
    "rope_interleave": True,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "use_sliding_window": False,
}
# Those of them that decide which tensors there are, or the order of their rows.
_TENSORS = frozenset(
    (
        *("attention_bias", "decoder_sparse_step", "mlp_bias", "mlp_only_layers", "moe_layer_freq"),
        *("rope_interleave", "topk_method"),
    )
)
# Sizes that conversion tables compute with, wherever a family has them; those that may also be null (or 0).
_SIZES = (
    *("head_dim", "hidden_size", "intermediate_size", "kv_lora_rank", "moe_intermediate_size", "n_routed_experts"),
    *("n_shared_experts", "num_attention_heads", "num_experts", "num_hidden_layers", "num_key_value_heads"),
    *("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "vocab_size"),
)
_OPTIONAL_SIZES = ("first_k_dense_replace", "num_nextn_predict_layers", "q_lora_rank")
_MAY_BE_NULL = ("head_dim", "num_key_value_heads", "num_nextn_predict_layers", "q_lora_rank")


def preset_names() -> list[str]:
    """Names of the shipped architectures."""
    folder = resources.files("megatron_r1.model") / "presets"
    return sorted(p.name.removesuffix(".json") for p in folder.iterdir() if p.name.endswith(".json"))


def architecture(model: ModelConfig, tokenizer_vocab: int) -> Architecture:
    """The config.json dictionary of a run, with overrides applied and the vocabulary fixed.

    Presets with `vocab_size` null take the tokenizer's size. Rotary embeddings are always spelled `rope_theta` and
    `rope_scaling` (None or a dictionary with `rope_type`), also where the file has transformers 5's
    `rope_parameters`. Raises UserError for an unknown preset, an unreadable file, an unknown or missing key, an
    unsupported family or feature, or a tokenizer larger than the model's vocabulary.
    """
    if model.preset is not None:
        config = _shipped(model.preset)
    else:
        config = _from_file(Path(str(model.config)), "model.config: ")
    for key, value in model.override.items():
        if key not in config:
            close = difflib.get_close_matches(key, config, n=3)
            hint = f"; did you mean {' or '.join(close)}?" if close else f"; it has {', '.join(sorted(config))}"
            raise UserError(f"model.override.{key}: {config['model_type']} architectures have no such key{hint}")
        config[key] = value
    config = _with_one_rope_spelling(config)
    _refuse_unsupported(config, "model")
    if config.get("vocab_size") is None:
        config["vocab_size"] = tokenizer_vocab
    if tokenizer_vocab > config["vocab_size"]:
        raise UserError(
            f"the tokenizer has {tokenizer_vocab} tokens but the model's vocab_size is {config['vocab_size']}: "
            "ids beyond it have no embedding. Use the model's own tokenizer, or set model.override.vocab_size"
        )
    return config


def load_architecture(path: Path) -> Architecture:
    """The architecture of a checkpoint that is converted, from its config.json or the folder that holds it.

    Spelled like `architecture`'s. Keys that change no tensor (such as `rope_theta` or `num_experts_per_tok`) may be
    missing or say what the layers built here do not compute: conversion copies them as they are, and what runs the
    model asks `architecture`. Raises UserError, naming the file, for everything that the tensors depend on.
    """
    config = _from_file(path, "", optional=_NO_TENSOR)
    file = path / "config.json" if path.is_dir() else path
    _refuse_other_values(config, str(file), _TENSORS)
    if config["vocab_size"] is None:
        raise UserError(f"{file}: vocab_size is null; write down how many rows the checkpoint's embedding has")
    _check_sizes(config, str(file))
    return config


def has_experts(arch: Mapping[str, Any]) -> bool:
    """Whether some of its layers are mixtures of experts."""
    return any(arch.get(key) for key in EXPERT_COUNTS)


def _shipped(name: str) -> Architecture:
    if name not in preset_names():
        close = difflib.get_close_matches(name, preset_names(), n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise UserError(f"model.preset: there is no {name!r}; {hint}shipped presets: {', '.join(preset_names())}")
    text = (resources.files("megatron_r1.model") / "presets" / f"{name}.json").read_text()
    return _with_one_rope_spelling(json.loads(text))


def _from_file(path: Path, said: str, optional: Set[str] = frozenset()) -> Architecture:
    """said: how messages begin, before the file's name; optional: REQUIRED keys that may be missing."""
    file = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{said}there is no file {file}; give a Hugging Face config.json or its folder") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{said}{file} is not readable JSON: {error}") from None
    if not isinstance(config, dict) or config.get("model_type") not in FAMILIES:
        given = config.get("model_type") if isinstance(config, dict) else type(config).__name__
        raise UserError(f"{said}{file} has model_type {given!r}; supported: {', '.join(FAMILIES)}")
    for key in ("rope_parameters", "rope_scaling"):
        if not isinstance(config.get(key), dict | None):
            raise UserError(f"{said}{file}: {key} is {config[key]!r}; it should be a table of settings, or null")
    config = _with_one_rope_spelling(config)
    if config["model_type"] == "qwen3_moe" and "num_local_experts" in config:  # as transformers 5 writes it
        experts = config.pop("num_local_experts")
        config.setdefault("num_experts", experts)
    missing = [key for key in REQUIRED[config["model_type"]] if key not in config and key not in optional]
    if missing:
        raise UserError(
            f"{said}{file} lacks {', '.join(missing)}, which a {config['model_type']} architecture needs; "
            "add them from the model's published config.json"
        )
    return config


def _with_one_rope_spelling(config: Architecture) -> Architecture:
    """`rope_theta` and `rope_scaling` from either spelling; `rope_scaling.rope_type` also where it was `type`."""
    config = dict(config)
    parameters = dict(config.pop("rope_parameters", None) or config.get("rope_scaling") or {})
    theta = parameters.pop("rope_theta", config.get("rope_theta"))
    if theta is not None:
        config["rope_theta"] = theta
    if "partial_rotary_factor" in parameters:
        config["partial_rotary_factor"] = parameters.pop("partial_rotary_factor")
    kind = parameters.pop("type", None)
    kind = parameters.pop("rope_type", kind)
    config["rope_scaling"] = {"rope_type": kind, **parameters} if kind not in (None, "default") else None
    return config


def _check_sizes(config: Architecture, said: str) -> None:
    """Raise UserError unless every key that conversion tables compute with is a number that makes sense."""
    for key in (*_SIZES, *_OPTIONAL_SIZES):
        value, least = config.get(key), 0 if key in _OPTIONAL_SIZES else 1
        if key not in config or (value is None and key in _MAY_BE_NULL):
            continue
        if type(value) is not int or value < least:
            also = ", or null" if key in _MAY_BE_NULL else ""
            raise UserError(f"{said}: {key} is {value!r}; it should be a whole number from {least} on{also}")
    if type(tied := config.get("tie_word_embeddings")) not in (bool, type(None)):
        raise UserError(f"{said}: tie_word_embeddings is {tied!r}; it should be true or false")
    heads, groups = config["num_attention_heads"], config.get("num_key_value_heads") or 1
    if config["model_type"] != "deepseek_v3" and heads % groups:
        raise UserError(
            f"{said}: num_attention_heads = {heads} is no multiple of num_key_value_heads = {groups}: every key-value "
            "head serves as many query heads"
        )


def _refuse_other_values(config: Architecture, said: str, keys: Collection[str]) -> None:
    """Raise UserError where one of these keys of ONLY has another value. said: what messages begin with."""
    family = config["model_type"]
    for key in keys:
        only = ONLY[key]
        if config.get(key, only) not in (only, None):
            raise UserError(
                f"{said}: {key} = {config[key]!r} is not supported for {family}: its layers are built with "
                f"{key} = {only!r} only, and another value would silently give another model"
            )


def _refuse_unsupported(config: Architecture, said: str) -> None:
    """said: what messages begin with."""
    family = config["model_type"]
    _refuse_other_values(config, said, ONLY)
    scaling = config["rope_scaling"]
    if scaling is None:
        return
    kind, allowed = scaling["rope_type"], "yarn" if family == "deepseek_v3" else "llama3"
    if kind != allowed:
        raise UserError(
            f"{said}: rope_scaling of type {kind!r} is not supported for {family}; it can have {allowed!r} or none"
        )
    missing = [key for key in ROPE_SCALING[kind] if key not in scaling]
    if missing:
        raise UserError(f"{said}: rope_scaling of type {kind!r} lacks {', '.join(missing)}; add them to config.json")
    fixed = {"low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 8192}
    if kind == "llama3" and any(scaling[key] != value for key, value in fixed.items()):
        raise UserError(
            f"{said}: rope_scaling {scaling}: Megatron-Core computes llama3 scaling with "
            f"{', '.join(f'{key} = {value}' for key, value in fixed.items())} only; just `factor` is free"
        )
