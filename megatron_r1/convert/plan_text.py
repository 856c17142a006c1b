"""Plans and inventories as text and JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_r1.convert.conversion import Conversion
from megatron_r1.convert.inspecting import Inventory
from megatron_r1.convert.plan import Target


def plan_lines(conversion: Conversion, workers: int) -> Iterator[str]:
    """A line a tensor: what it is, what happens to it, and the byte ranges that it is made of; then the sums."""
    plan = conversion.plan
    for file in plan.files:
        yield f"{file.name}  {_size(file.size)}"
        for target in file.targets:
            yield f"  {target.name}  {target.dtype} {list(target.shape)}  {target.operation} <- {_sources(target)}"
    for name in conversion.last:
        yield f"{name}  {_size(len(conversion.last[name]))}"
    for name, why in sorted(plan.dropped.items()):
        yield f"left out: {name} ({why})"
    for first, second in plan.equal:
        yield f"compared: {second.name} must equal {first.name}"
    tensors = sum(1 for file in plan.files for _ in file.targets)
    done = ", ".join(f"{name} {_size(size)}" for name, size in conversion.operations.most_common())
    yield f"{tensors} tensors in {len(plan.files)} files, {_size(plan.bytes)}: {done}"
    yield f"memory: buffers of about {_size(conversion.peak_bytes(workers))} for {workers} worker(s), and this plan"
    yield from (f"note: {note}" for note in conversion.notes)


def plan_json(conversion: Conversion) -> dict[str, Any]:
    """The plan for machines: every file with its tensors and their sources as [file, byte, rows, columns, stride]."""
    return {
        "kind": conversion.kind,
        "bytes": conversion.plan.bytes,
        "files": [
            {
                "name": file.name,
                "bytes": file.size,
                "tensors": [
                    {
                        "name": target.name,
                        "dtype": target.dtype,
                        "shape": list(target.shape),
                        "operation": target.operation,
                        "sources": [[p.file, p.start, p.rows, p.cols, p.stride] for p in target.pieces],
                    }
                    for target in file.targets
                ],
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
        rows = [(t.name, "", t.dtype, str(list(t.shape)), _size(t.bytes)) for t in inventory.tensors.values()]
    else:
        rows = [(n, f"x{c}", d, str(list(s)), _size(b)) for n, c, d, s, b in inventory.groups()]
    widths = [max((len(row[i]) for row in rows), default=0) for i in range(5)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
    total = inventory.summary()
    kinds = ", ".join(f"{dtype} {_size(row['bytes'])}" for dtype, row in total["by_dtype"].items())
    yield f"{total['kind']}: {total['tensors']:,} tensors, {total['parameters']:,} elements, {total['bytes']:,} bytes ({kinds})"
    if plans is not None:
        into, back = plans["import"], plans["export"]
        yield f"import can be planned: {into['tensors']:,} Megatron tensors, {_size(into['bytes'])}"
        yield f"export can be planned: {back['tensors']:,} tensors in {back['files']} files, {_size(back['bytes'])}"


def _sources(target: Target) -> str:
    first = target.pieces[0]
    more = f" and {len(target.pieces) - 1} more" if len(target.pieces) > 1 else ""
    return f"{Path(first.file).name}@{first.start} {first.dtype} {first.rows}x{first.cols}{more}"


def _size(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} B"
