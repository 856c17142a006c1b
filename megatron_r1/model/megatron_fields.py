"""`[model.megatron]` and `[stage.optimizer.megatron]` against the fields of Megatron's configurations, before any
process starts.

Megatron is not imported (it would load torch, seconds of it): its dataclasses are read from the installed source.
`model/megatron_config.py` and `train/optimizer.py` make the configurations, and what only Megatron can judge fails
there.
"""

from __future__ import annotations

import ast
import difflib
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from megatron_r1.config.errors import UserError
from megatron_r1.model.precision import transformer_engine_installed

# Fields that this project sets from the layout, the loss or the schedule: passing them through could only break it.
RESERVED = frozenset(
    (
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "virtual_pipeline_model_parallel_size",
        "context_parallel_size",
        "expert_model_parallel_size",
        "expert_tensor_parallel_size",
        "sequence_parallel",
        "pipeline_dtype",
        "params_dtype",
        "bf16",
        "fp16",
        "fp8",
        "fp8_recipe",
        "fp8_param",
        "calculate_per_token_loss",
        "variable_seq_lengths",
        "moe_token_dispatcher_type",
        "batch_p2p_comm",
        "overlap_p2p_comm",
        "use_cpu_initialization",
        "perform_initialization",
        "num_layers",
        "hidden_size",
        "grad_scale_func",
        "finalize_model_grads_func",
        "no_sync_func",
        "grad_sync_func",
        "param_sync_func",
        "timers",
        "mtp_standalone",
        "_cpu_offloading_context",
    )
)
# Fields that follow from the architecture (a preset or config.json, with `model.override`).
ARCHITECTURE = frozenset(
    (
        *("num_attention_heads", "num_query_groups", "kv_channels", "add_qkv_bias", "qk_layernorm"),
        *("multi_latent_attention", "q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim"),
        *("rotary_base", "rope_type", "rotary_scaling_factor", "original_max_position_embeddings"),
        *("beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
        *("normalization", "layernorm_epsilon", "add_bias_linear"),
        *("ffn_hidden_size", "gated_linear_unit", "activation_func"),
        *("num_moe_experts", "moe_layer_freq", "moe_ffn_hidden_size", "moe_shared_expert_intermediate_size"),
        *("moe_router_topk", "moe_router_num_groups", "moe_router_group_topk", "moe_router_score_function"),
        *("moe_router_pre_softmax", "moe_router_topk_scaling_factor"),
        "mtp_num_layers",
    )
)
# Fields that change what the model computes, to something that no config.json of the families here can say.
UNEXPORTABLE = frozenset(
    (
        *("softmax_scale", "softmax_type", "window_size", "window_attn_skip_freq", "attention_output_gate"),
        *("experimental_attention_variant", "dsa_indexer_n_heads", "dsa_indexer_head_dim", "dsa_indexer_topk"),
        *("dsa_indexer_loss_coeff", "dsa_indexer_use_sparse_loss"),
        *("linear_attention_freq", "linear_conv_kernel_dim", "linear_key_head_dim", "linear_value_head_dim"),
        *("linear_num_key_heads", "linear_num_value_heads"),
        *("is_hybrid_model", "mamba_state_dim", "mamba_head_dim", "mamba_num_groups", "mamba_num_heads"),
        *("qk_l2_norm", "layernorm_zero_centered_gamma", "apply_residual_connection_post_layernorm"),
        *("no_rope_freq", "rotary_interleaved", "rotary_percent", "mrope_section"),
        *("glu_linear_offset", "activation_func_clamp_value", "heterogeneous_block_specs"),
        *("moe_shared_expert_gate", "moe_latent_size", "moe_apply_probs_on_input"),
        *("moe_router_enable_expert_bias", "moe_router_topk_limited_devices"),
    )
)
# Fields whose counterpart here is another key.
ELSEWHERE = {"mtp_loss_scaling_factor": "stage.mtp_loss (pretrain) and stage.grpo.mtp_loss"}
# Fields of Megatron's OptimizerConfig that follow from a key of ours.
OPTIMIZER_KEYS = {
    "lr": "stage.optimizer.lr",
    "min_lr": "stage.optimizer.min_lr",
    "weight_decay": "stage.optimizer.weight_decay",
    "adam_beta1": "stage.optimizer.beta1",
    "adam_beta2": "stage.optimizer.beta2",
    "adam_eps": "stage.optimizer.eps",
    "clip_grad": "stage.optimizer.clip_grad",
    "bf16": "model.precision",
    "fp16": "model.precision",
    "fp8_recipe": "model.precision",
    "params_dtype": "model.precision",
    "reuse_grad_buf_for_mxfp8_param_ag": "model.precision",
    "use_distributed_optimizer": "parallel.distributed_optimizer",
}
# Fields that need a counterpart elsewhere in Megatron, or another optimizer than Adam, whose checkpoints differ.
OPTIMIZER_REFUSED = (
    *("optimizer", "overlap_param_gather", "overlap_param_gather_with_optimizer_step", "timers", "config_logger_dir"),
)
# Fields that Adam without fp16 never reads.
OPTIMIZER_UNREAD = ("sgd_", "muon_", "loss_scale", "initial_loss_scale", "min_loss_scale", "hysteresis")
# Fields that take another dtype than fp32 only from Transformer Engine's Adam.
OPTIMIZER_DTYPES = ("main_grads_dtype", "main_params_dtype", "exp_avg_dtype", "exp_avg_sq_dtype")
OFFLOAD_FIELDS = (
    *("optimizer_offload_fraction", "use_torch_optimizer_for_cpu_offload", "overlap_cpu_optimizer_d2h_h2d"),
    *("pin_cpu_grads", "pin_cpu_params"),
)
# TOML has no dtypes: their names, and torch's. fp8 moments are kept in bytes.
DTYPE_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp8": "uint8"}
_SOURCES = ("model_parallel_config.py", "transformer/transformer_config.py", "optimizer/optimizer_config.py")
_DENSE = ("ModelParallelConfig", "TransformerConfig")
_SCALARS: dict[str, tuple[type, ...]] = {"bool": (bool,), "int": (int,), "float": (float, int), "str": (str,)}


def check_pass_through(fields: Mapping[str, Any], *, latent_attention: bool) -> None:
    """Refuse what Megatron's configuration does not have, or what it has with another type.

    Args:
        fields: the `[model.megatron]` table.
        latent_attention: whether the architecture has multi-head latent attention (DeepSeek-V3).

    Raises:
        UserError: a field that follows from other tables, one that makes the model something that cannot be exported,
            an unknown field, or a value of the wrong type.
    """
    if not fields:
        return
    classes = (*_DENSE, "MLATransformerConfig") if latent_attention else _DENSE
    for key in fields:
        if key in RESERVED:
            raise UserError(
                f"[model.megatron] {key}: this field follows from [model], [parallel] and the loss; set it there"
            )
        if key in ARCHITECTURE:
            raise UserError(
                f"[model.megatron] {key}: this field follows from the architecture; change it with model.override, "
                "under its name in config.json (model.mtp for the multi-token-prediction layers)"
            )
        if key in UNEXPORTABLE:
            raise UserError(
                f"[model.megatron] {key}: it changes what the model computes, and no config.json of a supported family "
                "can say so: the result could neither be exported nor served; leave it out"
            )
        if key in ELSEWHERE:
            raise UserError(f"[model.megatron] {key} has no effect; set {ELSEWHERE[key]} instead")
    _check("[model.megatron]", fields, classes)


def check_optimizer_fields(fields: Mapping[str, Any], stage: str) -> None:
    """Refuse what Megatron's OptimizerConfig does not have, has with another type, or gets from a key of ours.

    Args:
        fields: the `[stage.optimizer.megatron]` table.
        stage: the name of the stage, for the message.

    Raises:
        UserError: naming the field, what was given, and where to set it instead or what is allowed.
    """
    table = f"stage.{stage}.optimizer.megatron:"
    for key in fields:
        if key in OPTIMIZER_KEYS:
            raise UserError(f"{table} {key} follows from {OPTIMIZER_KEYS[key]}; set it there")
        if key in OPTIMIZER_REFUSED:
            raise UserError(f"{table} {key} is not free: this project's optimizer is Adam on its own schedule")
    _check(table, fields, ("OptimizerConfig",))
    for key in fields:
        if key.startswith(OPTIMIZER_UNREAD):
            raise UserError(f"{table} {key} has no effect: the optimizer is Adam, without fp16; leave it out")
        if key in OFFLOAD_FIELDS and not fields.get("optimizer_cpu_offload"):
            raise UserError(
                f"{table} {key} has no effect without optimizer_cpu_offload = true; set it, or leave it out"
            )
        if key in OPTIMIZER_DTYPES and fields[key] != "fp32" and not fields.get("use_precision_aware_optimizer"):
            raise UserError(
                f'{table} {key} = "{fields[key]}" needs use_precision_aware_optimizer = true (Transformer Engine\'s '
                'Adam, with parallel.distributed_optimizer); set it, or leave the dtype at "fp32"'
            )
    if fields.get("use_precision_aware_optimizer") and not transformer_engine_installed():
        raise UserError(
            f"{table} use_precision_aware_optimizer needs Transformer Engine's Adam, which is not installed: "
            "pip install 'megatron-r1[gpu]', or leave it out (moments and master weights are then fp32)"
        )
    if fields.get("optimizer_cpu_offload") and not fields.get("optimizer_offload_fraction"):
        raise UserError(
            f"{table} optimizer_cpu_offload without optimizer_offload_fraction offloads nothing (Megatron's default "
            "is 0.0); set optimizer_offload_fraction = 1.0, or the share that should live on the CPU"
        )


def _check(table: str, fields: Mapping[str, Any], classes: Sequence[str]) -> None:
    known = {name: annotation for cls in classes for name, annotation in _annotations().get(cls, {}).items()}
    for key, value in fields.items():
        if known and key not in known:
            close = difflib.get_close_matches(key, known, n=3)
            hint = f"; did you mean {' or '.join(close)}?" if close else ""
            raise UserError(f"{table} {key}: Megatron's {classes[-1]} has no such field{hint}")
        if known and not _fits(value, known[key]):
            declared = ast.unparse(known[key])
            allowed = f" ({', '.join(map(repr, DTYPE_NAMES))})" if "torch.dtype" in declared else ""
            raise UserError(f"{table} {key}: got {value!r}; Megatron declares it as {declared}{allowed}")


@cache
def _annotations() -> dict[str, dict[str, ast.expr]]:
    """Class -> field -> annotation, of the installed Megatron-Core; empty where its source is not found."""
    spec = importlib.util.find_spec("megatron")  # a namespace package: finding it imports nothing
    roots = [Path(root) / "core" for root in (spec.submodule_search_locations or [])] if spec else []
    found: dict[str, dict[str, ast.expr]] = {}
    for file in (root / source for root in roots for source in _SOURCES):
        if file.is_file():
            for node in ast.parse(file.read_text(encoding="utf-8")).body:
                if isinstance(node, ast.ClassDef):
                    found[node.name] = dict(_fields(node))
    return found


def _fields(node: ast.ClassDef) -> Iterator[tuple[str, ast.expr]]:
    for line in node.body:
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
            yield line.target.id, line.annotation


def _fits(value: Any, annotation: ast.expr) -> bool:
    """Whether a TOML value fits: only scalars, dtypes and Literals are judged, other annotations take everything."""
    if isinstance(annotation, ast.Subscript) and isinstance(annotation.value, ast.Name):
        outer, inner = annotation.value.id, annotation.slice
        if outer == "Optional":
            return _fits(value, inner)
        if outer == "Literal":
            return value in ast.literal_eval(ast.Tuple(_items(inner), ast.Load()))
        if outer == "Union":
            return any(_fits(value, item) for item in _items(inner))
        return True
    if isinstance(annotation, ast.Name) and annotation.id in _SCALARS:
        return isinstance(value, _SCALARS[annotation.id]) and (annotation.id == "bool") == isinstance(value, bool)
    if isinstance(annotation, ast.Attribute) and ast.unparse(annotation) == "torch.dtype":
        return value in DTYPE_NAMES
    return True


def _items(inner: ast.expr) -> list[ast.expr]:
    return inner.elts if isinstance(inner, ast.Tuple) else [inner]
