"""torch_dist checkpoints: what is read is what torch and Megatron load, and what is written they load, bit for bit."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
from collections.abc import Sequence
from itertools import pairwise, product
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from torch.distributed.checkpoint.metadata import Metadata

from megatron_r1.checkpoint.io import _save_without_a_manager_process
from megatron_r1.config.errors import UserError
from megatron_r1.convert.formats import torch_dist as module
from megatron_r1.convert.formats.torch_dist import (
    PlacedChunk,
    PlacedObject,
    PlacedTensor,
    checkpoint_folder,
    common_files,
    flaw,
    metadata_bytes,
    read_torch_dist,
)
from megatron_r1.convert.formats.torch_zip import frame, object_blob
from megatron_r1.convert.formats.unpickle import read_torch
from megatron_r1.convert.storage import ITEMSIZE, TORCH_NAMES, Archive, Stored
from megatron_r1.parallel.world import World


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal dtype, shape and bits."""
    return a.dtype == b.dtype and a.shape == b.shape and raw(a) == raw(b)


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def random(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    if dtype == torch.bool:
        return torch.rand(tuple(shape)) < 0.5
    size = prod(shape) * dtype.itemsize
    bits = torch.randint(0, 256, (size,), dtype=torch.uint8)
    return bits.view(dtype).reshape(tuple(shape)) if size else torch.empty(tuple(shape), dtype=dtype)


def assemble(stored: Stored) -> torch.Tensor:
    """A tensor from the bytes that its chunks name."""
    dtype = getattr(torch, TORCH_NAMES[stored.dtype])
    whole = torch.empty(stored.shape, dtype=dtype)
    for chunk in stored.chunks:
        with open(chunk.file, "rb") as file:
            file.seek(chunk.start)
            data = bytearray(file.read(prod(chunk.sizes) * ITEMSIZE[stored.dtype]))
        part = (
            torch.frombuffer(data, dtype=dtype).reshape(chunk.sizes) if data else torch.empty(chunk.sizes, dtype=dtype)
        )
        box = tuple(slice(at, at + size) for at, size in zip(chunk.offsets, chunk.sizes, strict=True))
        whole[box] = part
    return whole


def load(folder: Path, archive: Archive) -> dict[str, torch.Tensor]:
    """Everything by torch's own reader."""
    state: dict[str, Any] = {
        name: torch.empty(tensor.shape, dtype=getattr(torch, TORCH_NAMES[tensor.dtype]))
        for name, tensor in archive.tensors.items()
    }
    reader = dcp.FileSystemReader(str(folder))
    dcp.state_dict_loader._load_state_dict(state, storage_reader=reader, no_dist=True)
    return state


TENSORS = {
    "embedding.word_embeddings.weight": ((10, 6), torch.bfloat16),
    "decoder.layers.mlp.linear_fc1.weight": ((3, 8, 6), torch.float32),
    "mlp.router.expert_bias": ((7,), torch.float32),
    "scalar": ((), torch.float64),
    "codes": ((4, 5), torch.float8_e4m3fn),
    "counts": ((6,), torch.int64),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A checkpoint made with `frame`, `object_blob`, `metadata_bytes` in two files, every tensor cut on axis 0."""
    folder = tmp_path_factory.mktemp("written") / "checkpoint"
    folder.mkdir()
    return folder, write(folder)


def write(folder: Path) -> dict[str, torch.Tensor]:
    state = {name: random(shape, dtype) for name, (shape, dtype) in TENSORS.items()}
    names = {torch_name: name for name, torch_name in TORCH_NAMES.items()}
    files = [bytearray(), bytearray(b"something else")]
    tensors = []
    for i, (key, tensor) in enumerate(state.items()):
        dtype = names[str(tensor.dtype).removeprefix("torch.")]
        placed = PlacedTensor(key, dtype, tuple(tensor.shape), [])
        cuts = [0, tensor.shape[0] // 2, tensor.shape[0]] if tensor.dim() else [0, 0]
        for first, last in pairwise(cuts):
            part = tensor[first:last] if tensor.dim() else tensor
            head, tail = frame(dtype, part.shape)
            blob = head + raw(part) + tail
            file = files[(i + first) % 2]
            offsets = (first, *[0] * (tensor.dim() - 1)) if tensor.dim() else ()
            placed.chunks.append(
                PlacedChunk(offsets, tuple(part.shape), f"__0_{(i + first) % 2}.distcp", len(file), len(blob))
            )
            file += blob
        tensors.append(placed)
    blob = object_blob()
    objects = [
        PlacedObject("decoder.layers.mlp.linear_fc1._extra_state/shard_0_1", "__0_0.distcp", len(files[0]), len(blob))
    ]
    files[0] += blob
    for i, file in enumerate(files):
        (folder / f"__0_{i}.distcp").write_bytes(file)
    for name, data in common_files().items():
        (folder / name).write_bytes(data)
    (folder / ".metadata").write_bytes(metadata_bytes(tensors, objects))
    return state


def test_what_is_written_torch_loads(written: tuple[Path, dict[str, torch.Tensor]]) -> None:
    folder, state = written
    archive = read_torch_dist(folder)
    loaded = load(folder, archive)
    assert loaded.keys() == state.keys()
    for name, tensor in state.items():
        assert same(loaded[name], tensor), name
        assert same(assemble(archive.tensors[name]), tensor), name
    assert archive.objects == ("decoder.layers.mlp.linear_fc1._extra_state/shard_0_1",)


def test_what_is_written_megatron_loads(world: World, written: tuple[Path, dict[str, torch.Tensor]]) -> None:
    folder, state = written
    assert dist_checkpointing.load_common_state_dict(str(folder)) == {"checkpoint_version": 3.0, "iteration": 0}
    assert set(dist_checkpointing.load_tensors_metadata(str(folder))) == set(state)
    wanted: dict[str, Any] = {
        name: ShardedTensor.from_rank_offsets(name, torch.empty_like(t)) for name, t in state.items()
    }
    rows = ShardedTensor.from_rank_offsets(  # the second row shard of two
        "embedding.word_embeddings.weight", torch.empty(5, 6, dtype=torch.bfloat16), (0, 1, 2)
    )
    wanted |= {"rows": rows, "extra": ShardedObject("decoder.layers.mlp.linear_fc1._extra_state", None, (1,), (0,))}
    loaded = dist_checkpointing.load(wanted, str(folder), strict="raise_all", validate_access_integrity=False)
    for name, tensor in state.items():
        assert same(loaded[name], tensor), name
    assert same(loaded["rows"], state["embedding.word_embeddings.weight"][5:])
    assert loaded["extra"] is None
    assert loaded["iteration"] == 0


def test_writing_is_deterministic(tmp_path: Path) -> None:
    torch.manual_seed(5)
    contents = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        torch.manual_seed(5)
        write(tmp_path / name)
        contents.append({file.name: file.read_bytes() for file in (tmp_path / name).iterdir()})
    assert contents[0] == contents[1]
    assert sorted(contents[0]) == [".metadata", "__0_0.distcp", "__0_1.distcp", "common.pt", "metadata.json"]


@pytest.fixture(scope="module")
def saved(world: World, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A checkpoint saved by Megatron: row and column shards, stacked layers, 0-d and 1-d tensors, objects."""
    _save_without_a_manager_process()
    folder = tmp_path_factory.mktemp("saved") / "iter_0000012"
    folder.mkdir()
    state = {name: random(shape, dtype) for name, (shape, dtype) in TENSORS.items() if name != "codes"}
    state["row"], state["column"] = random((6, 8), torch.bfloat16), random((6, 8), torch.float32)
    layers = state["decoder.layers.mlp.linear_fc1.weight"]
    sharded: dict[str, Any] = {
        name: ShardedTensor.from_rank_offsets(name, t) for name, t in state.items() if name not in ("row", "column")
    }
    sharded |= {
        f"row{i}": ShardedTensor.from_rank_offsets("row", part.contiguous(), (1, i, 4))
        for i, part in enumerate(state["row"].chunk(4, 1))
    }
    sharded |= {
        f"column{i}": ShardedTensor.from_rank_offsets("column", part, (0, i, 3))
        for i, part in enumerate(state["column"].chunk(3))
    }
    del sharded["decoder.layers.mlp.linear_fc1.weight"]
    for layer, half in product(range(3), range(2)):
        sharded[f"{layer}.{half}"] = ShardedTensor.from_rank_offsets(
            "decoder.layers.mlp.linear_fc1.weight",
            layers[layer].chunk(2)[half],
            (0, layer, 3),
            (1, half, 2),
            prepend_axis_num=1,
        )
    sharded["rng"] = ShardedObject("rng", {"seed": torch.arange(9)}, (1,), (0,))
    sharded["iteration"] = 12
    dist_checkpointing.save(sharded, str(folder))
    return folder, state


def test_what_megatron_saves_is_read(saved: tuple[Path, dict[str, torch.Tensor]]) -> None:
    folder, state = saved
    archive = read_torch_dist(folder)
    assert set(archive.tensors) == set(state)
    assert archive.objects == ("rng/shard_0_1",)
    loaded = load(folder, archive)
    for name, tensor in state.items():
        assert same(assemble(archive.tensors[name]), tensor), name
        assert same(loaded[name], tensor), name
    chunks = {name: len(stored.chunks) for name, stored in archive.tensors.items()}
    assert (chunks["row"], chunks["column"], chunks["decoder.layers.mlp.linear_fc1.weight"]) == (4, 3, 6)
    assert archive.bytes == sum(len(raw(tensor)) for tensor in state.values())
    assert read_torch(folder / "common.pt")["iteration"] == 12


def test_what_torch_saves_is_read(tmp_path: Path) -> None:
    state = {"matrix": torch.randn(4, 6), "scalar": torch.tensor(2.0), "empty": torch.empty(0, 3), "t": torch.arange(5)}
    dcp.save(dict(state), storage_writer=dcp.FileSystemWriter(tmp_path, single_file_per_rank=True), no_dist=True)
    archive = read_torch_dist(tmp_path)
    for name, tensor in state.items():
        assert same(assemble(archive.tensors[name]), tensor), name


def test_a_view_of_a_larger_storage(tmp_path: Path) -> None:
    """torch.save writes the whole storage; other versions of torch and Megatron may not have cloned first."""
    view = torch.randn(1000)[10:34].view(4, 6)
    with (tmp_path / "__0_0.distcp").open("wb") as file:
        torch.save(view, file)
        length = file.tell()
    placed = PlacedTensor("view", "F32", (4, 6), [PlacedChunk((0, 0), (4, 6), "__0_0.distcp", 0, length)])
    (tmp_path / ".metadata").write_bytes(metadata_bytes([placed], []))
    archive = read_torch_dist(tmp_path)
    assert same(assemble(archive.tensors["view"]), view)
    assert same(load(tmp_path, archive)["view"], view)


def test_one_read_a_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = {f"layer.{i}.weight": torch.randn(70, 80) for i in range(600)}
    dcp.save(dict(state), storage_writer=dcp.FileSystemWriter(tmp_path, single_file_per_rank=True), no_dist=True)
    sizes: list[int] = []
    pread = os.pread
    monkeypatch.setattr(module.os, "pread", lambda handle, size, at: sizes.append(size) or pread(handle, size, at))
    archive = read_torch_dist(tmp_path)
    assert len(sizes) <= 600 + 3
    assert sum(sizes) < 600 * 2500
    for name in ("layer.0.weight", "layer.255.weight", "layer.256.weight", "layer.599.weight"):
        assert same(assemble(archive.tensors[name]), state[name])


def test_a_load_folder_of_megatron_lm(saved: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    folder, _ = saved
    (tmp_path / "iter_0000012").symlink_to(folder)
    (tmp_path / "release").symlink_to(folder)
    tracker = tmp_path / "latest_checkpointed_iteration.txt"
    for text, name in (("12", "iter_0000012"), ("release\n", "release")):
        tracker.write_text(text)
        assert checkpoint_folder(tmp_path) == tmp_path / name
        assert read_torch_dist(tmp_path).tensors.keys() == read_torch_dist(folder).tensors.keys()
    for text, message in (("13", "iter_0000013, which is not in"), ("latest", "holds 'latest'")):
        tracker.write_text(text)
        with pytest.raises(UserError, match=message):
            read_torch_dist(tmp_path)
    with pytest.raises(UserError, match="is no folder"):
        read_torch_dist(tmp_path / "absent")


Damage = tuple[Path, Metadata]


@pytest.fixture
def damage(written: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path) -> Damage:
    """A copy of the written checkpoint, and its metadata to spoil and write back."""
    folder = tmp_path / "copy"
    shutil.copytree(written[0], folder)
    return folder, pickle.loads((folder / ".metadata").read_bytes())


def refuse(damage: Damage, message: str) -> None:
    (damage[0] / ".metadata").write_bytes(pickle.dumps(damage[1]))
    with pytest.raises(UserError, match=message):
        read_torch_dist(damage[0])


def test_other_backends_are_refused(damage: Damage) -> None:
    for backend in ("zarr", "fsdp_dtensor"):
        (damage[0] / "metadata.json").write_text(json.dumps({"sharded_backend": backend, "sharded_backend_version": 1}))
        refuse(damage, f"{backend}.*only 'torch_dist'")
    (damage[0] / "metadata.json").write_text("{")
    refuse(damage, r"metadata\.json is damaged")
    (damage[0] / ".metadata").unlink()
    with pytest.raises(UserError, match=r"has no file \.metadata"):
        read_torch_dist(damage[0])


def test_missing_and_truncated_files(damage: Damage) -> None:
    file = damage[0] / "__0_1.distcp"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    refuse(damage, r"__0_1\.distcp has .* bytes where .* truncated")
    file.write_bytes(whole[:-900] + b"\0" * 900)
    refuse(damage, r"__0_1\.distcp, chunk .* is damaged")
    file.unlink()
    refuse(damage, r"__0_1\.distcp is missing")


def test_holes_and_overlaps_name_the_tensor(damage: Damage) -> None:
    chunks = damage[1].state_dict_metadata["codes"].chunks  # type: ignore[union-attr]
    kept = chunks.pop()
    refuse(damage, "tensor codes .* have a hole")
    chunks += [kept, kept]
    refuse(damage, "tensor codes .* have an overlap")
    chunks.pop()
    kept.sizes = torch.Size((3, 5))
    refuse(damage, "tensor codes .* have a box that is not inside it")


def test_metadata_that_does_not_fit_the_chunks(damage: Damage) -> None:
    folder, metadata = damage
    entry: Any = metadata.state_dict_metadata["counts"]
    entry.properties.dtype = torch.int32
    refuse(damage, r"chunk \[\d\] of tensor counts is damaged .* not the I32")
    entry.properties.dtype = torch.int64
    index = next(index for index in metadata.storage_data if index.fqn == "counts")
    info = metadata.storage_data.pop(index)
    refuse(damage, "no file is named for chunk .* of counts")
    metadata.storage_data[index] = info
    name, info.relative_path = info.relative_path, "../copy/__0_1.distcp"
    refuse(damage, "is not inside the checkpoint")
    info.relative_path, info.transform_descriptors = name, ["zstd"]
    refuse(damage, "is transformed")
    info.transform_descriptors = None
    (folder / ".metadata").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(UserError, match="does not hold what torch writes"):
        read_torch_dist(folder)


def test_strided_chunks_are_refused(tmp_path: Path) -> None:
    dcp.save({"w": torch.randn(4, 6).t()}, storage_writer=dcp.FileSystemWriter(tmp_path), no_dist=True)
    with pytest.raises(UserError, match="of tensor w: its elements do not lie in order"):
        read_torch_dist(tmp_path)


@pytest.mark.parametrize("dtype", sorted(ITEMSIZE))
@pytest.mark.parametrize("shape", [(), (1,), (300,), (0, 4), (3, 5, 2), (70000, 2)])
def test_frames_are_files_of_torch_save(dtype: str, shape: tuple[int, ...]) -> None:
    tensor = random(shape, getattr(torch, TORCH_NAMES[dtype]))
    head, tail = frame(dtype, shape)
    assert len(head) % 64 == 0
    for weights_only in (True, False):
        loaded = torch.load(io.BytesIO(head + raw(tensor) + tail), weights_only=weights_only)
        assert same(loaded, tensor)
        assert loaded.is_contiguous()


@pytest.mark.parametrize("size", [(1 << 32) - 2, (1 << 32) - 1, 1 << 32])
def test_frames_beyond_4_gib(tmp_path: Path, size: int) -> None:
    """Around the limits of the short form, of the entry and of the place of the directory; a sparse file."""
    path = tmp_path / "large.pt"
    head, tail = frame("U8", (size,))
    with path.open("wb") as file:
        file.write(head)
        file.seek(len(head) + size - 1)
        file.write(b"\7" + tail)
    loaded = torch.load(path, mmap=True, weights_only=True)
    assert (loaded.shape, loaded[-1].item()) == ((size,), 7)
    lazy = read_torch(path)
    assert (lazy.start, lazy.shape) == (len(head), (size,))
    path.unlink()


def test_objects_are_files_of_torch_save() -> None:
    for value in ([None], {"a": [1, 2.5, "x"]}):
        assert torch.load(io.BytesIO(object_blob(value)), weights_only=True) == value


@given(
    st.lists(st.integers(1, 3), min_size=1, max_size=3).flatmap(
        lambda shape: st.tuples(
            st.just(tuple(shape)),
            st.lists(
                st.tuples(
                    *[
                        st.tuples(st.integers(0, n - 1), st.integers(1, n)).map(
                            lambda p, n=n: (p[0], min(p[1], n - p[0]))
                        )
                        for n in shape
                    ]
                ),
                max_size=6,
            ),
        )
    )
)
def test_the_cover_check_counts_every_element(case: tuple[tuple[int, ...], list[Any]]) -> None:
    shape, boxes = case
    seen = torch.zeros(shape, dtype=torch.long)
    for box in boxes:
        seen[tuple(slice(at, at + size) for at, size in box)] += 1
    found = flaw(shape, [(tuple(at for at, _ in box), tuple(size for _, size in box)) for box in boxes])
    assert (found is None) == bool((seen == 1).all())
    if found is not None:
        assert bool((seen == 0).any()) if found == "a hole" else bool((seen > 1).any())


@given(st.lists(st.integers(1, 3), min_size=1, max_size=3), st.data())
def test_the_cover_check_accepts_any_tiling(shape: list[int], data: st.DataObject) -> None:
    boxes = [((0,) * len(shape), tuple(shape))]
    for _ in range(data.draw(st.integers(0, 6))):
        offsets, sizes = boxes.pop(data.draw(st.integers(0, len(boxes) - 1)))
        axis = data.draw(st.integers(0, len(shape) - 1))
        at = data.draw(st.integers(0, sizes[axis]))
        move = tuple(at if i == axis else 0 for i in range(len(shape)))
        left = tuple(at if i == axis else size for i, size in enumerate(sizes))
        right = tuple(size - at if i == axis else size for i, size in enumerate(sizes))
        boxes += [(offsets, left), (tuple(o + m for o, m in zip(offsets, move, strict=True)), right)]
    assert flaw(shape, boxes) is None
    if len(kept := [box for box in boxes if 0 not in box[1]]) > 1:
        assert flaw(shape, kept[1:]) == "a hole"
        assert flaw(shape, [*kept, kept[0]]) == "an overlap"
