"""Plans and inventories as text and JSON: every tensor that is written, scales included, with its place in its file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_r1.convert.conversion import Conversion
from megatron_r1.convert.correspondence import SCALE
from megatron_r1.convert.inspecting import Inventory
from megatron_r1.convert.plan import OutputFile, Target
from megatron_r1.convert.progress import size_text
from megatron_r1.convert.storage import Stored


def plan_lines(conversion: Conversion, workers: int) -> Iterator[str]:
    """A line a tensor: what it is, what happens to it, and the byte ranges that it is made of; then the sums."""
    plan = conversion.plan
    for file in plan.files:
        yield f"{file.name}  {size_text(file.size)}"
        for row in _rows(file):
            place = f" at {list(row.at)}" if row.at else ""
            yield f"  @{row.start} {row.name}{place}  {row.dtype} {list(row.shape)}  {row.operation} <- {row.source}"
    for name in conversion.last:
        yield f"{name}  {size_text(len(conversion.last[name]))}"
    for name, why in sorted(plan.dropped.items()):
        yield f"left out: {name} ({why})"
    for first, second in plan.equal:
        yield f"compared: {second.name} must equal {first.name}"
    tensors = sum(1 for file in plan.files for _ in _rows(file))
    done = ", ".join(f"{name} {size_text(size)}" for name, size in conversion.operations.most_common())
    what = "chunks" if conversion.kind == "import" else "tensors"
    yield f"{tensors} {what} in {len(plan.files)} files, {size_text(plan.bytes)}: {done}"
    memory = conversion.memory(workers)
    yield (
        f"memory: about {size_text(memory['process'] + memory['buffers'])}: {size_text(memory['process'])} for the "
        f"imports and this plan (measured), {size_text(memory['buffers'])} for the buffers of {workers} worker(s)"
    )
    yield from (f"note: {note}" for note in conversion.notes)


def plan_json(conversion: Conversion, workers: int) -> dict[str, Any]:
    """The plan for machines: every file with its tensors and their sources.

    start: byte of the file at which the tensor begins. sources: [file, byte, rows, columns, stride] each. scales: block
    scales that these are multiplied with, kept: those that a quantised tensor keeps where they fit, [name, file, byte].
    `memory`: bytes of this process now and of the buffers of so many workers.
    """
    return {
        "kind": conversion.kind,
        "bytes": conversion.plan.bytes,
        "memory": conversion.memory(workers),
        "files": [
            {
                "name": file.name,
                "bytes": file.size,
                "tensors": [_as_dict(row) for row in _rows(file)],
            }
            for file in conversion.plan.files
        ],
        "last": {name: len(data) for name, data in conversion.last.items()},
        "dropped": dict(conversion.plan.dropped),
        "equal": [[first.name, second.name] for first, second in conversion.plan.equal],
        "notes": list(conversion.notes),
    }


def inventory_lines(inventory: Inventory, *, each: bool, plans: Mapping[str, Any] | None) -> Iterator[str]:
    """The tensors as a table, then the sums."""
    if each:
        rows = [(t.name, "", t.dtype, str(list(t.shape)), size_text(t.bytes)) for t in inventory.tensors.values()]
    else:
        rows = [(n, f"x{c}", d, str(list(s)), size_text(b)) for n, c, d, s, b in inventory.groups()]
    widths = [max((len(row[i]) for row in rows), default=0) for i in range(5)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
    total = inventory.summary()
    kinds = ", ".join(f"{dtype} {size_text(row['bytes'])}" for dtype, row in total["by_dtype"].items())
    counts = f"{total['tensors']:,} tensors, {total['parameters']:,} elements, {total['bytes']:,} bytes"
    yield f"{total['kind']}: {counts} ({kinds})"
    if plans is not None:
        into, back = plans["import"], plans["export"]
        yield f"import can be planned: {into['tensors']:,} Megatron tensors, {size_text(into['bytes'])}"
        yield f"export can be planned: {back['tensors']:,} tensors in {back['files']} files, {size_text(back['bytes'])}"


@dataclass(frozen=True, slots=True)
class _Row:
    """A tensor of a file that is written; scales: the block scales of `target`."""

    start: int
    target: Target
    scales: bool = False

    @property
    def name(self) -> str:
        return self.target.name + SCALE * self.scales

    @property
    def at(self) -> tuple[int, ...]:
        return self.target.at

    @property
    def dtype(self) -> str:
        return "F32" if self.scales else self.target.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.target.scale_shape() if self.scales else self.target.shape

    @property
    def operation(self) -> str:
        return "scales" if self.scales else self.target.operation

    @property
    def source(self) -> str:
        if self.scales:
            return f"the blocks of {self.target.name}"
        used = ", ".join(stored.name for stored in (*_scales_of(self.target), *_kept_of(self.target)))
        return _sources(self.target) + (f" with {used}" if used else "")


def _rows(file: OutputFile) -> Iterator[_Row]:
    """The tensors of a file in the order of their bytes."""
    rows = []
    for part in file.parts:
        if isinstance(part.content, Target):
            rows.append(_Row(part.at, part.content, part.only_scales))
            if part.scale_at is not None:
                rows.append(_Row(part.scale_at, part.content, True))
    return iter(sorted(rows, key=lambda row: row.start))


def _as_dict(row: _Row) -> dict[str, Any]:
    target = row.target
    return {
        "name": row.name,
        "start": row.start,
        "at": list(row.at),
        "dtype": row.dtype,
        "shape": list(row.shape),
        "operation": row.operation,
        "sources": [[p.file, p.start, p.rows, p.cols, p.stride] for p in target.pieces],
        "scales": [_place(stored) for stored in _scales_of(target)],
        "kept": [_place(stored) for stored in _kept_of(target)],
    }


def _scales_of(target: Target) -> list[Stored]:
    """The block scales that a target's pieces are multiplied with, each once."""
    return list({p.scale.stored.name: p.scale.stored for p in target.pieces if p.scale is not None}.values())


def _kept_of(target: Target) -> list[Stored]:
    """The block scales that a quantised target keeps where they fit."""
    return [] if target.quantise is None or target.quantise.kept is None else [target.quantise.kept]


def _place(stored: Stored) -> list[Any]:
    return [stored.name, stored.chunks[0].file, stored.chunks[0].start]


def _sources(target: Target) -> str:
    first = target.pieces[0]
    more = f" and {len(target.pieces) - 1} more" if len(target.pieces) > 1 else ""
    return f"{Path(first.file).name}@{first.start} {first.dtype} {first.rows}x{first.cols}{more}"
