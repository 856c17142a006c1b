"""Plans whose result is a torch_dist checkpoint: the import of a Hugging Face folder.

The checkpoint is written as Megatron-Core 0.16.1 would under one rank, so any layout can load it: gate and up rows in
chunks of their own, experts stacked, homogeneous layers stacked, an empty `_extra_state` for every linear layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_r1.convert.correspondence import SCALE, Correspondence, Entry
from megatron_r1.convert.formats import torch_dist
from megatron_r1.convert.formats.hf_files import shard_layout
from megatron_r1.convert.formats.names import ALIASES, Spec, Spelling, shard_key, spell
from megatron_r1.convert.plan import (
    HfSource,
    OutputFile,
    Part,
    Plan,
    Target,
    check_coverage,
    check_used,
    one_dtype,
)
from megatron_r1.convert.storage import FP8

SCALES_FILE = "hf/scales.safetensors"
"""Where an import keeps the block scales of an FP8 source, for the export of what training leaves alone."""


@dataclass(frozen=True)
class ImportPlan:
    """A plan, and what the checkpoint's `.metadata` says of it."""

    plan: Plan
    tensors: tuple[torch_dist.PlacedTensor, ...]
    objects: tuple[torch_dist.PlacedObject, ...]


def import_plan(source: HfSource, *, spec: Spec, dtype: str | None, file_bytes: int) -> ImportPlan:
    """The Megatron checkpoint of a Hugging Face one.

    spec: whose names it gets. dtype: a safetensors dtype for all weights but those the table keeps in float32; None:
    as in the source, with BF16 for FP8. Raises UserError where the source does not hold the whole model, and for
    tensors of several dtypes that Megatron stores as one.
    """
    writer = _Writer(file_bytes)
    naming = _Naming(source.table, spec)
    spelled = [(entry, naming.spelling(entry)) for entry in source.table.entries.values()]
    dtypes = _stored_dtypes(source, spelled) if dtype is None else {}
    for entry, where in spelled:
        key_shape = (*where.stack, *entry.shape)
        for rows in _chunks(entry):
            chosen = "F32" if entry.rule.fp32 else dtype or dtypes[where.key]
            target = _chunk(source, entry, where, rows, chosen)
            writer.add(target, key_shape)
    for key in naming.extra_states():
        writer.add_object(key)
    check_used(source)
    files = writer.files()
    if source.quantised:
        files += _scales_file(source)
    return ImportPlan(
        Plan(files, source.dropped, source.equal()), tuple(writer.tensors.values()), tuple(writer.objects)
    )


def _chunks(entry: Entry) -> Iterator[range]:
    """Rows that Megatron stores together."""
    if entry.rule.layout == "gate_up":
        for run in entry.runs:
            yield range(run.megatron_row, run.megatron_row + run.rows)
    else:
        yield range(entry.shape[0])


def _stored_dtypes(source: HfSource, spelled: Sequence[tuple[Entry, Spelling]]) -> dict[str, str]:
    """The one dtype of all that comes to lie under a key: fused projections, stacked layers and experts."""
    found: dict[str, dict[str, str]] = {}
    for entry, where in spelled:
        for name in entry.hf if not entry.rule.fp32 else ():
            stored = source.archive.tensors[name].dtype
            found.setdefault(where.key, {})[name] = "BF16" if stored == FP8 else stored
    return {key: one_dtype(f"{source.archive.folder}: {key}", dtypes) for key, dtypes in found.items()}


def _chunk(source: HfSource, entry: Entry, where: Spelling, rows: range, dtype: str) -> Target:
    pieces = source.megatron_box(entry, rows, range(entry.width or 1))
    at = (*where.lead, rows.start, *((0,) if entry.width is not None else ()))
    shape = (*(1 for _ in where.stack), len(rows), *((entry.width,) if entry.width is not None else ()))
    target = Target(where.key, dtype, shape, pieces, axes=len(where.stack), at=at)
    check_coverage(target)
    return target


class _Naming:
    """The keys of a checkpoint under one layer spec, checked against real ones by the tests of round trips."""

    def __init__(self, table: Correspondence, spec: Spec) -> None:
        self.table, self.spec = table, spec
        dims = table.dims
        self.latent = "kv_rank" in dims
        # Layers that are all alike are stacked; a dense head before layers with experts makes them differ.
        self.layers = None if self.latent else dims["layers"]
        self.experts = dims["experts"]

    def spelling(self, entry: Entry) -> Spelling:
        """Key and place of a tensor."""
        return spell(entry.name, self._fused(entry), self.layers, self.experts)

    def extra_states(self) -> Iterator[str]:
        """Names of the empty objects that a strict load asks for."""
        for entry in self.table.entries.values():
            state = entry.rule.extra_state
            if state == "both" or (state == "te" and self.spec == "te"):
                where = self.spelling(entry)
                yield shard_key(f"{where.key.rpartition('.')[0]}._extra_state", where.lead, where.stack)
            if self.spec == "te" and entry.name.endswith("self_attention.linear_proj.weight"):
                where = self.spelling(entry)
                stem = where.key.removesuffix("linear_proj.weight")
                yield shard_key(f"{stem}core_attention._extra_state", where.lead, where.stack)

    def _fused(self, entry: Entry) -> dict[str, str]:
        """canonical suffix -> alias. Megatron's local spec saves grouped-query models under the fused names too."""
        fused = {canonical: alias for alias, canonical in ALIASES.items()}
        if self.latent:
            fused.pop("input_layernorm.weight")  # the norm before two projections belongs to neither
            if self.spec == "local":
                return {}
        layer = entry.name.partition(".layers.")[2].split(".")[0]
        sparse = entry.name.startswith("mtp.") or (layer.isdigit() and int(layer) >= self.table.dims["dense"])
        if sparse:
            fused.pop("pre_mlp_layernorm.weight")  # the norm before router and experts belongs to neither
        if not self.latent:
            fused = {k: v for k, v in fused.items() if k in ("input_layernorm.weight", "pre_mlp_layernorm.weight")}
        return fused


@dataclass
class _Open:
    name: str
    size: int
    parts: list[Part]


class _Writer:
    """Lays chunks and objects out in files of at most so many bytes."""

    def __init__(self, file_bytes: int) -> None:
        self.file_bytes = file_bytes
        self._files: list[_Open] = []
        self.tensors: dict[str, torch_dist.PlacedTensor] = {}
        self.objects: list[torch_dist.PlacedObject] = []

    def add(self, target: Target, shape: tuple[int, ...]) -> None:
        """A chunk of the tensor of this shape."""
        head, tail = torch_dist.frame(target.dtype, target.shape)
        length = len(head) + target.bytes + len(tail)
        file, start = self._room(length)
        file.parts += [
            Part(start, head),
            Part(start + len(head), target),
            Part(start + len(head) + target.bytes, tail),
        ]
        placed = self.tensors.setdefault(target.name, torch_dist.PlacedTensor(target.name, target.dtype, shape, []))
        assert placed.dtype == target.dtype, f"{target.name} is written as {placed.dtype} and {target.dtype}"
        placed.chunks.append(torch_dist.PlacedChunk(target.at, target.shape, file.name, start, length))

    def add_object(self, key: str) -> None:
        """An empty `_extra_state`."""
        blob = torch_dist.object_blob()
        file, start = self._room(len(blob))
        file.parts.append(Part(start, blob))
        self.objects.append(torch_dist.PlacedObject(key, file.name, start, len(blob)))

    def files(self) -> tuple[OutputFile, ...]:
        """What there is to write."""
        return tuple(OutputFile(file.name, file.size, tuple(file.parts)) for file in self._files)

    def _room(self, length: int) -> tuple[_Open, int]:
        if not self._files or (self._files[-1].size and self._files[-1].size + length > self.file_bytes):
            self._files.append(_Open(f"__0_{len(self._files)}.distcp", 0, []))
        file = self._files[-1]
        start = file.size
        file.size += length
        return file, start


def _scales_file(source: HfSource) -> tuple[OutputFile, ...]:
    """All scales, also of prediction layers that are left out: what is kept says of every FP8 tensor what it had."""
    tensors = source.archive.tensors
    names = [name for name in tensors if name.endswith(SCALE) and tensors[name.removesuffix(SCALE)].dtype == FP8]
    listed = [(name, tensors[name].dtype, tensors[name].shape) for name in names]
    (shard,) = shard_layout(listed, 1 << 62, None)
    targets = {n: Target(n, tensors[n].dtype, tensors[n].shape, source.whole(n)) for n in names}
    parts: Sequence[Part] = [Part(0, shard.header), *(Part(p.at, targets[p.name]) for p in shard.tensors)]
    return (OutputFile(SCALES_FILE, shard.size, tuple(parts)),)
