"""The spellings of Megatron's tensor names, and the one that this room uses.

Canonical names are those of the local layer spec with every layer and expert spelled out, for example
`decoder.layers.3.mlp.experts.17.linear_fc1.weight`. Checkpoints differ from them in four ways:

* Transformer Engine fuses a norm into the linear layer behind it and names it after that layer;
* torch_dist checkpoints of homogeneous models stack the layers along a leading axis, and always the experts;
* a run with `singleton_local_shards` writes the two halves of a gated layer under `_w` and `_v`;
* newer versions call the layer inside multi-token prediction `mtp_model_layer`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal

from megatron_r1.convert.storage import Stored

Spec = Literal["te", "local"]
"""Whose layer spec names the tensors of a checkpoint that is written: Transformer Engine's, or Megatron's own."""

ALIASES = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "self_attention.linear_q_up_proj.layer_norm_weight": "self_attention.q_layernorm.weight",
    "self_attention.linear_kv_up_proj.layer_norm_weight": "self_attention.kv_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}
"""Transformer Engine's name of a fused norm -> the canonical one."""

_EXPERTS = (
    re.compile(r"^mlp\.experts\.experts\.(?P<expert>\d+\.)?(?P<rest>.+)$"),
    re.compile(r"^mlp\.experts\.local_experts\.(?P<expert>\d+\.)(?P<rest>.+)$"),
    re.compile(r"^mlp\.experts\.(?P<rest>linear_fc[12]\.weight)(?P<expert>\d+)$"),
)
_LAYER = re.compile(
    r"^(?P<block>decoder|mtp)\.layers\.(?:(?P<layer>\d+)\.)?(?P<inner>transformer_layer\.|mtp_model_layer\.)?(?P<rest>.+)$"
)
_HALF = re.compile(r"^(?P<name>.*linear_fc1\.weight)_(?P<half>[wv])$")
MODEL = ("embedding.", "decoder.", "output_layer.", "mtp.")
"""How the names of a model's own tensors begin; others belong to the optimizer, the generators, a KL reference."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a canonical tensor is in a checkpoint: index `lead` of the stored tensor's leading axes; half: the gate
    (0) or up (1) rows only.
    """

    stored: Stored
    lead: tuple[int, ...]
    half: int | None = None


def canonical_suffix(name: str) -> str:
    """The canonical spelling of a name inside a layer, where experts have been spelled out already."""
    return ALIASES.get(name, name)


@dataclass(frozen=True, slots=True)
class Parsed:
    """A stored key taken apart. axes: how many leading axes of the tensor are stacked layers or experts."""

    template: str  # the canonical name with {} for every stacked index, and its own braces doubled
    axes: int
    half: int | None

    def canonical(self, lead: Sequence[int]) -> str:
        """The canonical name of one element along the stacked axes."""
        return self.template.format(*lead)


def parse(key: str) -> Parsed:
    """The canonical spelling of a key of a torch_dist checkpoint or of Megatron-Core's sharded state."""
    half = None
    key = key.replace("{", "{{").replace("}", "}}")  # a foreign key can hold any character
    if match := _HALF.match(key):
        key, half = match["name"], "wv".index(match["half"])
    match = _LAYER.match(key)
    if match is None:
        return Parsed(key, 0, half)
    rest, stacked_experts = match["rest"], False
    for pattern in _EXPERTS:
        if found := pattern.match(rest):
            stacked_experts = found["expert"] is None
            expert = "{}" if stacked_experts else found["expert"].rstrip(".")
            rest = f"mlp.experts.{expert}.{found['rest']}"
            break
    else:
        rest = canonical_suffix(rest)
    inner = "transformer_layer." if match["inner"] else ""
    template = f"{match['block']}.layers.{match['layer'] or '{}'}.{inner}{rest}"
    return Parsed(template, (match["layer"] is None) + stacked_experts, half)


def places(stored: Stored) -> Iterator[tuple[str, Place]]:
    """(canonical name, place) of everything that one stored tensor holds: an element of stacked layers and experts."""
    parsed = parse(stored.name)
    for lead in product(*(range(size) for size in stored.shape[: parsed.axes])):
        yield parsed.canonical(lead), Place(stored, lead, parsed.half)


@dataclass(frozen=True, slots=True)
class Spelling:
    """How a written checkpoint names a tensor: its key, and its place along stacked axes of these sizes."""

    key: str
    lead: tuple[int, ...]
    stack: tuple[int, ...]


def spell(name: str, fused: Mapping[str, str], layers: int | None, experts: int) -> Spelling:
    """The key of a canonical name in a torch_dist checkpoint.

    fused: canonical suffix -> alias, for the norms that this model's linear layers have fused. layers: decoder layers
    are stacked, so many of them; None: they are not.
    """
    match = _LAYER.match(name)
    if match is None:
        return Spelling(name, (), ())
    rest, lead, stack = match["rest"], [], []
    number = f"{match['layer']}."
    if layers is not None and match["block"] == "decoder":
        lead, stack, number = [int(match["layer"])], [layers], ""
    parts = rest.split(".")
    if parts[:2] == ["mlp", "experts"]:
        lead, stack = [*lead, int(parts[2])], [*stack, experts]
        rest = ".".join(["mlp", "experts", "experts", *parts[3:]])
    else:
        rest = fused.get(rest, rest)
    return Spelling(f"{match['block']}.layers.{number}{match['inner'] or ''}{rest}", tuple(lead), tuple(stack))


def shard_key(key: str, lead: Sequence[int], stack: Sequence[int]) -> str:
    """The name of a ShardedObject (an `_extra_state`) at this place, as Megatron-Core 0.16.1 builds it."""
    offsets, sizes = (lead, stack) if stack else ((0,), (1,))
    return f"{key}/shard_{'.'.join(map(str, offsets))}_{'.'.join(map(str, sizes))}"
