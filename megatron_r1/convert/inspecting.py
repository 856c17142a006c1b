"""What `megatron-r1 convert inspect` tells: the tensors of a checkpoint on disk, or of one that exists only as a
config.json, which is then also planned in both directions.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from megatron_r1.convert.correspondence import SCALE, Correspondence
from megatron_r1.convert.exporting import DTYPES, dtype_in, export_plan
from megatron_r1.convert.formats.names import Spec
from megatron_r1.convert.importing import ImportPlan, import_plan
from megatron_r1.convert.origin import Origin
from megatron_r1.convert.plan import HfSource, MegatronSource, scale_shape
from megatron_r1.convert.storage import FP8, Archive, Chunk, Stored

NOWHERE = Path("(planned)")


@dataclass(frozen=True)
class Inventory:
    """The tensors of a checkpoint, summed up."""

    kind: str
    tensors: Mapping[str, Stored]

    def summary(self) -> dict[str, Any]:
        """Counts for machines: tensors, bytes (without file headers), elements, and both by dtype."""
        by_dtype: dict[str, dict[str, int]] = {}
        for tensor in self.tensors.values():
            row = by_dtype.setdefault(tensor.dtype, {"tensors": 0, "bytes": 0})
            row["tensors"] += 1
            row["bytes"] += tensor.bytes
        weights = (t for t in self.tensors.values() if not t.name.endswith(SCALE))
        return {
            "kind": self.kind,
            "tensors": len(self.tensors),
            "bytes": sum(tensor.bytes for tensor in self.tensors.values()),
            "parameters": sum(prod(tensor.shape) for tensor in weights),
            "by_dtype": dict(sorted(by_dtype.items())),
        }

    def groups(self) -> list[tuple[str, int, str, tuple[int, ...], int]]:
        """(name with `*` for numbers, how many, dtype, shape, bytes): one row for all that differ in numbers only."""
        found: dict[tuple[str, str, tuple[int, ...]], list[int]] = {}
        for tensor in self.tensors.values():
            key = re.sub(r"\b\d+\b", "*", tensor.name), tensor.dtype, tensor.shape
            count = found.setdefault(key, [0, 0])
            count[0] += 1
            count[1] += tensor.bytes
        return [(name, n, dtype, shape, size) for (name, dtype, shape), (n, size) in found.items()]


def planned_hf(table: Correspondence, dtype: str) -> Archive:
    """The Hugging Face checkpoint that such a model has in this dtype (a key of DTYPES), without its bytes."""
    made, at = {}, 0
    wanted = DTYPES[dtype]
    for name in table.hf_names:
        rule, shape = table.rule(name), table.hf_shape(name)
        listed = [(name, dtype_in(rule, wanted), shape)]
        if listed[0][1] == FP8:
            listed.append((name + SCALE, "F32", scale_shape(shape)))
        for key, kind, size in listed:
            chunk = Chunk(str(NOWHERE), at, (0,) * len(size), size)
            made[key] = Stored(key, kind, size, (chunk,))
            at += made[key].bytes
    return Archive(NOWHERE, "hf", made)


def planned_megatron(made: ImportPlan) -> Archive:
    """The torch_dist checkpoint that an import makes, before it is written."""
    return Archive(
        NOWHERE,
        "torch_dist",
        {
            tensor.key: Stored(
                tensor.key,
                tensor.dtype,
                tensor.shape,
                tuple(Chunk(c.file, c.start, c.offsets, c.sizes) for c in tensor.chunks),
            )
            for tensor in made.tensors
        },
        tuple(item.key for item in made.objects),
    )


def plan_both_ways(table: Correspondence, dtype: str, spec: Spec, file_bytes: int) -> dict[str, Any]:
    """Plan import and export of a model that exists only as a config.json; every key of both sides is covered.

    Returns the sizes of what would be written. Raises UserError if a key were not covered: a defect of the table.
    """
    hf = planned_hf(table, dtype)
    made = import_plan(HfSource(hf, table), spec=spec, dtype=None, file_bytes=file_bytes)
    back = MegatronSource(planned_megatron(made), table)
    dtypes = {tensor.name: tensor.dtype for tensor in hf.tensors.values()}
    origin = Origin(NOWHERE, b"{}", dtypes)
    exported = export_plan(back, origin, dtype=None, scales="fp32", shard_bytes=file_bytes)
    written = {tensor.name: (tensor.dtype, tensor.shape) for shard in exported.shards for tensor in shard.tensors}
    if written != {t.name: (t.dtype, t.shape) for t in hf.tensors.values()}:
        raise RuntimeError("the planned export is not the checkpoint that the import was planned from")
    return {
        "import": {"tensors": len(made.tensors), "objects": len(made.objects), "bytes": made.plan.bytes},
        "export": {"tensors": len(written), "files": len(exported.shards), "bytes": exported.plan.bytes},
    }
