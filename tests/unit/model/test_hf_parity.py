"""The same weights give the same logits here and in transformers: tiny random models of every family."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_r1.config.model import ModelConfig
from megatron_r1.model.presets import Architecture, architecture
from megatron_r1.parallel.world import World
from tests.reference.hf_weights import to_megatron

VOCAB, LENGTH = 96, 40
YARN = dict(
    rope_type="yarn",
    factor=4.0,
    original_max_position_embeddings=16,
    beta_fast=32,
    beta_slow=1,
    mscale=1.0,
    mscale_all_dim=1.0,
)
LLAMA3 = dict(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=8192,
)
DENSE = dict(num_attention_heads=4, num_key_value_heads=2, intermediate_size=112)
V3 = dict(
    num_attention_heads=4,
    num_key_value_heads=4,
    intermediate_size=112,
    moe_intermediate_size=24,
    first_k_dense_replace=1,
    q_lora_rank=32,
    kv_lora_rank=16,
    qk_nope_head_dim=16,
    qk_rope_head_dim=8,
    v_head_dim=12,
    n_routed_experts=16,
    n_shared_experts=2,
    n_group=4,
    topk_group=2,
    num_experts_per_tok=4,
    routed_scaling_factor=2.5,
)
EXPERTS = dict(moe_intermediate_size=24, num_experts=16, num_experts_per_tok=4, mlp_only_layers=[], head_dim=24)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen2": ("Qwen2", DENSE),
    "Qwen2 tied": ("Qwen2", {**DENSE, "tie_word_embeddings": True}),
    "Qwen3": ("Qwen3", {**DENSE, "head_dim": 24}),
    "Qwen3 experts": ("Qwen3Moe", {**DENSE, **EXPERTS, "norm_topk_prob": True}),
    "Qwen3 experts, weights as they are": ("Qwen3Moe", {**DENSE, **EXPERTS, "norm_topk_prob": False}),
    "Llama": ("Llama", DENSE),
    "Llama, other rope base and head width": ("Llama", {**DENSE, "head_dim": 24, "rope_theta": 500000.0}),
    "Llama, llama3 rope": ("Llama", {**DENSE, "rope_scaling": LLAMA3, "max_position_embeddings": 65536}),
    "V3 rope": ("DeepseekV3", V3),
    "V3 yarn": ("DeepseekV3", {**V3, "rope_scaling": YARN}),
    "V3 yarn, mscales differ": ("DeepseekV3", {**V3, "rope_scaling": {**YARN, "mscale": 0.7}}),
    "V3 without query compression": ("DeepseekV3", {**V3, "q_lora_rank": None, "rope_scaling": YARN}),
    "V3 in one group": ("DeepseekV3", {**V3, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 3}),
}


def hf_model(family: str, fields: dict[str, Any]) -> Any:
    """A random transformers model whose norms, biases and router matter."""
    import transformers

    config = getattr(transformers, f"{family}Config")(
        **{
            "vocab_size": VOCAB,
            "hidden_size": 48,
            "num_hidden_layers": 3,
            "max_position_embeddings": 64,
            "rope_theta": 10000.0,
            "rms_norm_eps": 1e-6,
            "initializer_range": 0.2,
            **fields,
        }
    )
    torch.manual_seed(11)
    model = getattr(transformers, f"{family}ForCausalLM")(config).float().eval()
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if name.endswith("e_score_correction_bias"):
                tensor.uniform_(0, 0.3)
            elif name.endswith("bias"):
                tensor.normal_(0, 0.3)
            elif name.endswith("norm.weight"):
                tensor.normal_(1, 0.3)
            elif name.endswith("mlp.gate.weight"):
                tensor.normal_(0, 0.5)
    return model


def our_model(arch: Architecture, path: Path, world: World, source: Any) -> torch.nn.Module:
    """The PolicyModel of this architecture with the weights of `source`, every one of them."""
    from megatron_r1.model.build import build_model

    model = ModelConfig(config=path, mtp=False)
    ours = build_model(arch, model, world)[0].eval()
    latent = arch["model_type"] == "deepseek_v3"
    weights = {k: v for k, v in source.state_dict().items() if "inv_freq" not in k}
    if arch.get("tie_word_embeddings"):
        weights.pop("lm_head.weight", None)
    renamed = to_megatron(weights, arch["num_attention_heads"], arch["num_key_value_heads"], latent)
    target = {k: v for k, v in ours.state_dict().items() if isinstance(v, torch.Tensor)}
    counters = {k for k in target if k.endswith("local_tokens_per_expert")}
    assert renamed.keys() == target.keys() - counters
    with torch.no_grad():
        for name, tensor in target.items():
            if name in renamed:
                assert tensor.shape == renamed[name].shape, name
                tensor.copy_(renamed[name])
    return ours


def pair(world: World, folder: Path, family: str, fields: dict[str, Any]) -> tuple[Any, torch.nn.Module]:
    """A transformers model and ours from the config.json that it writes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = hf_model(family, fields)
    (folder / "config.json").write_text(json.dumps(theirs.config.to_dict()))
    arch = architecture(ModelConfig(config=folder), VOCAB)
    return theirs, our_model(arch, folder, world, theirs)


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(world: World, tmp_path: Path, case: str) -> None:
    theirs, ours = pair(world, tmp_path, *CASES[case])
    tokens = torch.randint(0, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(4))
    positions = torch.arange(LENGTH).expand(2, LENGTH)
    with torch.no_grad():
        expected = theirs(tokens).logits
        found = ours(tokens, positions, None)
    assert expected.std() > 0.1, "the logits say something"
    assert (found - expected).abs().max() < 2e-5


def test_latent_norms_use_the_architecture_s_epsilon(world: World, tmp_path: Path) -> None:
    """As Megatron and the serving engines do; transformers gives these two norms 1e-6 whatever rms_norm_eps says."""
    theirs, ours = pair(world, tmp_path, "DeepseekV3", {**V3, "rms_norm_eps": 1e-3})
    tokens = torch.randint(0, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        found = ours(tokens, torch.arange(LENGTH).expand(2, LENGTH), None)
        assert (found - theirs(tokens).logits).abs().max() > 1e-3
        for name, module in theirs.named_modules():
            if name.endswith(("q_a_layernorm", "kv_a_layernorm")):
                assert module.variance_epsilon == 1e-6
                module.variance_epsilon = 1e-3
        assert (found - theirs(tokens).logits).abs().max() < 2e-5


def test_the_published_spelling_of_a_config_gives_the_same_model(world: World, tmp_path: Path) -> None:
    """`rope_theta` and `rope_scaling` with `type`, as in released files, against transformers 5's rope_parameters."""
    for case, old in (
        ("V3 yarn", {"rope_theta": 10000.0, "rope_scaling": {**YARN, "type": YARN["rope_type"]}}),
        ("Llama, llama3 rope", {"rope_theta": 10000.0, "rope_scaling": LLAMA3}),
        ("Qwen3", {"rope_theta": 10000.0, "rope_scaling": None}),
        ("Qwen3 experts", {"rope_theta": 10000.0, "rope_scaling": None, "num_experts": 16}),
    ):
        config = pair(world, tmp_path, *CASES[case])[0].config.to_dict()
        new = architecture(ModelConfig(config=tmp_path), VOCAB)
        assert config.pop("rope_parameters")["rope_theta"] == 10000.0
        (tmp_path / "config.json").write_text(json.dumps({**config, **old}))
        assert architecture(ModelConfig(config=tmp_path), VOCAB) == new
