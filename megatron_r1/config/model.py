"""Which model, in which precision, over which layout of processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PositiveInt, model_validator

from megatron_r1.config.base import Table


class ModelConfig(Table):
    """`[model]`: an architecture, by preset name or by a Hugging Face config.json."""

    preset: str | None = None
    """Name of a shipped architecture (`megatron-r1 run --help` lists them), e.g. "tiny-moe" or "deepseek-v3"."""
    config: Path | None = None
    """A Hugging Face `config.json` (or its folder) instead of a preset."""
    override: dict[str, Any] = Field(default_factory=dict)
    """Keys of that config.json to replace, e.g. {num_hidden_layers = 4}; unknown ones are refused."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Parameter dtype. bf16 keeps fp32 master weights in the optimizer."""
    mtp: bool | None = None
    """Build the multi-token-prediction layers. None: as the architecture's num_nextn_predict_layers says."""
    megatron: dict[str, Any] = Field(default_factory=dict)
    """`[model.megatron]`: any field of Megatron's TransformerConfig, passed through; unknown ones are refused."""

    @model_validator(mode="after")
    def _one_source(self) -> ModelConfig:
        if (self.preset is None) == (self.config is None):
            raise ValueError("give exactly one of `preset` and `config`")
        return self


class TokenizerConfig(Table):
    """`[tokenizer]`: how text becomes token ids."""

    kind: Literal["char", "byte", "huggingface", "sentencepiece"] = "huggingface"
    """char and byte need no file; huggingface takes a folder or tokenizer.json; sentencepiece a .model file."""
    path: Path | None = None
    """The tokenizer's file or folder (huggingface, sentencepiece)."""
    tags: list[str] = Field(default_factory=lambda: ["<think>", "</think>", "<answer>", "</answer>"])
    """char and byte only: strings that are one token each."""

    @model_validator(mode="after")
    def _path(self) -> TokenizerConfig:
        if (self.kind in ("huggingface", "sentencepiece")) != (self.path is not None):
            need = "needs" if self.path is None else "takes no"
            raise ValueError(f"tokenizer kind {self.kind!r} {need} `path`")
        return self


class ParallelConfig(Table):
    """`[parallel]`: the layout. World size = tensor x pipeline x context x data; experts divide it anew."""

    tensor: PositiveInt = 1
    """Tensor-parallel size (TP). Sequence parallelism is on whenever it is above 1."""
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
