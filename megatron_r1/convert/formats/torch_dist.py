"""Megatron's torch_dist checkpoints: where every tensor lies, read without torch; and the metadata of a new one.

The planner reads a checkpoint through `read_torch_dist`; the importer lays chunks out with `frame` and ends with
`metadata_bytes` and `common_files`.

A checkpoint is a folder with `metadata.json` (the kind), `.metadata` (a pickle of torch's distributed checkpoint: for
each tensor dtype, shape and the boxes that cover it, and for each box file, offset and length), `__R_W.distcp` files
(torch.save zips one behind another, one a box or object) and `common.pt` (what all ranks share). Names and shapes are
those of the whole model, whatever the layout. Tensors of Megatron's gated layers lie in boxes of gate rows and up rows;
experts, and layers that are alike, are stacked along leading axes. torch pads none of the zips to a place in the
file, so elements begin anywhere.
"""

from __future__ import annotations

import json
import os
import pickle
import sys
from bisect import bisect_left
from collections import defaultdict, deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_r1.config.errors import UserError
from megatron_r1.convert.formats.torch_zip import TAIL, damaged, data_start, entries, object_blob, pickled
from megatron_r1.convert.formats.torch_zip import frame as frame  # importers lay chunks out with it
from megatron_r1.convert.formats.unpickle import (
    BytesStorageMetadata,
    Lazy,
    Metadata,
    StorageInfo,
    TensorStorageMetadata,
    read_pickle,
    unpickle,
)
from megatron_r1.convert.storage import ITEMSIZE, TORCH_NAMES, Archive, Chunk, Stored

TRACKER = "latest_checkpointed_iteration.txt"
_CONFIG = "metadata.json"
_HEAD = 1024  # bytes of a zip that hold its pickle and the local header of its data, as torch.save writes it
_BATCH = 256  # zips that a thread looks into in one go
_THREADS = 16  # they wait for the file system, not for the processor


def checkpoint_folder(folder: Path) -> Path:
    """The folder of the checkpoint that `folder` means: itself, or what Megatron-LM's tracker file in it names.

    `latest_checkpointed_iteration.txt` holds an iteration N, for `iter_N` with seven digits, or "release".
    """
    tracker = folder / TRACKER
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder: name a checkpoint's folder, or one with a {TRACKER}")
    if not tracker.is_file():
        return folder
    text = tracker.read_text(errors="replace").strip()
    if text != "release" and not (text.isascii() and text.isdigit()):
        raise UserError(f"{tracker} holds {text[:40]!r}: it should be the number of an iteration, or release")
    found = folder / (text if text == "release" else f"iter_{int(text):07d}")
    if not found.is_dir():
        raise UserError(f"{tracker} names {found.name}, which is not in {folder}: correct it, or name another folder")
    return found


def read_torch_dist(folder: Path) -> Archive:
    """Every tensor of a torch_dist checkpoint, with the byte range of each of its boxes, under the stored names.

    folder: as `checkpoint_folder` takes it. Reads metadata and, of every box, the directory of its zip: 2 KiB.
    Raises UserError for other kinds of checkpoints, for files that are missing or cut off, for boxes of a tensor
    that overlap or leave a hole, and for boxes whose bytes do not lie in order.
    """
    folder = checkpoint_folder(folder)
    _check_kind(folder)
    metadata = read_pickle(folder / ".metadata")
    try:
        tensors, objects, pieces = _listed(folder, metadata)
    except (AttributeError, TypeError, KeyError, ValueError) as error:
        raise damaged(str(folder / ".metadata"), f"it does not hold what torch writes ({error!r})") from error
    for name, (shape, boxes) in tensors.items():
        problem = "a box that is not inside it" if _outside(shape, boxes) else flaw(shape, boxes)
        if problem:
            raise damaged(str(folder / ".metadata"), f"the chunks of tensor {name} {list(shape)} have {problem}")
    chunks = _find(pieces)
    dtypes = {piece.name: piece.dtype for piece in pieces}
    stored = {
        name: Stored(name, dtypes[name], shape, tuple(sorted(chunks[name], key=lambda chunk: chunk.offsets)))
        for name, (shape, _) in tensors.items()
    }
    return Archive(folder, "torch_dist", stored, objects)


Boxes = list[tuple[tuple[int, ...], tuple[int, ...]]]
"""(offsets, sizes) of boxes of a tensor."""


@dataclass(frozen=True, slots=True)
class _Piece:
    """A box, and the zip that holds it."""

    name: str
    dtype: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int

    @property
    def where(self) -> str:
        return f"{self.file}, chunk {list(self.offsets)} of tensor {self.name}"


def _check_kind(folder: Path) -> None:
    config = folder / _CONFIG
    if not (folder / ".metadata").is_file():
        raise UserError(
            f"{folder} is no torch_dist checkpoint: it has no file .metadata. Name a folder with that and {_CONFIG}"
            f", a folder of mp_rank_* folders, or the one above it that has a {TRACKER}"
        )
    if not config.is_file():
        return  # torch's distributed checkpoint without Megatron has none
    try:
        found = json.loads(config.read_text())
        backend, version = found["sharded_backend"], found.get("sharded_backend_version", 1)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise damaged(str(config), error) from None
    if (backend, version) != ("torch_dist", 1):
        raise UserError(
            f"{config}: the checkpoint has the sharded_backend {backend!r} version {version!r}; only 'torch_dist' "
            "version 1 can be read. Load it with the Megatron that wrote it and save it with --ckpt-format torch_dist"
        )


def _listed(
    folder: Path, metadata: Any
) -> tuple[dict[str, tuple[tuple[int, ...], Boxes]], tuple[str, ...], list[_Piece]]:
    """(name -> shape and boxes of the tensors, names of the objects, all pieces)."""
    if not isinstance(metadata, Metadata):
        raise TypeError(f"the root is {type(metadata).__name__}")
    stored = {(index.fqn, index.offset): info for index, info in metadata.storage_data.items()}
    tensors, objects, pieces = {}, [], []
    for name, entry in metadata.state_dict_metadata.items():
        if isinstance(entry, BytesStorageMetadata):
            objects.append(name)
            continue
        if not isinstance(entry, TensorStorageMetadata):
            raise TypeError(f"the entry {name} is {type(entry).__name__}")
        dtype, shape = entry.properties.dtype, _numbers(entry.size)
        ITEMSIZE[dtype]
        boxes = [(_numbers(chunk.offsets), _numbers(chunk.sizes)) for chunk in entry.chunks]
        tensors[name] = (shape, boxes)
        for offsets, sizes in boxes:
            info = stored.get((name, offsets))
            if info is None:
                raise ValueError(f"no file is named for chunk {list(offsets)} of {name}")
            pieces.append(_Piece(name, dtype, offsets, sizes, *_place(folder, info)))
    return tensors, tuple(objects), pieces


def _numbers(values: Any) -> tuple[int, ...]:
    if not isinstance(values, tuple) or any(type(value) is not int or value < 0 for value in values):
        raise TypeError(f"{values!r} is no shape")
    return values


def _place(folder: Path, info: StorageInfo) -> tuple[str, int, int]:
    start, length = _numbers((info.offset, info.length))
    if os.path.basename(info.relative_path) != info.relative_path:
        raise ValueError(f"the file {info.relative_path} is not inside the checkpoint")
    if info.transform_descriptors:
        raise UserError(
            f"{folder / info.relative_path} is transformed ({info.transform_descriptors}): only chunks as torch.save "
            "writes them can be read. Save the checkpoint again without extensions"
        )
    return f"{folder}{os.sep}{info.relative_path}", start, length


def _outside(shape: tuple[int, ...], boxes: Boxes) -> bool:
    return any(
        len(offsets) != len(shape)
        or len(sizes) != len(shape)
        or any(at + size > whole for at, size, whole in zip(offsets, sizes, shape, strict=True))
        for offsets, sizes in boxes
    )


def flaw(shape: Sequence[int], boxes: Boxes, axis: int = 0) -> str | None:
    """What is wrong ("a hole", "an overlap") with boxes inside a shape that should cover each element once, or None.

    Exact for any boxes: an axis is cut at every border, and the boxes in each slice must cover the axes behind it.
    """
    if 0 in shape[axis:]:
        return None
    boxes = [box for box in boxes if 0 not in box[1]]
    if axis == len(shape) or len(boxes) < 2:
        if len(boxes) == 1:
            return None if tuple(boxes[0][1][axis:]) == tuple(shape[axis:]) else "a hole"
        return "an overlap" if boxes else "a hole"
    cuts = sorted({0, shape[axis]} | {at for o, s in boxes for at in (o[axis], o[axis] + s[axis])})
    slices: list[Boxes] = [[] for _ in cuts[1:]]
    for box in boxes:
        first = bisect_left(cuts, box[0][axis])
        for i in range(first, bisect_left(cuts, box[0][axis] + box[1][axis], first)):
            slices[i].append(box)
    return next((problem for part in slices if (problem := flaw(shape, part, axis + 1))), None)


def _find(pieces: Sequence[_Piece]) -> dict[str, list[Chunk]]:
    """Name of a tensor -> its chunks."""
    files: dict[str, list[_Piece]] = defaultdict(list)
    for piece in pieces:
        files[piece.file].append(piece)
    batches = []
    for file, inside in files.items():
        inside.sort(key=lambda piece: piece.start)
        size = os.stat(file).st_size if os.path.isfile(file) else None
        if size is None:
            raise UserError(f"{file} is missing: the checkpoint is incomplete; copy it again from where it came from")
        if (end := max(piece.start + piece.length for piece in inside)) > size:
            raise UserError(f"{file} has {size} bytes where .metadata has {end}: it is truncated; copy it again")
        batches += [inside[i : i + _BATCH] for i in range(0, len(inside), _BATCH)]
    chunks: dict[str, list[Chunk]] = defaultdict(list)
    with ThreadPoolExecutor(_THREADS) as pool:
        for batch, starts in zip(batches, pool.map(_starts, batches), strict=True):
            for piece, start in zip(batch, starts, strict=True):
                chunks[piece.name].append(Chunk(piece.file, start, piece.offsets, piece.sizes))
    return chunks


def _starts(pieces: Sequence[_Piece]) -> list[int]:
    """The bytes of a file at which the elements in consecutive zips begin.

    One read a zip: the directory is at its end, and behind it begins the next zip, whose head the next step needs.
    """
    found = []
    handle = os.open(pieces[0].file, os.O_RDONLY | os.O_CLOEXEC)
    known: deque[tuple[int, bytes]] = deque(maxlen=2)
    pickles: dict[bytes, Lazy] = {}

    def fetch(start: int, size: int) -> bytes:
        for at, data in known:
            if at <= start and start + size <= at + len(data):
                return data[start - at : start - at + size]
        return os.pread(handle, size, start)

    try:
        for piece in pieces:
            begin, end = piece.start, piece.start + piece.length
            if not any(at <= begin and begin + min(_HEAD, piece.length) <= at + len(data) for at, data in known):
                known.append((begin, os.pread(handle, _HEAD, begin)))
            at = max(begin, end - TAIL)
            known.append((at, os.pread(handle, end - at + _HEAD, at)))
            found.append(begin + _elements(piece, fetch, pickles))
    finally:
        os.close(handle)
    return found


def _elements(piece: _Piece, fetch: Any, pickles: dict[bytes, Lazy]) -> int:
    """The byte of the zip at which the elements of its tensor begin. pickles: those read already, most are equal."""

    def read(start: int, size: int) -> bytes:
        return bytes(fetch(piece.start + start, min(size, piece.length - start)))

    where = piece.where
    inside = entries(read, piece.length, where)
    text = pickled(read, inside, where)
    tensor = pickles.get(text)
    if tensor is None:
        tensor = pickles[text] = unpickle(text, where, lambda name: (0, inside[f"data/{name}"].size))
    if not isinstance(tensor, Lazy) or (tensor.dtype, tensor.shape) != (piece.dtype, piece.sizes):
        raise damaged(where, f"it is not the {piece.dtype} {list(piece.sizes)} of .metadata")
    if not tensor.contiguous:
        raise UserError(
            f"{where}: its elements do not lie in order (strides {list(tensor.stride)}); only contiguous tensors can "
            "be read. Save the checkpoint again from contiguous tensors, as Megatron does"
        )
    data = inside.get("data/0")
    if data is None or tensor.start + tensor.bytes > data.size:
        raise damaged(where, "its tensor is longer than its data")
    start = data_start(read, data, where) + tensor.start
    if start + tensor.bytes > piece.length:
        raise damaged(where, "its data end behind it")
    return start


@dataclass(frozen=True, slots=True)
class PlacedChunk:
    """A box of a tensor, and the zip that holds it: its file's name, first byte and length, `frame` included."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int


@dataclass(frozen=True, slots=True)
class PlacedTensor:
    """A tensor of a checkpoint that is being made. dtype: a key of `storage.ITEMSIZE`."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    chunks: list[PlacedChunk] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class PlacedObject:
    """Anything else, the zip that `object_blob` makes: file name, first byte, length."""

    key: str
    file: str
    start: int
    length: int


def metadata_bytes(tensors: Sequence[PlacedTensor], objects: Sequence[PlacedObject]) -> bytes:
    """`.metadata` of a checkpoint: same input, same bytes under the same torch. Imports torch."""
    import torch
    from torch.distributed.checkpoint import metadata as dcp
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    entries: dict[str, dcp.TensorStorageMetadata | dcp.BytesStorageMetadata] = {}
    places: dict[dcp.MetadataIndex, _StorageInfo] = {}

    def place(index: dcp.MetadataIndex, file: str, start: int, length: int) -> None:
        places[index] = _StorageInfo(sys.intern(file), start, length)  # equal strings become one in the pickle's memo

    for tensor in tensors:
        key, properties = sys.intern(tensor.key), dcp.TensorProperties(getattr(torch, TORCH_NAMES[tensor.dtype]))
        boxes = [dcp.ChunkStorageMetadata(torch.Size(c.offsets), torch.Size(c.sizes)) for c in tensor.chunks]
        entries[key] = dcp.TensorStorageMetadata(properties, torch.Size(tensor.shape), boxes)
        for chunk, box in zip(tensor.chunks, boxes, strict=True):
            place(dcp.MetadataIndex(key, box.offsets), chunk.file, chunk.start, chunk.length)
    for thing in objects:
        key = sys.intern(thing.key)
        entries[key] = dcp.BytesStorageMetadata()
        place(dcp.MetadataIndex(key), thing.file, thing.start, thing.length)
    whole = dcp.Metadata(entries, storage_data=places, storage_meta=dcp.StorageMeta())
    return pickle.dumps(whole, protocol=4)


def common_files() -> dict[str, bytes]:
    """`common.pt` and `metadata.json` of a checkpoint of weights alone, by name.

    dist_checkpointing.load needs the files, and no key of the dict. Megatron-LM takes `iteration` and
    `checkpoint_version` from it (below 3.0 it would reorder the rows of fused QKV weights) and does without `args`;
    its versions before 2025 read the layout from `args` and need a checkpoint of their own.
    """
    config = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    config |= {"common_backend": "torch", "common_backend_version": 1}
    common = {"checkpoint_version": 3.0, "iteration": 0}
    return {"common.pt": object_blob(common), _CONFIG: json.dumps(config).encode()}
