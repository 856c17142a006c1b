"""Plans whose result is a Hugging Face folder: export from Megatron, and casts between FP8 and other dtypes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_r1.config.errors import UserError
from megatron_r1.convert.correspondence import SCALE, Correspondence
from megatron_r1.convert.formats.hf_files import ShardFile, shard_layout
from megatron_r1.convert.origin import Origin
from megatron_r1.convert.plan import (
    WEIGHTS,
    HfSource,
    MegatronSource,
    OutputFile,
    Part,
    Piece,
    Plan,
    Quantise,
    Target,
    check_coverage,
    check_used,
)
from megatron_r1.convert.storage import FP8
from megatron_r1.convert.tables.rule import Rule

DTYPES = {"bf16": "BF16", "fp16": "F16", "fp32": "F32", "fp8": FP8}
Scales = Literal["fp32", "power-of-2"]


@dataclass(frozen=True)
class HfPlan:
    """A plan, and the shards that its files are."""

    plan: Plan
    shards: tuple[ShardFile, ...]


def export_plan(
    source: MegatronSource, origin: Origin, *, dtype: str | None, scales: Scales, shard_bytes: int
) -> HfPlan:
    """The Hugging Face checkpoint of a Megatron one.

    dtype: a key of DTYPES; None: every tensor as the origin has it, else as its config.json says, else as stored.
    Blocks of FP8 tensors that still fit the origin's scales keep them (`fp8.py`), so what training left alone comes
    out as it came in; not where `scales` are of the other format than the origin's, which config.json then says of all.
    Raises UserError where the checkpoint does not hold the whole model.
    """
    table = source.table
    usual = origin.dtype

    def dtype_of(name: str, rule: Rule) -> str:
        if dtype is None and name in origin.dtypes:
            if (had := origin.dtypes[name]) not in (*WEIGHTS, FP8):
                raise UserError(f"{origin.folder}: {name} is {had} there, which is not written; choose --dtype")
            return had
        return dtype_in(rule, DTYPES[dtype] if dtype else usual or source.dtype(name))

    names = [*table.hf, *origin.copies(table)]
    targets = _targets(table, names, source.hf_tensor, dtype_of, origin, scales)
    check_used(source)
    return _plan(targets, source.dropped, shard_bytes, origin.weight_map)


def cast_plan(source: HfSource, origin: Origin, *, dtype: str, scales: Scales, shard_bytes: int) -> HfPlan:
    """The same Hugging Face checkpoint in another dtype (a key of DTYPES). With fp8, the tensors that are not
    quantised become BF16 whatever they were, as in DeepSeek's checkpoints; float32 ones of the table stay so always.

    Raises UserError where there is nothing to do.
    """
    table, tensors = source.table, source.archive.tensors
    if dtype == "fp8" and source.quantised:
        raise UserError(f"{source.archive.folder} is FP8 already; cast it to bf16, or export it with other scales")

    names = table.names_in(tensors)
    targets = _targets(table, names, source.whole, lambda _, rule: dtype_in(rule, DTYPES[dtype]), origin, scales)
    if all(target.operation == "copy" for target in targets):
        raise UserError(f"{source.archive.folder} is {dtype} already: there is nothing to cast")
    check_used(source)
    return _plan(targets, source.dropped, shard_bytes, None)


def dtype_in(rule: Rule, wanted: str) -> str:
    """The dtype of a rule's tensors in a checkpoint of this dtype: not all are quantised, some stay float32."""
    if rule.fp32:
        return "F32"
    return "BF16" if wanted == FP8 and not rule.fp8 else wanted


def _targets(
    table: Correspondence,
    names: Sequence[str],
    pieces: Callable[[str], tuple[Piece, ...]],
    dtype_of: Callable[[str, Rule], str],
    origin: Origin,
    scales: Scales,
) -> list[Target]:
    targets = []
    for name in names:
        dtype = dtype_of(name, table.rule(name))
        quantise = Quantise(scales, origin.kept_scale(name, scales)) if dtype == FP8 else None
        target = Target(name, dtype, table.hf_shape(name), pieces(name), quantise)
        check_coverage(target)
        targets.append(target)
    return targets


def _plan(
    targets: Sequence[Target], dropped: Mapping[str, str], shard_bytes: int, weight_map: Mapping[str, str] | None
) -> HfPlan:
    listed: list[tuple[str, str, tuple[int, ...]]] = []
    for target in targets:
        listed.append((target.name, target.dtype, target.shape))
        if target.quantise is not None:
            listed.append((target.name + SCALE, "F32", target.scale_shape()))
    by_name = {target.name: target for target in targets}
    shards = shard_layout(listed, shard_bytes, weight_map)
    files = []
    for shard in shards:
        at = {placed.name: placed.at for placed in shard.tensors}
        parts = [Part(0, shard.header)]
        for name, place in at.items():
            if name in by_name:
                parts.append(Part(place, by_name[name], at.get(name + SCALE)))
            elif (owner := name.removesuffix(SCALE)) not in at:
                parts.append(Part(place, by_name[owner], only_scales=True))
        files.append(OutputFile(shard.name, shard.size, tuple(parts)))
    return HfPlan(Plan(tuple(files), dropped), tuple(shards))
