"""The safetensors files of a Hugging Face folder: where every tensor lies, and the layout of files to write. No torch.

`read_hf` makes the planner's `Archive` from the headers alone, believing nothing that the file's size contradicts;
`shard_layout` decides, before the first byte is written, which tensor goes where in which file, with the very header
that the safetensors library would write. Format: https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from megatron_r1.config.errors import UserError
from megatron_r1.convert.correspondence import SCALE
from megatron_r1.convert.manifest import disk_errors, some
from megatron_r1.convert.storage import ITEMSIZE, Archive, Chunk, Stored

logger = logging.getLogger(__name__)

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_HEADER_BYTES = 100_000_000  # what the safetensors library refuses beyond, too
# The library writes tensors of later dtypes first, then by name.
_DTYPE_ORDER = ("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "I16", "F16", "BF16", "I32", "F32", "F64", "I64")
_DTYPE_RANK = {dtype: rank for rank, dtype in enumerate(_DTYPE_ORDER)}
_AGAIN = "download or copy it again"


@dataclass(frozen=True, slots=True)
class Placed:
    """A tensor in a file to be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    at: int  # byte of the file at which it begins

    @property
    def bytes(self) -> int:
        """Bytes of the tensor."""
        return prod(self.shape) * ITEMSIZE[self.dtype]


@dataclass(frozen=True, slots=True)
class ShardFile:
    """A safetensors file to be written: `header` at byte 0, then the tensors without gaps, in this order."""

    name: str  # without its folder
    header: bytes  # with its length prefix and padding
    tensors: list[Placed]

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return len(self.header) + sum(tensor.bytes for tensor in self.tensors)


def is_hf(folder: Path) -> bool:
    """Whether a folder holds safetensors files, or their index."""
    return folder.is_dir() and any(folder.glob("*.safetensors*"))


def read_hf(folder: Path) -> Archive:
    """The tensors of a Hugging Face folder, from its index and the header of every shard.

    Raises UserError, naming the file and the cure, when there are no safetensors files, a shard is missing, cut or
    damaged, index and shards do not list the same tensors, or a dtype is unknown. A wrong `total_size` in the index,
    which many published models have, is logged.
    """
    folder = folder.absolute()
    with disk_errors(folder):
        present = {path.name for path in folder.iterdir()}
    index, declared = _read_index(folder / INDEX) if INDEX in present else (None, None)
    if index is None and SINGLE not in present:
        raise UserError(_nothing_to_read(folder, present))
    shards = {SINGLE} if index is None else set(index.values())
    if missing := shards - present:
        raise UserError(
            f"{folder} lacks {some(missing)}, of the {len(shards)} files that {INDEX} names; download or copy the rest"
        )
    if unlisted := {name for name in present if name.endswith(".safetensors")} - shards:
        if SINGLE in unlisted:  # transformers would read this one, and not the index
            raise UserError(f"{folder} has {SINGLE} and an {INDEX} that does not name it; remove the one that is stale")
        if lost := {name for name in unlisted if _series(name) in {_series(shard) for shard in shards} - {None}}:
            raise UserError(f"{folder / INDEX} does not name {some(lost)}, a part of the same model; {_AGAIN}")
        logger.warning("%s: %s not read: %s names other files", folder, some(unlisted), INDEX if index else SINGLE)
    tensors: dict[str, Stored] = {}
    for shard in sorted(shards):
        for tensor in read_safetensors(folder / shard).values():
            if (other := tensors.get(tensor.name)) is not None:
                raise UserError(
                    f"tensor {tensor.name} is in {other.chunks[0].file} and in {shard}; take the model again from its "
                    "origin, without files of another version"
                )
            tensors[tensor.name] = tensor
    if index is not None:
        _compare(folder, index, tensors)
    archive = Archive(folder, "hf", tensors)
    if declared is not None and declared != archive.bytes:
        logger.warning("%s: total_size is %s, the tensors have %d bytes", folder / INDEX, declared, archive.bytes)
    return archive


def read_safetensors(file: Path) -> dict[str, Stored]:
    """The tensors of one safetensors file by name. Raises UserError if it is cut, damaged or has an unknown dtype."""
    entries, data, size = _read_header(file)
    path = str(file.absolute())
    spans: list[tuple[int, int, str]] = []
    tensors: dict[str, Stored] = {}
    for name, entry in entries.items():
        try:
            dtype, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            sane = isinstance(dtype, str) and all(type(value) is int and value >= 0 for value in (*shape, start, end))
        except (KeyError, TypeError, ValueError):
            sane = False
        if not sane:
            raise UserError(f"{file} has a damaged header: tensor {name} is {entry!r}; {_AGAIN}")
        if dtype not in ITEMSIZE:
            raise UserError(
                f"{file}: tensor {name} has dtype {dtype!r}, which is not supported; use a version of the model with "
                f"{', '.join(ITEMSIZE)}"
            )
        if end - start != prod(shape) * ITEMSIZE[dtype]:
            raise UserError(
                f"{file} has a damaged header: tensor {name}, {dtype} {list(shape)}, needs "
                f"{prod(shape) * ITEMSIZE[dtype]} bytes and got {end - start}; {_AGAIN}"
            )
        spans.append((start, end, name))
        chunk = Chunk(path, data + start, (0,) * len(shape), shape)
        tensors[name] = Stored(name, dtype, shape, (chunk,))
    reached = 0
    for start, end, name in sorted(spans):
        if start != reached:
            state = "a hole" if start > reached else "an overlap"
            raise UserError(
                f"{file} has a damaged header: {state} before tensor {name} (bytes {reached} and {start}); {_AGAIN}"
            )
        reached = end
    if data + reached != size:
        state = "is cut" if data + reached > size else "has bytes that no tensor owns"
        raise UserError(f"{file} {state}: its header asks for {data + reached} bytes, the file has {size}; {_AGAIN}")
    return tensors


def shard_layout(
    tensors: Sequence[tuple[str, str, tuple[int, ...]]], max_bytes: int, weight_map: Mapping[str, str] | None
) -> list[ShardFile]:
    """The files for these (name, dtype, shape), with the header and the place of every tensor.

    weight_map: file of each tensor, used when its keys are exactly these names. Otherwise the tensors are cut in the
    given order into files of at most `max_bytes` of tensor data (one larger tensor makes one larger file), named
    model-00001-of-00005.safetensors, or model.safetensors when there is only one; a weight and its `_scale_inv` stay
    together. Write `index_json` too unless the only file is model.safetensors. Raises UserError for max_bytes < 1.
    """
    if max_bytes < 1:
        raise UserError(f"the largest file size is {max_bytes} bytes; give at least 1")
    if len({name for name, _, _ in tensors}) != len(tensors):
        raise ValueError("a tensor name is given twice")
    if weight_map is not None and weight_map.keys() == {name for name, _, _ in tensors}:
        by_file: dict[str, list[tuple[str, str, tuple[int, ...]]]] = defaultdict(list)
        for tensor in tensors:
            by_file[weight_map[tensor[0]]].append(tensor)
        return [_shard(name, by_file[name]) for name in sorted(by_file)]
    parts = _cut(tensors, max_bytes)
    if len(parts) == 1:
        return [_shard(SINGLE, parts[0])]
    return [_shard(f"model-{i:05d}-of-{len(parts):05d}.safetensors", part) for i, part in enumerate(parts, 1)]


def index_json(files: Sequence[ShardFile]) -> bytes:
    """model.safetensors.index.json of these files, as transformers writes it, with the true sum of the tensors' bytes.

    transformers 5 adds a `total_parameters` that no loader reads and that has no one meaning for quantised weights; it
    is left out, as in DeepSeek's own files.
    """
    total = sum(tensor.bytes for file in files for tensor in file.tensors)
    names = {tensor.name: file.name for file in files for tensor in file.tensors}
    content = {"metadata": {"total_size": total}, "weight_map": names}
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()


def _read_index(file: Path) -> tuple[dict[str, str], object]:
    """`weight_map` and the declared `total_size` (None when absent) of an index."""
    with disk_errors(file):
        raw = file.read_bytes()
    try:
        index = json.loads(raw)
        names = index["weight_map"]
        # A shard lies beside its index: nothing else may be reached through it.
        if not all(isinstance(shard, str) and Path(shard).name == shard for shard in names.values()):
            raise ValueError("weight_map has a value that is no plain file name")
        metadata = index.get("metadata")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is not an index of safetensors files ({error!r}); {_AGAIN}") from None
    if not names:
        raise UserError(f"{file} names no tensor; {_AGAIN}")
    return names, metadata.get("total_size") if isinstance(metadata, dict) else None


def _series(shard: str) -> tuple[str, str] | None:
    """What the files of one sharded model have in common: ("model", "00163")."""
    match = re.fullmatch(r"(.+)-\d+-of-(\d+)\.safetensors", shard)
    return (match.group(1), match.group(2)) if match else None


def _nothing_to_read(folder: Path, present: set[str]) -> str:
    if shards := {name for name in present if name.endswith(".safetensors")}:
        return f"{folder} has {some(shards)} but no {INDEX}, which says what a whole model is; download it too"
    if pickles := {name for name in present if name.endswith((".bin", ".pt", ".pth"))}:
        return (
            f"{folder} has no safetensors files. {some(pickles)} are not read: they are Python pickles, which can run "
            "any code when opened. Take the model's safetensors version, or save it once with transformers' "
            "save_pretrained(..., safe_serialization=True)"
        )
    return f"{folder} has neither {INDEX} nor {SINGLE}; give the folder of a Hugging Face model"


def _compare(folder: Path, index: Mapping[str, str], tensors: Mapping[str, Stored]) -> None:
    """Raise UserError unless every tensor is in just the file that the index names."""
    if lost := {name for name in index if name not in tensors}:
        raise UserError(
            f"{folder / INDEX} names tensors that are not in their files: {some(lost)}, expected in "
            f"{some({index[name] for name in lost})}; download or copy index and shards of one version again"
        )
    if extra := tensors.keys() - index.keys():
        raise UserError(
            f"{some({Path(tensors[name].chunks[0].file).name for name in extra})} in {folder} hold tensors that "
            f"{INDEX} does not name: {some(extra)}; download or copy index and shards of one version again"
        )
    for name, shard in index.items():
        if (found := Path(tensors[name].chunks[0].file).name) != shard:
            raise UserError(f"{folder / INDEX} says that {name} is in {shard}, but {found} has it; correct the index")


def _read_header(file: Path) -> tuple[dict[str, Any], int, int]:
    """Entries of a safetensors header, and the first and the past-the-end byte of the data."""
    with disk_errors(file), file.open("rb") as opened:
        size = os.fstat(opened.fileno()).st_size
        prefix = opened.read(9)
        length = int.from_bytes(prefix[:8], "little")
        if prefix.startswith(b"version "):
            raise UserError(f"{file} is a Git LFS pointer, not the file itself; fetch it with `git lfs pull`")
        if size < 10 or length > MAX_HEADER_BYTES or prefix[8:] != b"{":
            raise UserError(f"{file} ({size} bytes) is not a safetensors file; {_AGAIN}")
        if 8 + length > size:
            raise UserError(f"{file} is cut: its header needs {8 + length} bytes, the file has {size}; {_AGAIN}")
        opened.seek(8)
        raw = opened.read(length)
    try:
        entries = json.loads(raw, object_pairs_hook=_each_once)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} has a damaged header ({error}); {_AGAIN}") from None
    entries.pop("__metadata__", None)
    return entries, 8 + length, size


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Raises ValueError for a key that is there twice: readers differ in which of the two they take."""
    made = dict(pairs)
    if len(made) < len(pairs):
        (twice, _), *_ = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"{twice} is there more than once")
    return made


def _cut(
    tensors: Sequence[tuple[str, str, tuple[int, ...]]], max_bytes: int
) -> list[list[tuple[str, str, tuple[int, ...]]]]:
    """Runs of tensors of at most max_bytes each, a weight's scales brought next to it."""
    named = {tensor[0]: tensor for tensor in tensors}
    parts: list[list[tuple[str, str, tuple[int, ...]]]] = [[]]
    used = 0
    for name, tensor in named.items():
        if name.endswith(SCALE) and name.removesuffix(SCALE) in named:
            continue  # goes with its weight
        group = [tensor] + [named[scale] for scale in (name + SCALE,) if scale in named]
        size = sum(prod(shape) * ITEMSIZE[dtype] for _, dtype, shape in group)
        if parts[-1] and used + size > max_bytes:
            parts.append([])
            used = 0
        parts[-1] += group
        used += size
    return parts


def _shard(name: str, tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> ShardFile:
    """The file of these tensors with the bytes of its header as safetensors' `serialize` makes them."""
    ordered = sorted(tensors, key=lambda tensor: (-_DTYPE_RANK[tensor[1]], tensor[0]))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor, dtype, shape in ordered:
        start, end = end, end + prod(shape) * ITEMSIZE[dtype]
        header[tensor] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    raw = len(raw).to_bytes(8, "little") + raw
    placed = [Placed(t, dtype, shape, len(raw) + header[t]["data_offsets"][0]) for t, dtype, shape in ordered]
    return ShardFile(name, raw, placed)
