"""One file of a conversion: scales before their tensor, blocks of writes, the hash of its plan, copies compared."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash

from megatron_r1.config.errors import UserError
from megatron_r1.convert import write
from megatron_r1.convert.plan import OutputFile, Part, Piece, Quantise, Scale, Target
from megatron_r1.convert.storage import Chunk, Stored
from megatron_r1.convert.write import plan_hash, write_file
from megatron_r1.model.block_fp8 import quantise


def no_progress(_: int) -> None:
    """Nobody watches."""


@pytest.fixture
def matrix(tmp_path: Path) -> tuple[torch.Tensor, Piece]:
    """bfloat16 [300, 200] and the piece that reads it."""
    values = torch.randn(300, 200, generator=torch.Generator().manual_seed(1)).bfloat16()
    file = tmp_path / "values"
    file.write_bytes(b"head" + values.view(torch.uint8).numpy().tobytes())
    return values, Piece(0, 0, 300, 200, str(file), 4, 400, "BF16")


def quantised_file(piece: Piece) -> OutputFile:
    """Scales stand before their tensor, as safetensors orders dtypes."""
    target = Target("w", "F8_E4M3", (300, 200), (piece,), Quantise("fp32", None))
    return OutputFile("out", 8 + 24 + 60_000 + 3, (Part(0, b"8 bytes."), Part(32, target, 8), Part(60_032, b"end")))


def test_scales_that_stand_before_their_tensor(matrix: tuple[torch.Tensor, Piece], tmp_path: Path) -> None:
    values, piece = matrix
    record = write_file(quantised_file(piece), tmp_path, no_progress, threading.Event())
    codes, scales = quantise(values, (128, 128))
    due = b"8 bytes." + scales.numpy().tobytes() + codes.contiguous().view(torch.uint8).numpy().tobytes() + b"end"
    assert (tmp_path / "out").read_bytes() == due
    assert (record.bytes, record.xxh3_128) == (len(due), xxhash.xxh3_128_hexdigest(due))


def test_a_plan_that_leaves_bytes_out_is_no_file(matrix: tuple[torch.Tensor, Piece], tmp_path: Path) -> None:
    file = quantised_file(matrix[1])
    short = OutputFile(file.name, file.size, file.parts[:2])
    with pytest.raises(RuntimeError, match="60032 bytes written where the plan has 60035"):
        write_file(short, tmp_path, no_progress, threading.Event())
    assert not list(tmp_path.glob("out*"))


def test_writes_end_at_multiples_of_a_block(
    matrix: tuple[torch.Tensor, Piece], tmp_path: Path, monkeypatch: Any
) -> None:
    spans, real = [], os.pwrite

    def pwrite(handle: int, data: memoryview, at: int) -> int:
        spans.append((at, at + len(data)))
        return real(handle, data, at)

    monkeypatch.setattr(os, "pwrite", pwrite)
    monkeypatch.setattr(write, "WRITE", 4096)
    copied = Target("w", "BF16", (300, 200), (matrix[1],))
    file = OutputFile("out", 100 + 120_000, (Part(0, b"x" * 100), Part(100, copied)))
    write_file(file, tmp_path, no_progress, threading.Event())
    assert (tmp_path / "out").read_bytes() == b"x" * 100 + (tmp_path / "values").read_bytes()[4:]
    assert all(first // 4096 == (last - 1) // 4096 for first, last in spans)
    assert len(spans) == 2 + 120_100 // 4096


def hashed(file: OutputFile, state: str = "1 2") -> str:
    return plan_hash(file, lambda _: state)


def changes(piece: Piece) -> Iterator[OutputFile]:
    """Files that hold something else than the first."""

    def file(pieces: tuple[Piece, ...], **of: Any) -> OutputFile:
        return OutputFile("out", 9, (Part(0, b"head"), Part(4, Target("w", "BF16", (300, 200), pieces, **of), 7)))

    first = (piece,)
    stored = Stored("s", "F32", (3, 2), (Chunk(piece.file, 9, (0, 0), (3, 2)),))
    other = Stored("s", "F32", (3, 2), (Chunk(piece.file, 8, (0, 0), (3, 2)),))
    yield file(first)
    yield OutputFile("out", 9, (Part(0, b"heal"), *file(first).parts[1:]))
    yield OutputFile("out", 9, (Part(0, b"head"), Part(5, Target("w", "BF16", (300, 200), first), 7)))
    yield OutputFile("out", 9, (Part(0, b"head"), Part(4, Target("w", "BF16", (300, 200), first), 6)))
    yield OutputFile("out", 9, (Part(0, b"head"), Part(4, Target("w", "BF16", (300, 200), first), 7, True)))
    yield OutputFile("out", 9, (Part(0, b"head"), Part(4, Target("w", "F32", (300, 200), first), 7)))
    yield file((Piece(0, 0, 300, 200, piece.file, 5, 400, "BF16"),))
    yield file((Piece(0, 0, 300, 200, piece.file + "2", 4, 400, "BF16"),))
    yield file((Piece(0, 0, 300, 200, piece.file, 4, 400, "F16"),))
    yield file((Piece(0, 0, 300, 200, piece.file, 4, 400, "BF16", Scale(stored, 0, 0)),))
    yield file((Piece(0, 0, 300, 200, piece.file, 4, 400, "BF16", Scale(stored, 128, 0)),))
    yield file((Piece(0, 0, 300, 200, piece.file, 4, 400, "BF16", Scale(other, 0, 0)),))
    yield file(first, quantise=Quantise("fp32", None))
    yield file(first, quantise=Quantise("power-of-2", None))
    yield file(first, quantise=Quantise("fp32", stored))


def test_a_plan_hash_changes_with_everything_that_the_file_depends_on(
    matrix: tuple[torch.Tensor, Piece], monkeypatch: Any
) -> None:
    files = list(changes(matrix[1]))
    found = [hashed(file) for file in files]
    assert len(set(found)) == len(files)
    assert found == [hashed(file) for file in changes(matrix[1])]
    assert not set(found) & {hashed(file, "1 3") for file in files}
    monkeypatch.setattr(write, "__version__", "another")
    assert not set(found) & {hashed(file) for file in files}


def pair(folder: Path, first: bytes, second: bytes, dtype: str = "U8") -> tuple[Stored, Stored]:
    """Two tensors that should be one another's copy."""
    made = []
    for name, data, kind in (("one", first, "U8"), ("two", second, dtype)):
        (folder / name).write_bytes(b"skip" + data)
        made.append(Stored(name, kind, (len(data),), (Chunk(str(folder / name), 4, (0,), (len(data),)),)))
    return made[0], made[1]


def test_copies_are_compared_to_the_last_byte(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(write, "BAND", 1000)
    data = np.random.default_rng(0).integers(0, 256, 2500, dtype=np.uint8).tobytes()
    write.check_equal(*pair(tmp_path, data, data))
    for at in (0, 999, 1000, 2499):
        other = bytearray(data)
        other[at] ^= 128
        with pytest.raises(UserError, match=r"two differs from one.*--no-mtp"):
            write.check_equal(*pair(tmp_path, data, bytes(other)))
    with pytest.raises(UserError, match="two differs"):
        write.check_equal(*pair(tmp_path, data, data, "I8"))
