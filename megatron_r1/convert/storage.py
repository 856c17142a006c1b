"""Where the tensors of a checkpoint lie on disk: what every reader makes and the planner reads. No torch.

A Hugging Face folder, a torch_dist checkpoint and a legacy `mp_rank_*` one all become an `Archive`: names, shapes, and
for each tensor the boxes of it that lie contiguously in some file.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Literal

ITEMSIZE = {
    **{"F64": 8, "I64": 8, "F32": 4, "I32": 4, "BF16": 2, "F16": 2, "I16": 2},
    **{"F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I8": 1, "U8": 1, "BOOL": 1},
}
"""Bytes of an element, by safetensors' name of the dtype."""
TORCH_NAMES = {
    **{"F64": "float64", "I64": "int64", "F32": "float32", "I32": "int32", "BF16": "bfloat16", "F16": "float16"},
    **{"I16": "int16", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu"},
    **{"I8": "int8", "U8": "uint8", "BOOL": "bool"},
}
"""torch's name of each of these dtypes."""
FP8 = "F8_E4M3"


@dataclass(frozen=True, slots=True)
class Chunk:
    """A box of a tensor, row-major and contiguous in a file."""

    file: str  # absolute path
    start: int  # byte of its first element
    offsets: tuple[int, ...]  # of the box in the tensor
    sizes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor of a checkpoint; its chunks cover it without overlap."""

    name: str
    dtype: str  # a key of ITEMSIZE
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]

    @property
    def bytes(self) -> int:
        """Bytes of the whole tensor."""
        return prod(self.shape) * ITEMSIZE[self.dtype]


@dataclass(frozen=True, slots=True)
class Archive:
    """The metadata of a checkpoint."""

    folder: Path
    kind: Literal["hf", "torch_dist", "legacy"]
    tensors: dict[str, Stored]
    objects: tuple[str, ...] = ()  # names of entries that are no tensors

    @property
    def bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.bytes for tensor in self.tensors.values())
