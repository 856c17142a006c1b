"""Which model, in which precision, over which layout of processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PositiveInt, model_validator

from megatron_r1.config.base import Table

Precision = Literal["fp32", "bf16", "fp8-blockwise", "fp8-emulated"]
RecomputeModule = Literal["core_attn", "moe_act", "layernorm", "mla_up_proj", "mlp", "moe", "shared_experts"]
RECOMPUTE_FIELDS = ("recompute_granularity", "recompute_method", "recompute_num_layers", "recompute_modules")


class ModelConfig(Table):
    """`[model]`: an architecture, by preset name or by a Hugging Face config.json."""

    preset: str | None = None
    """Name of a shipped architecture (`megatron-r1 run --help` lists them), e.g. "tiny-moe" or "deepseek-v3"."""
    config: Path | None = None
    """A Hugging Face `config.json` (or its folder) instead of a preset."""
    override: dict[str, Any] = Field(default_factory=dict)
    """Keys of that config.json to replace, e.g. {num_hidden_layers = 4}; unknown ones are refused."""
    precision: Precision = "fp32"
    """Parameter dtype and arithmetic of the linear layers; docs/precision.md compares them. All but fp32 parameters
    keep fp32 master weights in the optimizer. fp8-blockwise: bf16 parameters, DeepSeek-V3's blockwise FP8 in the
    linear layers, by Transformer Engine on Hopper. fp8-emulated: fp32 parameters and the same rounding in plain torch
    on any device, slow, to measure what it does."""
    fp8_scales: Literal["fp32", "power-of-2"] = "fp32"
    """fp8-*: scales of the blocks. fp32 (amax / 448) as in DeepSeek-V3's checkpoints and FP8 rollout servers;
    power-of-2 is Transformer Engine's own default (rounded up, so that scaling is exact)."""
    mtp: bool | None = None
    """Build the multi-token-prediction layers. None: as the architecture's num_nextn_predict_layers says."""
    megatron: dict[str, Any] = Field(default_factory=dict)
    """`[model.megatron]`: any field of Megatron's TransformerConfig, passed through; refused are unknown
    ones, and those that change what the model computes: that follows from its config.json. For memory on GPUs:
    fine_grained_activation_offloading with offload_modules (and min_offloaded_tensor_size), or cpu_offloading with
    cpu_offloading_num_layers (pipeline = 1, no recompute); activation_func_fp8_input_store;
    distribute_saved_activations."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations computed again in the backward pass instead of kept: those of `recompute_modules`, or all but the
    input of every `recompute_layers` layers. Same numbers, less memory, more time (full: about a third)."""
    recompute_modules: list[RecomputeModule] = Field(default_factory=list)
    """recompute = "selective": which. DeepSeek-V3's choice is ["layernorm", "mla_up_proj", "moe_act"]; layernorm and
    moe_act need Transformer Engine (on a CPU: "mlp" or "moe" instead)."""
    recompute_method: Literal["uniform", "block"] = "uniform"
    """recompute = "full": uniform recomputes all layers in units of `recompute_layers`; block recomputes the first
    `recompute_layers` layers of each pipeline stage, one by one, and keeps the others."""
    recompute_layers: PositiveInt | None = None
    """recompute = "full": layers in a unit (uniform), or layers recomputed in a stage (block). None: 1."""

    @model_validator(mode="after")
    def _one_source(self) -> ModelConfig:
        if (self.preset is None) == (self.config is None):
            raise ValueError("give exactly one of `preset` and `config`")
        return self

    @model_validator(mode="after")
    def _recompute(self) -> ModelConfig:
        if (self.recompute == "selective") != bool(self.recompute_modules):
            need = "needs" if self.recompute == "selective" else "takes no"
            raise ValueError(f"recompute = {self.recompute!r} {need} `recompute_modules`")
        if self.recompute_layers is not None and self.recompute != "full":
            raise ValueError(f'recompute = {self.recompute!r} takes no `recompute_layers`; it belongs to "full"')
        if self.recompute_method != "uniform" and self.recompute != "full":
            raise ValueError(f'recompute = {self.recompute!r} takes no `recompute_method`; it belongs to "full"')
        given = [key for key in self.megatron if key in RECOMPUTE_FIELDS]
        if self.recompute != "none" and given:
            raise ValueError(f"recompute = {self.recompute!r} and [model.megatron] {given[0]}: set only one of them")
        return self

    @model_validator(mode="after")
    def _scales(self) -> ModelConfig:
        if self.fp8_scales != "fp32" and not self.precision.startswith("fp8"):
            raise ValueError(
                f'fp8_scales = "{self.fp8_scales}" without effect: precision is "{self.precision}"; set precision = '
                '"fp8-blockwise" or "fp8-emulated", or remove it'
            )
        return self


class TokenizerConfig(Table):
    """`[tokenizer]`: how text becomes token ids."""

    kind: Literal["char", "byte", "huggingface", "sentencepiece"] = "huggingface"
    """char and byte need no file; huggingface takes a folder or tokenizer.json; sentencepiece a .model file."""
    path: Path | None = None
    """The tokenizer's file or folder (huggingface, sentencepiece)."""
    tags: list[str] = Field(default_factory=lambda: ["<think>", "</think>", "<answer>", "</answer>"])
    """char and byte only: strings that are one token each."""
    characters: str = ""
    """char only: further characters of its alphabet, which is newline and printable ASCII. Another text here is another
    vocabulary: checkpoints do not carry over."""

    @model_validator(mode="after")
    def _path(self) -> TokenizerConfig:
        if (self.kind in ("huggingface", "sentencepiece")) != (self.path is not None):
            need = "needs" if self.path is None else "takes no"
            raise ValueError(f"tokenizer kind {self.kind!r} {need} `path`")
        if self.characters and self.kind != "char":
            raise ValueError(f'characters extends the alphabet of kind = "char"; this is {self.kind!r}; remove it')
        return self


class ParallelConfig(Table):
    """`[parallel]`: the layout. World size = tensor x pipeline x context x data; experts divide it anew."""

    tensor: PositiveInt = 1
    """Tensor-parallel size (TP)."""
    sequence: bool = True
    """Sequence parallelism: with tensor > 1, ranks also share the tokens between the tensor-parallel layers. Models
    with experts or multi-head latent attention need it."""
    pipeline: PositiveInt = 1
    """Pipeline-parallel size (PP)."""
    virtual_pipeline: PositiveInt = 1
    """Model chunks a pipeline stage (VPP)."""
    context: PositiveInt = 1
    """Context-parallel size (CP)."""
    expert: PositiveInt = 1
    """Expert-parallel size (EP)."""
    expert_tensor: PositiveInt | None = None
    """Tensor-parallel size inside an expert (ETP). None: 1."""
    dispatcher: Literal["alltoall", "allgather", "flex"] = "alltoall"
    """How tokens reach their experts. allgather: every rank sees all tokens; rows are then padded to the
    longest of the batch, since it needs equal lengths. flex: DeepEP or HybridEP kernels, on GPUs."""
    data: PositiveInt | None = None
    """Data-parallel size. None: whatever the started world leaves, at least what `expert` needs."""
    distributed_optimizer: bool = True
    """Shard fp32 master weights and Adam state over data-parallel ranks."""
    overlap_grad_reduce: bool = False
    """Reduce gradients while the backward pass still runs."""

    @property
    def etp(self) -> int:
        """Expert-tensor-parallel size with its default filled in."""
        return self.expert_tensor or 1

    @property
    def shards_sequence(self) -> bool:
        """Whether tensor-parallel ranks hold different tokens between the tensor-parallel layers."""
        return self.tensor > 1 and self.sequence

    @property
    def model_size(self) -> int:
        """Ranks that hold one copy of the dense weights: TP x PP x CP."""
        return self.tensor * self.pipeline * self.context

    @property
    def world_size(self) -> int:
        """Processes this layout asks for."""
        if self.data is not None:
            return self.model_size * self.data
        experts = self.expert * self.etp * self.pipeline
        return max(self.model_size, experts)
