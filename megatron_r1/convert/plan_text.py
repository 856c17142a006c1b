"""Plans and inventories as text and JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_r1.convert.conversion import Conversion
from megatron_r1.convert.inspecting import Inventory
from megatron_r1.convert.plan import Target
from megatron_r1.convert.progress import size_text


def plan_lines(conversion: Conversion, workers: int) -> Iterator[str]:
    """A line a tensor: what it is, what happens to it, and the byte ranges that it is made of; then the sums."""
    plan = conversion.plan
    for file in plan.files:
        yield f"{file.name}  {size_text(file.size)}"
        for target in file.targets:
            place = f" at {list(target.at)}" if target.at else ""
            yield f"  {target.name}{place}  {target.dtype} {list(target.shape)}  {target.operation} <- {_sources(target)}"
    for name in conversion.last:
        yield f"{name}  {size_text(len(conversion.last[name]))}"
    for name, why in sorted(plan.dropped.items()):
        yield f"left out: {name} ({why})"
    for first, second in plan.equal:
        yield f"compared: {second.name} must equal {first.name}"
    tensors = sum(1 for file in plan.files for _ in file.targets)
    done = ", ".join(f"{name} {size_text(size)}" for name, size in conversion.operations.most_common())
    what = "chunks" if conversion.kind == "import" else "tensors"
    yield f"{tensors} {what} in {len(plan.files)} files, {size_text(plan.bytes)}: {done}"
    yield f"memory: buffers of about {size_text(conversion.peak_bytes(workers))} for {workers} worker(s), and this plan"
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
                        "at": list(target.at),
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


def _sources(target: Target) -> str:
    first = target.pieces[0]
    more = f" and {len(target.pieces) - 1} more" if len(target.pieces) > 1 else ""
    return f"{Path(first.file).name}@{first.start} {first.dtype} {first.rows}x{first.cols}{more}"
