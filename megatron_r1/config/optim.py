"""Optimizer, learning-rate schedule, checkpoint and sampling tables shared by the stages."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from megatron_r1.config.base import Table


class OptimizerConfig(Table):
    """Adam with fp32 master weights, through Megatron's optimizer."""

    lr: PositiveFloat
    """Peak learning rate."""
    min_lr: NonNegativeFloat = 0.0
    """Floor of a decaying schedule."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Shape of the decay after warm-up. R1's RL schedule is not stated; its SFT uses cosine to lr / 10."""
    warmup_steps: NonNegativeInt = 0
    """Optimizer steps of linear warm-up from 0."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay; not applied to vectors."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.95, ge=0, lt=1)
    eps: PositiveFloat = 1e-8
    clip_grad: NonNegativeFloat = 1.0
    """Largest global L2 norm of the gradient; 0: no clipping."""
    megatron: dict[str, Any] = Field(default_factory=dict)
    """`[stage.optimizer.megatron]`: any other field of Megatron's OptimizerConfig, passed through; unknown ones are
    refused. Dtypes are "fp32", "bf16", "fp16" or "fp8". For memory: optimizer_cpu_offload = true with
    optimizer_offload_fraction (1.0: all of it) and overlap_cpu_optimizer_d2h_h2d; use_precision_aware_optimizer = true
    (Transformer Engine, parallel.distributed_optimizer) with main_grads_dtype, exp_avg_dtype, exp_avg_sq_dtype
    (DeepSeek-V3: moments in bf16)."""

    @model_validator(mode="after")
    def _floor(self) -> OptimizerConfig:
        if self.min_lr > self.lr:
            raise ValueError(
                f"min_lr ({self.min_lr:g}) is the floor of the schedule and must not exceed lr ({self.lr:g})"
            )
        return self


Student = Literal["qwen-1.5b", "qwen-7b", "qwen-14b", "qwen-32b", "llama-8b", "llama-70b"]
STUDENTS: dict[str, float] = {
    "qwen-1.5b": 1e-4,
    "qwen-7b": 8e-5,
    "qwen-14b": 7e-5,
    "qwen-32b": 6e-5,
    "llama-8b": 5e-5,
    "llama-70b": 2e-5,
}
"""The paper's distilled students and their initial learning rates (DeepSeek-R1 v2, appendix B.4.3)."""


class SftOptimizerConfig(OptimizerConfig):
    """Adam of supervised fine-tuning; a key left out keeps the paper's value."""

    lr: PositiveFloat = 5e-5
    """Peak learning rate (the paper: 5e-5; its distilled students 2e-5 to 1e-4)."""
    min_lr: NonNegativeFloat = 5e-6
    """Floor of the schedule. Left out: a tenth of lr, as in the paper."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Shape of the decay after warm-up (the paper: cosine)."""

    @model_validator(mode="before")
    @classmethod
    def _tenth(cls, given: Any) -> Any:
        if isinstance(given, dict) and "min_lr" not in given and isinstance(given.get("lr"), int | float):
            return {**given, "min_lr": given["lr"] / 10}
        return given


class CheckpointConfig(Table):
    """When to save and how much to keep."""

    every: PositiveInt = 100
    """Optimizer steps between two checkpoints; the last step is always saved."""
    keep: PositiveInt = 2
    """Newest checkpoints kept."""


class SamplingConfig(Table):
    """How completions are drawn."""

    temperature: PositiveFloat = 1.0
    """Logits are divided by this. The paper: 1.0 for R1-Zero and stage 1, 0.7 for stage 2, 0.6 in evaluation."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Nucleus: smallest set of tokens whose probability reaches this."""
    top_k: NonNegativeInt = 0
    """Only the k likeliest tokens; 0: all."""
    max_new_tokens: PositiveInt = 32768
    """Longest completion; a longer one is cut with finish reason "length"."""
    stop: list[str] = Field(default_factory=list)
    """Strings that end a completion besides the end-of-sequence token."""
    batch_size: PositiveInt = 256
    """Completions a data-parallel rank decodes at once (memory of the KV cache)."""


class EvalSamplingConfig(SamplingConfig):
    """How completions are drawn in an evaluation; a key left out keeps the paper's evaluation value."""

    temperature: PositiveFloat = 0.6
    """Logits are divided by this (the paper's evaluation: 0.6)."""
    top_p: float = Field(default=0.95, gt=0, le=1)
    """Nucleus: smallest set of tokens whose probability reaches this (the paper's evaluation: 0.95)."""
