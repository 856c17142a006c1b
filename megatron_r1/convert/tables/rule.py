"""What a conversion table is made of: rows that run both ways.

A rule says which Hugging Face tensors lie in which rows of one Megatron tensor. Every correspondence between the two
formats, fused projections included, is an exchange of row ranges: columns are never permuted. So one rule serves
import, export, loading into a live model and the synchronisation of weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Layout = Literal["whole", "gate_up", "qkv"]
"""How the rows of the Hugging Face tensors lie in Megatron's: whole, one tensor; gate_up, one under the other; qkv, for
every key-value group its query heads, its key, its value."""
Split = Literal["column", "row", "vocab", "gate_up", "none"]
"""How tensor parallelism divides the Megatron tensor: column, vocab: its rows; row: its columns; gate_up: the rows of
each half; none: every rank has it all."""
ExtraState = Literal["both", "te", "no"]
"""In which layer specs a linear layer has an `_extra_state` object in a checkpoint."""
Dims = Mapping[str, int]
"""Sizes of an architecture by the names that rules use; a condition is 1 or 0."""


@dataclass(frozen=True, slots=True)
class Rule:
    """One Megatron tensor and the Hugging Face tensors in its rows.

    megatron, hf: names inside their scope (see `Family`). rows: a name of `Dims` for each Hugging Face tensor.
    width: a name of `Dims`; None for a vector. fp8: quantised in an FP8 checkpoint. fp32: float32 whatever the dtype
    of the model. when: a name of `Dims`; the rule holds where that is not 0. vocabulary: rows beyond the model's
    vocabulary may follow in Megatron. extra_state: see there.
    """

    megatron: str
    hf: tuple[str, ...]
    rows: tuple[str, ...]
    width: str | None = None
    layout: Layout = "whole"
    split: Split = "none"
    fp8: bool = False
    fp32: bool = False
    when: str | None = None
    extra_state: ExtraState = "no"

    @property
    def vocabulary(self) -> bool:
        """Whether Megatron may pad its rows."""
        return self.split == "vocab"


@dataclass(frozen=True, slots=True)
class Family:
    """The table of one `model_type`.

    outer: names as they are. layer: below `model.layers.{layer}.` and `decoder.layers.{layer}.`, all layers;
    dense, moe: only layers without or with experts; expert: below `mlp.experts.{expert}.` of both.
    prediction: extras of a multi-token-prediction layer, which Hugging Face counts on after the decoder's layers.
    copies: Hugging Face names inside such a layer -> the outer tensor that they repeat.
    dropped: regular expressions of Hugging Face names that hold nothing -> why.
    """

    name: str
    dims: Callable[[Mapping[str, Any]], dict[str, int]]
    outer: tuple[Rule, ...]
    layer: tuple[Rule, ...]
    dense: tuple[Rule, ...] = ()
    moe: tuple[Rule, ...] = ()
    expert: tuple[Rule, ...] = ()
    prediction: tuple[Rule, ...] = ()
    copies: Mapping[str, str] = field(default_factory=dict)
    dropped: Mapping[str, str] = field(default_factory=dict)
