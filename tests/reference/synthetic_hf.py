"""Small random Hugging Face checkpoints, laid out as released ones are, for the tests of conversion.

Weights and names come from transformers' own models and `save_pretrained`; the layer for multi-token prediction, which
transformers does not know, is an additional decoder layer with DeepSeek-V3's names. FP8 is the slow reference's, with
scales a little larger than a fresh quantisation would choose, so that a lost one shows.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file

from megatron_r1.model.block_fp8 import quantise

YARN = {
    "type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
COMMON: dict[str, Any] = {
    "vocab_size": 500,
    "hidden_size": 256,
    "intermediate_size": 320,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 256,
    "initializer_range": 0.06,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "tie_word_embeddings": False,
    "use_cache": True,
}
DEEPSEEK_V3: dict[str, Any] = {
    **COMMON,
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "attention_bias": False,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 192,
    "kv_lora_rank": 128,
    "qk_rope_head_dim": 16,  # with kv_lora_rank 144 rows: a partial block, as the 576 rows of the released model
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "rope_scaling": YARN,
    "num_hidden_layers": 2,
    "num_nextn_predict_layers": 1,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "moe_intermediate_size": 160,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "n_group": 4,
    "topk_group": 2,
    "num_experts_per_tok": 4,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "ep_size": 1,
}
QWEN2: dict[str, Any] = {
    **COMMON,
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "max_window_layers": 3,
    "sliding_window": None,
    "use_sliding_window": False,
}
QWEN3: dict[str, Any] = {
    **QWEN2,
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "attention_bias": False,
    "head_dim": 48,  # not hidden_size / heads
    "rope_theta": 1000000,
}
LLAMA: dict[str, Any] = {
    **COMMON,
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "attention_bias": False,
    "mlp_bias": False,
    "pretraining_tp": 1,
    "rope_theta": 500000.0,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "deepseek_v3": DEEPSEEK_V3,
    "qwen2": QWEN2,
    "qwen2-tied": {**QWEN2, "tie_word_embeddings": True},
    "qwen3": QWEN3,
    "qwen3_moe": {
        **QWEN3,
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "moe_intermediate_size": 96,
        "norm_topk_prob": True,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
    },
    "llama": LLAMA,
    "llama-tied": {**LLAMA, "tie_word_embeddings": True},
}
"""What config.json holds, in the spelling of released models; torch_dtype and quantization_config come with writing."""

UNQUANTISED = ("embed_tokens", "lm_head", "shared_head.head", "mlp.gate", "eh_proj")


def write_family(
    folder: Path,
    family: str,
    *,
    seed: int = 0,
    fp8: bool | Literal["ue8m0"] = False,
    shards: int = 2,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Write a checkpoint of one of FAMILIES with a tokenizer and generation_config.json.

    Args:
        folder: made if it is not there.
        family: a key of FAMILIES.
        seed: of the weights; this process's own random state is left alone.
        fp8: weights of linear layers as E4M3 with float32 scales per 128x128 block; "ue8m0": scales are powers of 2.
        shards: of equal size, cut anywhere, so that a weight and its scales may be in two; one has no index.
        dtype: of all other tensors but `e_score_correction_bias`, which is float32 as in released models.
    """
    config = FAMILIES[family]
    tensors = {name: value.to(_dtype(name, dtype)) for name, value in random_weights(config, seed).items()}
    written = {**config, "torch_dtype": str(dtype).removeprefix("torch."), "transformers_version": "4.51.0"}
    if fp8:
        tensors = quantised(tensors, power_of_2=fp8 == "ue8m0", factor=2.0 if fp8 == "ue8m0" else 1.003)
        written["quantization_config"] = {
            **{"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]},
            **({"scale_fmt": "ue8m0"} if fp8 == "ue8m0" else {}),
        }
    folder.mkdir(parents=True, exist_ok=True)
    write_shards(folder, tensors, shards)
    _write_json(folder / "config.json", written)
    generation = {"bos_token_id": 0, "eos_token_id": 1, "do_sample": True, "temperature": 0.6, "top_p": 0.95}
    _write_json(folder / "generation_config.json", generation)
    write_tokenizer(folder, config["vocab_size"])


def random_weights(config: dict[str, Any], seed: int) -> dict[str, torch.Tensor]:
    """float32 weights under their names on the hub; norms, biases and routers are random too."""
    from transformers import AutoConfig, AutoModelForCausalLM

    predicting = config.get("num_nextn_predict_layers", 0)
    layers = config["num_hidden_layers"]
    fields = {**config, "num_hidden_layers": layers + predicting}
    with torch.random.fork_rng(devices=[]), torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(seed)
        kind = fields.pop("model_type")
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **fields)).float()
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            perturb(name, tensor)
        model.save_pretrained(folder)
        weights = {k: v for file in sorted(Path(folder).glob("*.safetensors")) for k, v in load_file(file).items()}
        for layer in range(layers, layers + predicting):
            weights |= prediction_tensors(f"model.layers.{layer}", weights, config["hidden_size"])
    return weights


def perturb(name: str, tensor: torch.Tensor) -> None:
    """Make what transformers sets to 0 or 1 matter, in place."""
    if name.endswith("e_score_correction_bias"):
        tensor.uniform_(0, 0.3)
    elif name.endswith("bias"):
        tensor.normal_(0, 0.3)
    elif name.endswith("norm.weight"):
        tensor.normal_(1, 0.3)
    elif name.endswith("mlp.gate.weight"):
        tensor.normal_(0, 0.5)


def prediction_tensors(prefix: str, weights: dict[str, torch.Tensor], hidden: int) -> dict[str, torch.Tensor]:
    """What a layer for multi-token prediction has besides a decoder layer; embedding and head are the model's again."""
    return {
        f"{prefix}.embed_tokens.weight": weights["model.embed_tokens.weight"].clone(),
        f"{prefix}.shared_head.head.weight": weights["lm_head.weight"].clone(),
        f"{prefix}.shared_head.norm.weight": torch.empty(hidden).normal_(1, 0.3),
        f"{prefix}.enorm.weight": torch.empty(hidden).normal_(1, 0.3),
        f"{prefix}.hnorm.weight": torch.empty(hidden).normal_(1, 0.3),
        f"{prefix}.eh_proj.weight": torch.empty(hidden, 2 * hidden).normal_(0, 0.06),
    }


def quantised(tensors: dict[str, torch.Tensor], *, power_of_2: bool, factor: float = 1.0) -> dict[str, torch.Tensor]:
    """The weights of linear layers as float8_e4m3fn, each followed by its float32 `_scale_inv`.

    factor: above 1, scales are so many times what the largest value of their block asks for.
    """
    result: dict[str, torch.Tensor] = {}
    for name, value in tensors.items():
        if (
            value.dim() == 2
            and name.endswith(".weight")
            and not name.endswith(tuple(f"{n}.weight" for n in UNQUANTISED))
        ):
            codes, scale = quantise(value, (128, 128), "power-of-2" if power_of_2 else "fp32")
            if factor != 1.0:
                scale = scale * factor
                spread = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[: value.shape[0], : value.shape[1]]
                codes = (value.float() / spread).to(torch.float8_e4m3fn)
            result |= {name: codes.contiguous(), f"{name}_scale_inv": scale}
        else:
            result[name] = value
    return result


def write_shards(folder: Path, tensors: dict[str, torch.Tensor], shards: int) -> None:
    """model.safetensors, or that many numbered ones of about the same size with model.safetensors.index.json."""
    names = sorted(tensors)
    total = sum(tensors[name].nbytes for name in names)
    if shards == 1:
        _save(folder / "model.safetensors", tensors, names)
        return
    parts: list[list[str]] = [[] for _ in range(shards)]
    before = 0
    for name in names:
        parts[min(shards - 1, before * shards // total)].append(name)
        before += tensors[name].nbytes
    index = {}
    for number, part in enumerate(parts, 1):
        file = f"model-{number:05d}-of-{shards:05d}.safetensors"
        _save(folder / file, tensors, part)
        index.update(dict.fromkeys(part, file))
    _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": index})


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """A tokenizer of words w0, w1, ... that transformers loads, and its settings with a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {"<s>": 0, "</s>": 1, "<unk>": 2, **{f"w{i}": i for i in range(3, vocab_size)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    template = "{% for message in messages %}{{ message['content'] }}</s>{% endfor %}"
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    settings = {**special, "tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template}
    _write_json(folder / "tokenizer_config.json", settings)


def _dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if name.endswith("e_score_correction_bias") else dtype


def _save(path: Path, tensors: dict[str, torch.Tensor], names: Iterable[str]) -> None:
    save_file({name: tensors[name].contiguous() for name in names}, path, metadata={"format": "pt"})


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
