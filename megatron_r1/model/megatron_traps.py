"""Settings of the model that Megatron-Core 0.16.1 would get silently wrong, ignore, or refuse only at work. No torch.

`pipeline/preflight.py` asks in the launching process, which knows what is installed; `model/megatron_config.py` asks
again in each rank, which knows its device too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from megatron_r1.config.errors import UserError
from megatron_r1.config.model import ModelConfig, ParallelConfig
from megatron_r1.model.presets import has_experts

_BALANCE = (
    "leave it out: where the architecture has one, the expert bias balances the load (moe_router_bias_update_rate; "
    'moe_router_load_balancing_type = "none" is the default here)'
)
_ROUTER_LOSS = (
    "Megatron-Core 0.16.1 scales the router's own losses wrongly with per-token loss under tensor, context or expert "
    "parallelism, and counts padding in them, silently"
)
# Field -> why it is refused wherever it has another value than the neutral one.
_ROUTER: dict[str, tuple[Any, str]] = {
    "moe_aux_loss_coeff": (0.0, f"{_ROUTER_LOSS}; {_BALANCE}"),
    "moe_z_loss_coeff": (0.0, f"{_ROUTER_LOSS}; {_BALANCE}"),
    "moe_expert_capacity_factor": (
        None,
        f"the tokens that are dropped would depend on the layout, and padding would compete with them; {_BALANCE}",
    ),
    "moe_pad_expert_input_to_capacity": (False, f"there is no expert capacity here; {_BALANCE}"),
    "moe_token_dropping": (False, f"there is no expert capacity here; {_BALANCE}"),
    "moe_input_jitter_eps": (
        None,
        "noise in the router makes log-probs of the same tokens differ between two passes; leave it out",
    ),
    "moe_router_force_load_balancing": (False, "it routes at random, for benchmarks; leave it out"),
    "moe_enable_routing_replay": (
        False,
        "replay is done by this project's own taps; leave it out and set stage.grpo.routing_replay",
    ),
}
# Fields that nothing here reads: they belong to Megatron's own training loop and data.
_UNREAD: dict[str, str] = {
    "qk_clip": "Megatron's training loop does the clipping",
    "qk_clip_alpha": "Megatron's training loop does the clipping",
    "qk_clip_threshold": "Megatron's training loop does the clipping",
    "log_max_attention_logit": "Megatron's training loop does the logging",
    "moe_per_layer_logging": "the moe/ metrics are this project's own",
    "hybrid_context_parallel": "its batches come from Megatron's own data",
    "max_seqlen_per_dp_cp_rank": "its batches come from Megatron's own data",
}
# Fields that only Transformer Engine's layers read (or whose kernels come with it), with the neutral value. Without it
# the layers are `model/specs.py` and `model/attention.py`.
_TRANSFORMER_ENGINE: dict[str, Any] = {
    "attention_dropout": 0.0,
    "apply_query_key_layer_scaling": False,
    "attention_softmax_in_fp32": True,
    "masked_softmax_fusion": False,
    "attention_backend": "auto",
    "cp_comm_type": None,
    "hierarchical_context_parallel_sizes": None,
    "batch_invariant_mode": False,
    "fp8_dot_product_attention": False,
    "fp8_multi_head_attention": False,
    "persist_layer_norm": False,
    "memory_efficient_layer_norm": False,
    "apply_rope_fusion": False,
    "moe_router_fusion": False,
    "tp_comm_overlap": False,
}
_BACKENDS = ("auto", "flash", "fused", "unfused")
_RECOMPUTED_ALONE = {
    "layernorm": "norms cannot be recomputed alone",
    "moe_act": "the activation of the experts is recomputed only with its grouped GEMM",
}


def check_traps(
    arch: Mapping[str, Any], model: ModelConfig, layout: ParallelConfig, *, on_cpu: bool, transformer_engine: bool
) -> None:
    """Refuse what would be wrong, without effect or fail late; all of it is named.

    Args:
        arch: the keys of a Hugging Face config.json.
        model: the `[model]` table.
        layout: the `[parallel]` table.
        on_cpu: the device is known to be a CPU.
        transformer_engine: its layers are used (False on a CPU).

    Raises:
        UserError: one line per setting, with the reason and what to do instead.
    """
    without = "on a CPU" if on_cpu else "without Transformer Engine (pip install 'megatron-r1[gpu]')"
    problems = [
        *_architecture(arch),
        *_router(arch, model.megatron),
        *_unread(model.megatron),
        *([] if transformer_engine else _only_transformer_engine(model.megatron, without)),
        *([] if transformer_engine else _recompute(model, without)),
        *(_only_on_gpus(model.megatron, layout) if on_cpu else []),
    ]
    if problems:
        raise UserError("\n  ".join(problems))


def _architecture(arch: Mapping[str, Any]) -> Iterator[str]:
    if arch["model_type"] == "qwen3_moe" and arch["num_experts_per_tok"] == 1 and arch["norm_topk_prob"]:
        yield (
            "num_experts_per_tok = 1 with norm_topk_prob = true: the one weight is always 1, so the router would never "
            "learn; take more experts a token, or norm_topk_prob = false"
        )
    if arch["model_type"] != "deepseek_v3":
        return
    topk, groups = arch["num_experts_per_tok"], arch["topk_group"] if (arch.get("n_group") or 1) > 1 else None
    if groups and topk // groups != 2:
        yield (
            f"num_experts_per_tok {topk} with topk_group {groups}: Megatron-Core scores a group by its best "
            f"{topk // groups} experts, DeepSeek-V3 by its best 2, so they would route differently; "
            "num_experts_per_tok must be 2 x topk_group (or n_group = 1)"
        )
    if arch.get("norm_topk_prob") is False:
        yield "norm_topk_prob = false: Megatron-Core always normalises sigmoid routing weights"


def _router(arch: Mapping[str, Any], fields: Mapping[str, Any]) -> Iterator[str]:
    if not has_experts(arch):
        for key in fields:
            if key.startswith("moe_"):
                yield f"[model.megatron] {key}: this architecture is dense, so it has no effect; leave it out"
        return
    if arch["model_type"] != "deepseek_v3" and "moe_router_bias_update_rate" in fields:
        yield (
            "[model.megatron] moe_router_bias_update_rate has no effect: routers of a "
            f"{arch['model_type']} architecture have no expert bias; leave it out"
        )
    for kind in _values(fields.get("moe_router_load_balancing_type", "none")):
        if kind == "sinkhorn":
            reason = "it chooses by another rule than the published model, so an export would not be what was trained"
            yield f"[model.megatron] moe_router_load_balancing_type = sinkhorn: {reason}; {_BALANCE}"
        elif kind != "none":
            yield f"[model.megatron] moe_router_load_balancing_type = {kind}: {_ROUTER_LOSS}; {_BALANCE}"
    for key, (neutral, reason) in _ROUTER.items():
        if key in fields and any(value != neutral for value in _values(fields[key])):
            yield f"[model.megatron] {key} = {_spell(fields[key])}: {reason}"


def _unread(fields: Mapping[str, Any]) -> Iterator[str]:
    for key, reason in _UNREAD.items():
        if fields.get(key, False) is not False:
            yield f"[model.megatron] {key} = {_spell(fields[key])} has no effect: {reason}; leave it out"
    if fields.get("attention_backend", "auto") not in _BACKENDS:
        allowed = ", ".join(map(_spell, _BACKENDS))
        yield f"[model.megatron] attention_backend: got {_spell(fields['attention_backend'])}; allowed: {allowed}"


def _only_transformer_engine(fields: Mapping[str, Any], without: str) -> Iterator[str]:
    for key, neutral in _TRANSFORMER_ENGINE.items():
        if key in fields and fields[key] != neutral:
            yield (
                f"[model.megatron] {key} = {_spell(fields[key])} is Transformer Engine's: {without} the layers are "
                "this project's own on torch, which do not read it; leave it out"
            )


def _recompute(model: ModelConfig, without: str) -> Iterator[str]:
    """What Megatron-Core recomputes only through Transformer Engine: without it, it fails in the first step."""
    modules = list(model.recompute_modules)
    if model.megatron.get("recompute_granularity") == "selective":
        modules += model.megatron.get("recompute_modules") or []
    for module in modules:
        if module in _RECOMPUTED_ALONE:
            yield (
                f'model.recompute_modules: "{module}" does not work {without} in Megatron-Core 0.16.1 '
                f'({_RECOMPUTED_ALONE[module]}); use "mlp", "moe", "shared_experts", "mla_up_proj" or "core_attn", '
                'or recompute = "full"'
            )


def _only_on_gpus(fields: Mapping[str, Any], layout: ParallelConfig) -> Iterator[str]:
    if layout.dispatcher == "flex":
        yield (
            'parallel.dispatcher = "flex": it sends tokens by DeepEP or HybridEP, whose kernels exist for GPUs only; '
            'on a CPU use "alltoall" or "allgather"'
        )
    if fields.get("moe_grouped_gemm"):
        yield (
            "[model.megatron] moe_grouped_gemm = true: Megatron-Core's grouped GEMM is a GPU kernel (it is on there "
            "without being asked for); on a CPU leave the field out"
        )


def _values(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list) else [value]


def _spell(value: Any) -> str:
    """As TOML writes it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return f'"{value}"' if isinstance(value, str) else str(value)
