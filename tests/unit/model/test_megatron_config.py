"""What reaches Megatron's configuration, and what is refused before it could go wrong silently."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from megatron_r1.config.errors import UserError
from megatron_r1.config.model import ModelConfig, ParallelConfig
from megatron_r1.model.presets import architecture
from megatron_r1.parallel.world import World

FREE = Path(__file__).parents[2] / "golden" / "megatron_free_fields.txt"


def build(
    preset: str = "tiny-moe",
    megatron: dict[str, Any] | None = None,
    layout: ParallelConfig | None = None,
    arch: dict[str, Any] | None = None,
    on_cpu: bool = True,
    **model: Any,
) -> Any:
    """transformer_config of a preset with some keys of its architecture replaced."""
    from megatron_r1.model.megatron_config import transformer_config

    chosen = ModelConfig(preset=preset, megatron=megatron or {}, **model)
    whole = {**architecture(chosen, 96), **(arch or {})}
    return transformer_config(whole, chosen, layout or ParallelConfig(), on_cpu=on_cpu)


def refusal(**arguments: Any) -> str:
    with pytest.raises(UserError) as caught:
        build(**arguments)
    return str(caught.value)


def test_every_mechanism_of_deepseek_v3_is_on_in_the_tiny_model(world: World) -> None:
    arch = architecture(ModelConfig(preset="tiny-moe"), 96)
    config = build()
    assert config.multi_latent_attention and config.q_lora_rank and config.kv_lora_rank and config.qk_layernorm
    assert config.rope_type == "yarn" and config.rotary_scaling_factor > 1
    assert config.moe_router_score_function == "sigmoid" and config.moe_router_dtype == "fp32"
    assert config.moe_router_enable_expert_bias and config.moe_router_bias_update_rate == 1e-3
    assert config.moe_router_num_groups > config.moe_router_group_topk >= 1
    assert config.moe_router_topk == 2 * config.moe_router_group_topk
    assert config.moe_router_topk_scaling_factor == 2.5
    assert config.moe_router_load_balancing_type == "none" and config.moe_aux_loss_coeff == 0
    assert config.moe_shared_expert_intermediate_size == arch["n_shared_experts"] * arch["moe_intermediate_size"]
    dense = arch["first_k_dense_replace"]
    assert dense >= 1 and config.moe_layer_freq == [0] * dense + [1] * (arch["num_hidden_layers"] - dense)
    assert 1 in config.moe_layer_freq
    assert config.mtp_num_layers == 1


def test_the_full_model_by_value(world: World) -> None:
    """DeepSeek-V3 technical report (arXiv 2412.19437), section 4.2."""
    config = build("deepseek-v3")
    found = {
        "num_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "qk_head_dim": config.qk_head_dim,
        "v_head_dim": config.v_head_dim,
        "kv_lora_rank": config.kv_lora_rank,
        "q_lora_rank": config.q_lora_rank,
        "qk_pos_emb_head_dim": config.qk_pos_emb_head_dim,
        "experts": config.num_moe_experts,
        "moe_ffn_hidden_size": config.moe_ffn_hidden_size,
        "shared": config.moe_shared_expert_intermediate_size,
        "topk": config.moe_router_topk,
        "groups": (config.moe_router_num_groups, config.moe_router_group_topk),
        "mtp": config.mtp_num_layers,
        "init": config.init_method_std,
    }
    assert found == {
        "num_layers": 61,
        "hidden_size": 7168,
        "num_attention_heads": 128,
        "qk_head_dim": 128,
        "v_head_dim": 128,
        "kv_lora_rank": 512,
        "q_lora_rank": 1536,
        "qk_pos_emb_head_dim": 64,
        "experts": 256,
        "moe_ffn_hidden_size": 2048,
        "shared": 2048,
        "topk": 8,
        "groups": (8, 4),
        "mtp": 1,
        "init": 0.02,
    }


def test_dense_families(world: World) -> None:
    qwen, llama = build("qwen2.5-7b"), build("llama-3.1-8b")
    assert (qwen.num_query_groups, qwen.kv_channels, qwen.add_qkv_bias, qwen.qk_layernorm) == (4, 128, True, False)
    assert (llama.num_query_groups, llama.kv_channels, llama.add_qkv_bias) == (8, 128, False)
    for config in (qwen, llama):
        assert config.gated_linear_unit and config.activation_func is F.silu and not config.add_bias_linear
        assert config.mtp_num_layers is None and config.num_moe_experts is None
    qwen3 = build("tiny-dense", arch={"model_type": "qwen3", "head_dim": 20})
    assert (qwen3.add_qkv_bias, qwen3.qk_layernorm, qwen3.kv_channels) == (False, True, 20)


@pytest.mark.parametrize("norm", [True, False])
def test_experts_in_every_layer(world: World, norm: bool) -> None:
    """Qwen3 technical report (arXiv 2505.09388), section 2: 128 experts, 8 a token, none shared."""
    config = build("qwen3-30b-a3b", arch={"norm_topk_prob": norm})
    assert (config.num_moe_experts, config.moe_ffn_hidden_size, config.moe_router_topk) == (128, 768, 8)
    assert (config.moe_router_score_function, config.moe_router_pre_softmax) == ("softmax", not norm)
    assert config.moe_router_dtype == "fp32" and config.moe_router_topk_scaling_factor is None
    assert config.moe_router_load_balancing_type == "none" and config.moe_aux_loss_coeff == 0
    assert not config.moe_router_enable_expert_bias and config.moe_shared_expert_intermediate_size is None
    assert (config.moe_router_num_groups, config.moe_router_group_topk, config.moe_layer_freq) == (None, None, 1)
    assert (config.num_query_groups, config.kv_channels, config.qk_layernorm, config.add_qkv_bias) == (
        4,
        128,
        True,
        False,
    )
    assert not config.multi_latent_attention and config.mtp_num_layers is None


def test_without_groups_the_router_has_none(world: World) -> None:
    config = build("moonlight-16b-a3b")
    assert (config.moe_router_num_groups, config.moe_router_group_topk, config.moe_router_topk) == (None, None, 6)
    assert (config.rope_type, config.rotary_scaling_factor, config.q_lora_rank) == ("rope", 1.0, None)


def test_multi_token_prediction_can_be_left_out(world: World) -> None:
    assert build(mtp=False).mtp_num_layers is None
    assert build(mtp=True).mtp_num_layers == 1


def test_layouts_and_precision(world: World) -> None:
    plain = build()
    assert (plain.sequence_parallel, plain.params_dtype, plain.bf16) == (False, torch.float32, False)
    sharded = build(layout=ParallelConfig(tensor=2, expert=2), precision="bf16")
    assert (sharded.sequence_parallel, sharded.params_dtype, sharded.pipeline_dtype) == (
        True,
        torch.bfloat16,
        torch.bfloat16,
    )
    assert (sharded.tensor_model_parallel_size, sharded.expert_model_parallel_size) == (2, 2)
    assert sharded.expert_tensor_parallel_size == 1
    for config in (plain, sharded):
        assert config.calculate_per_token_loss and config.variable_seq_lengths
        assert config.moe_token_dispatcher_type == "alltoall" and not config.use_cpu_initialization


def test_interleaved_stages_never_batch_their_messages(world: World) -> None:
    """With two stages batched messages of the interleaved schedule swap, silently."""
    layout = ParallelConfig(pipeline=2, virtual_pipeline=2)
    config = build("tiny-dense", layout=layout)
    assert (config.virtual_pipeline_model_parallel_size, config.batch_p2p_comm, config.overlap_p2p_comm) == (
        2,
        False,
        True,
    )
    said = refusal(preset="tiny-dense", layout=layout, megatron={"batch_p2p_comm": True})
    assert "batch_p2p_comm: this field follows from" in said


def test_megatron_fields_pass_through(world: World) -> None:
    config = build(megatron={"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1})
    assert (config.recompute_granularity, config.recompute_num_layers) == ("full", 1)
    assert build(megatron={"moe_router_bias_update_rate": 0.5}).moe_router_bias_update_rate == 0.5


def test_unknown_fields_are_refused_with_a_hint(world: World) -> None:
    said = refusal(megatron={"recompute_granularty": "full"})
    assert "[model.megatron] recompute_granularty: Megatron's MLATransformerConfig has no such field" in said
    assert "did you mean recompute_granularity" in said
    assert "TransformerConfig has no such field" in refusal(preset="tiny-dense", megatron={"cache_mla_latents": True})


@pytest.mark.parametrize(
    "key",
    [
        *("num_query_groups", "kv_lora_rank", "moe_router_topk", "moe_router_pre_softmax", "mtp_num_layers"),
        *("moe_router_topk_scaling_factor", "mscale", "rotary_scaling_factor", "activation_func"),
    ],
)
def test_architecture_fields_are_refused(world: World, key: str) -> None:
    said = refusal(megatron={key: 3})
    assert f"[model.megatron] {key}: this field follows from the architecture; change it with model.override" in said


@pytest.mark.parametrize("key", ["sequence_parallel", "calculate_per_token_loss", "use_cpu_initialization", "bf16"])
def test_reserved_fields_are_refused(world: World, key: str) -> None:
    said = refusal(megatron={key: True})
    assert f"[model.megatron] {key}: this field follows from [model], [parallel] and the loss; set it there" in said


@pytest.mark.parametrize(
    "key",
    [
        *("softmax_scale", "softmax_type", "window_size", "window_attn_skip_freq", "attention_output_gate"),
        *("qk_l2_norm", "layernorm_zero_centered_gamma", "no_rope_freq", "rotary_interleaved", "rotary_percent"),
        *("glu_linear_offset", "activation_func_clamp_value", "moe_shared_expert_gate", "moe_latent_size"),
        *("moe_router_enable_expert_bias", "moe_apply_probs_on_input", "linear_attention_freq"),
    ],
)
@pytest.mark.parametrize("preset", ["tiny-moe", "tiny-dense"])
def test_what_could_not_be_exported_is_refused(world: World, preset: str, key: str) -> None:
    said = refusal(preset=preset, megatron={key: 1})
    assert f"[model.megatron] {key}: it changes what the model computes, and no config.json" in said


def test_somebody_has_decided_about_every_field(world: World) -> None:
    """A new field of a newer Megatron-Core belongs to one of the sets, or into the file of those that are free: they
    change speed, memory, precision, initialisation or training, but not what the model computes.
    """
    import dataclasses

    from megatron.core.transformer.transformer_config import MLATransformerConfig

    from megatron_r1.model.megatron_fields import ARCHITECTURE, RESERVED, UNEXPORTABLE

    free = frozenset(FREE.read_text(encoding="utf-8").split())
    sets = (RESERVED, ARCHITECTURE, UNEXPORTABLE, free)
    fields = [field.name for field in dataclasses.fields(MLATransformerConfig)]
    assert {name: sum(name in each for each in sets) for name in fields} == dict.fromkeys(fields, 1)
    assert frozenset.union(*sets) == set(fields)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            {"arch": {"num_experts_per_tok": 3}},
            [
                "num_experts_per_tok 3 with topk_group 1",
                "by its best 3 experts, DeepSeek-V3 by its best 2",
                "2 x topk_group",
            ],
        ),
        (
            {"arch": {"topk_group": 2, "n_group": 4}},
            ["num_experts_per_tok 2 with topk_group 2", "by its best 1 experts"],
        ),
        (
            {"megatron": {"moe_router_load_balancing_type": "seq_aux_loss"}},
            ["moe_router_load_balancing_type = seq_aux_loss", "losses wrongly", "the expert bias balances the load"],
        ),
        (
            {"megatron": {"moe_router_load_balancing_type": ["aux_loss", "none"], "moe_aux_loss_coeff": [0.1, 0.0]}},
            ["moe_router_load_balancing_type = aux_loss", "moe_aux_loss_coeff = [0.1, 0.0]"],
        ),
        (
            {"megatron": {"moe_router_load_balancing_type": "sinkhorn"}},
            ["moe_router_load_balancing_type = sinkhorn: it chooses by another rule than the published model"],
        ),
        (
            {"megatron": {"moe_z_loss_coeff": 0.1}},
            ["moe_z_loss_coeff = 0.1: Megatron-Core 0.16.1 scales", "leave it out"],
        ),
        (
            {"megatron": {"moe_expert_capacity_factor": 1.5}},
            ["moe_expert_capacity_factor = 1.5", "depend on the layout"],
        ),
        (
            {"megatron": {"moe_enable_routing_replay": True}},
            ["moe_enable_routing_replay = true", "grpo.routing_replay"],
        ),
        ({"megatron": {"moe_input_jitter_eps": 0.1}}, ["moe_input_jitter_eps = 0.1: noise in the router"]),
        ({"preset": "tiny-dense", "megatron": {"moe_router_dtype": "fp32"}}, ["moe_router_dtype", "is dense"]),
        ({"megatron": {"qk_clip": True}}, ["qk_clip = true has no effect", "Megatron's training loop"]),
        (
            {"preset": "qwen3-30b-a3b", "megatron": {"moe_router_bias_update_rate": 0.1}},
            ["moe_router_bias_update_rate has no effect: routers of a qwen3_moe architecture have no expert bias"],
        ),
        (
            {"preset": "qwen3-30b-a3b", "megatron": {"moe_router_load_balancing_type": "aux_loss"}},
            ["moe_router_load_balancing_type = aux_loss", "losses wrongly"],
        ),
        (
            {"preset": "qwen3-30b-a3b", "arch": {"num_experts_per_tok": 1}},
            ["num_experts_per_tok = 1 with norm_topk_prob = true: the one weight is always 1"],
        ),
        ({"megatron": {"mtp_loss_scaling_factor": 0.3}}, ["mtp_loss_scaling_factor has no effect; set stage.mtp_loss"]),
        ({"megatron": {"attention_backend": "sdpa"}}, ['attention_backend: got "sdpa"; allowed: "auto", "flash"']),
        (
            {"arch": {"norm_topk_prob": False}},
            ["norm_topk_prob = false: Megatron-Core always normalises sigmoid routing weights"],
        ),
        (
            {"layout": ParallelConfig(expert=2, data=2, dispatcher="flex")},
            ['parallel.dispatcher = "flex"', "for GPUs only", 'use "alltoall" or "allgather"'],
        ),
        ({"megatron": {"moe_grouped_gemm": True}}, ["moe_grouped_gemm = true", "leave the field out"]),
        (
            {"layout": ParallelConfig(tensor=3)},
            ["Megatron-Core refuses this model and layout", "multiple of tensor_model_parallel_size"],
        ),
    ],
)
def test_silent_traps_are_refused(world: World, arguments: dict[str, Any], words: list[str]) -> None:
    said = refusal(**arguments)
    assert [word for word in words if word not in said] == [], said


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attention_dropout", 0.1),
        ("apply_query_key_layer_scaling", True),
        ("attention_softmax_in_fp32", False),
        ("masked_softmax_fusion", True),
        ("attention_backend", "flash"),
        ("cp_comm_type", "a2a"),
        ("moe_router_fusion", True),
    ],
)
def test_what_only_transformer_engine_reads_is_refused_without_it(world: World, key: str, value: Any) -> None:
    for on_cpu, where in ((True, "on a CPU"), (False, "without Transformer Engine")):
        said = refusal(megatron={key: value}, on_cpu=on_cpu)
        assert f"[model.megatron] {key} = " in said and f"is Transformer Engine's: {where}" in said


def test_with_transformer_engine_those_pass(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core.transformer.enums import AttnBackend

    from megatron_r1.model import megatron_config

    monkeypatch.setattr(megatron_config, "transformer_engine_installed", lambda: True)
    config = build("tiny-dense", {"attention_dropout": 0.1, "attention_backend": "flash"}, on_cpu=False)
    assert config.attention_dropout == 0.1 and config.attention_backend is AttnBackend.flash  # no mere name


def test_neutral_values_pass(world: World) -> None:
    neutral = {"attention_dropout": 0.0, "qk_clip": False, "moe_z_loss_coeff": 0.0, "moe_aux_loss_coeff": 0.0}
    config = build(megatron={**neutral, "moe_router_load_balancing_type": "none", "hidden_dropout": 0.1})
    assert (config.hidden_dropout, config.moe_router_load_balancing_type) == (0.1, "none")


def test_every_trap_names_a_field_and_its_default(world: World) -> None:
    """A neutral value that is not the project's own would refuse, or let pass, the wrong thing."""
    import dataclasses

    from megatron.core.transformer.enums import AttnBackend
    from megatron.core.transformer.transformer_config import MLATransformerConfig

    from megatron_r1.model import megatron_traps as traps
    from megatron_r1.model.megatron_fields import ELSEWHERE

    fields = {field.name for field in dataclasses.fields(MLATransformerConfig)}
    named = {*traps._ROUTER, *traps._UNREAD, *traps._TRANSFORMER_ENGINE, *ELSEWHERE}
    assert named <= fields
    built = build()
    neutral = {**{key: value for key, (value, _) in traps._ROUTER.items()}, **traps._TRANSFORMER_ENGINE}
    for key, value in neutral.items():
        actual = getattr(built, key)
        actual = actual.name if isinstance(actual, AttnBackend) else actual
        assert actual == value or (key == "moe_z_loss_coeff" and actual is None), key


@pytest.mark.parametrize(("dispatcher", "lengths_vary"), [("alltoall", True), ("allgather", False)])
def test_dispatchers(world: World, dispatcher: str, lengths_vary: bool) -> None:
    config = build(layout=ParallelConfig(expert=2, data=2, dispatcher=dispatcher))
    assert (config.moe_token_dispatcher_type, config.variable_seq_lengths) == (dispatcher, lengths_vary)


@pytest.mark.parametrize(("preset", "experts"), [("tiny-moe", True), ("qwen3-30b-a3b", True), ("qwen3-8b", False)])
def test_experts_on_gpus_are_one_grouped_product(world: World, preset: str, experts: bool) -> None:
    from megatron_r1.model.megatron_config import _kernels

    fused = _kernels(architecture(ModelConfig(preset=preset), 96))
    assert (fused.get("moe_grouped_gemm", False), fused.get("moe_permute_fusion", False)) == (experts, experts)


def test_fused_kernels_are_asked_for_on_gpus_only(world: World) -> None:
    assert not build().moe_grouped_gemm and not build().bias_activation_fusion


@pytest.mark.parametrize("preset", ["tiny-moe", "qwen3-30b-a3b"])
def test_experts_on_a_gpu_need_transformer_engine(world: World, preset: str) -> None:
    from megatron_r1.model.build import model_config

    model = ModelConfig(preset=preset)
    gpu: Any = SimpleNamespace(device=torch.device("cuda"), layout=ParallelConfig())
    with pytest.raises(UserError, match="a model with experts on a GPU needs Transformer Engine, which is not inst"):
        model_config(architecture(model, 96), model, gpu)
    dense = ModelConfig(preset="qwen3-8b")
    assert model_config(architecture(dense, 96), dense, gpu).bias_activation_fusion
