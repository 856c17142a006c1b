"""The two key lists of an architecture and what connects them: a table, filled in for one config.json.

Everything that converts goes through here: import and export (`plan.py`), loading a Hugging Face folder into a running
model (`load.py`), and the key lists that `inspect` prints. No weights, no torch.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from megatron_r1.config.errors import UserError
from megatron_r1.convert.tables import FAMILIES
from megatron_r1.convert.tables.rule import Dims, Family, Rule, Split

SCALE = "_scale_inv"
"""Suffix of the tensor with the block scales of an FP8 tensor."""
_HEAD = "lm_head.weight"


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive rows that lie together on both sides."""

    tensor: int  # which of the rule's Hugging Face tensors
    hf_row: int
    megatron_row: int
    rows: int


@dataclass(frozen=True, slots=True)
class Entry:
    """One Megatron tensor and its Hugging Face tensors, all names spelled out."""

    name: str  # canonical Megatron name (`names.py`)
    hf: tuple[str, ...]
    rows: tuple[int, ...]  # of each Hugging Face tensor
    width: int | None  # None: vectors
    runs: tuple[Run, ...]
    rule: Rule

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the Megatron tensor."""
        return self._shape(sum(self.rows))

    def hf_shape(self, tensor: int) -> tuple[int, ...]:
        """Shape of one of the Hugging Face tensors."""
        return self._shape(self.rows[tensor])

    def _shape(self, rows: int) -> tuple[int, ...]:
        return (rows,) if self.width is None else (rows, self.width)


class Correspondence:
    """Every tensor of a model under both names.

    entries: canonical Megatron name -> Entry, in the order of the model. hf: Hugging Face name -> (Entry, which of its
    tensors). copies: Hugging Face names that repeat another tensor -> that tensor's name; a checkpoint of Megatron has
    them once. optional: copies that most checkpoints do not have: a head that is tied to the embedding.
    """

    def __init__(self, arch: Mapping[str, Any], *, predictions: bool = True) -> None:
        """predictions: with the multi-token-prediction layers that config.json names; False: without them.

        Raises UserError for a family without a table.
        """
        name = arch.get("model_type")
        if name not in FAMILIES:
            raise UserError(f"model_type {name!r} has no conversion table; there are {', '.join(sorted(FAMILIES))}")
        self.family: Family = FAMILIES[name]
        self.dims: Dims = self.family.dims(arch)
        self.arch = arch
        self.predictions = self.dims["predictions"] if predictions else 0
        self.entries: dict[str, Entry] = {entry.name: entry for entry in self._expand()}
        self.hf: dict[str, tuple[Entry, int]] = {
            name: (entry, i) for entry in self.entries.values() for i, name in enumerate(entry.hf)
        }
        self.copies: dict[str, str] = {
            f"model.layers.{layer}.{name}": self._outer(of)
            for layer in self._prediction_layers(self.predictions)
            for name, of in self.family.copies.items()
        }
        self.optional: frozenset[str] = frozenset(() if self.dims["untied"] else (_HEAD,))
        self.copies |= {name: self._outer(name) for name in self.optional}
        self._dropped = [(re.compile(pattern), why) for pattern, why in self.family.dropped.items()]

    @cached_property
    def hf_names(self) -> tuple[str, ...]:
        """Names of a Hugging Face checkpoint of this model, without scales and optional ones, in the model's order."""
        return (*self.hf, *(name for name in self.copies if name not in self.optional))

    def names_in(self, tensors: Container[str]) -> list[str]:
        """Those names, and optional ones, that are among `tensors`."""
        return [name for name in (*self.hf_names, *self.optional) if name in tensors]

    def hf_shape(self, name: str) -> tuple[int, ...]:
        """Shape of a Hugging Face tensor."""
        entry, i = self.hf[self.copies.get(name, name)]
        return entry.hf_shape(i)

    def rule(self, name: str) -> Rule:
        """The rule of a Hugging Face name."""
        return self.hf[self.copies.get(name, name)][0].rule

    def split(self, name: str) -> Split:
        """How tensor parallelism divides a Megatron tensor, by canonical name; one that is not of this model: not."""
        entry = self.entries.get(name)
        return "none" if entry is None else entry.rule.split

    def unquantised_modules(self) -> list[str]:
        """Linear modules that an FP8 checkpoint of this model keeps in higher precision."""
        names = [name for name in self.hf_names if self.rule(name).width is not None and not self.rule(name).fp8]
        return [name.removesuffix(".weight") for name in names if not name.endswith("embed_tokens.weight")]

    def may_be_missing(self, name: str) -> bool:
        """Whether a checkpoint may leave this tensor out: it is a copy."""
        return name in self.copies

    def of_prediction(self, name: str) -> bool:
        """Whether a tensor, by either name, is of a multi-token-prediction layer, also where they are left out."""
        layers = self._prediction_layers(self.dims["predictions"])
        return name.startswith(("mtp.", *(f"model.layers.{layer}." for layer in layers)))

    def drop_reason(self, name: str) -> str | None:
        """Why a Hugging Face tensor that is not of this model is not needed; None: there is no reason."""
        if not self.predictions and self.of_prediction(name):
            return "multi-token prediction is left out"
        return next((why for pattern, why in self._dropped if pattern.fullmatch(name)), None)

    def _outer(self, name: str) -> str:
        """A tied head's copies repeat the embedding."""
        return "model.embed_tokens.weight" if name == _HEAD and not self.dims["untied"] else name

    def _prediction_layers(self, number: int) -> range:
        return range(self.dims["layers"], self.dims["layers"] + number)

    def _expand(self) -> Iterator[Entry]:
        dims, family = self.dims, self.family
        runs: dict[int, tuple[tuple[int, ...], int | None, tuple[Run, ...]]] = {}  # computed once a rule

        def entries(rules: tuple[Rule, ...], megatron: str, hf: str) -> Iterator[Entry]:
            for rule in rules:
                if rule.when is None or dims[rule.when]:
                    if id(rule) not in runs:
                        runs[id(rule)] = self._runs(rule)
                    yield Entry(f"{megatron}{rule.megatron}", tuple(hf + n for n in rule.hf), *runs[id(rule)], rule)

        def layer(index: int, megatron: str, hf: str) -> Iterator[Entry]:
            yield from entries(family.layer, megatron, hf)
            if index < dims["dense"]:
                yield from entries(family.dense, megatron, hf)
                return
            yield from entries(family.moe, megatron, hf)
            for e in range(dims["experts"]):
                yield from entries(family.expert, f"{megatron}mlp.experts.{e}.", f"{hf}mlp.experts.{e}.")

        head, *rest = family.outer
        yield from entries((head,), "", "")
        for i in range(dims["layers"]):
            yield from layer(i, f"decoder.layers.{i}.", f"model.layers.{i}.")
        yield from entries(tuple(rest), "", "")
        for depth, i in enumerate(self._prediction_layers(self.predictions)):
            megatron, hf = f"mtp.layers.{depth}.", f"model.layers.{i}."
            yield from entries(family.prediction, megatron, hf)
            yield from layer(i, f"{megatron}transformer_layer.", hf)

    def _runs(self, rule: Rule) -> tuple[tuple[int, ...], int | None, tuple[Run, ...]]:
        rows = tuple(self.dims[name] for name in rule.rows)
        width = None if rule.width is None else self.dims[rule.width]
        if rule.layout == "qkv":
            groups = self.dims["groups"]
            heights = [n // groups for n in rows]
            block = sum(heights)
            runs = tuple(
                Run(i, g * heights[i], g * block + sum(heights[:i]), heights[i])
                for g in range(groups)
                for i in range(len(rows))
            )
        else:
            runs = tuple(Run(i, 0, sum(rows[:i]), n) for i, n in enumerate(rows))
        return rows, width, runs
