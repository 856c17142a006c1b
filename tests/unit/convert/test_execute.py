"""The executor: what it streams is what slicing, torch's casts and the slow FP8 reference make of the same bytes."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_r1.config.errors import UserError
from megatron_r1.convert import execute
from megatron_r1.convert.execute import Buffer, Maker, Reader, buffer_bytes
from megatron_r1.convert.manifest import Blocks
from megatron_r1.convert.plan import Piece, Quantise, Scale, Target
from megatron_r1.convert.storage import TORCH_NAMES, Chunk, Stored
from megatron_r1.model.block_fp8 import dequantise, quantise

DTYPES = {name: getattr(torch, TORCH_NAMES[name]) for name in ("BF16", "F16", "F32", "F64", "F8_E4M3", "I64")}
FLOATS = ("BF16", "F16", "F32")


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def streamed(target: Target) -> bytes:
    maker = Maker()
    try:
        return b"".join(bytes(view) for view in maker.stream(target))
    finally:
        maker.close()


@dataclass(frozen=True)
class Disk:
    """Files with tensors."""

    folder: Path

    def put(self, value: torch.Tensor, before: int = 3, after: int = 0) -> tuple[str, int]:
        """(file, byte) of a new file that holds a tensor."""
        path = self.folder / str(len(list(self.folder.iterdir())))
        path.write_bytes(bytes(before) + raw(value) + bytes(after))
        return str(path), before

    def store(self, name: str, value: torch.Tensor, dtype: str) -> Stored:
        file, start = self.put(value)
        shape = tuple(value.shape)
        return Stored(name, dtype, shape, (Chunk(file, start, (0,) * len(shape), shape),))


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    return Disk(tmp_path)


def bounds(draw: random.Random, size: int) -> list[tuple[int, int]]:
    inner = sorted(draw.sample(range(1, size), min(size - 1, draw.randrange(3)))) if size > 1 else []
    return list(pairwise([0, *inner, size]))


@given(
    seed=st.integers(0, 2**32),
    rows=st.integers(1, 40),
    cols=st.integers(1, 40),
    source=st.sampled_from(FLOATS),
    dtype=st.sampled_from(FLOATS),
    band=st.sampled_from([1, 64, 700, 4 << 20]),
    row_reads=st.sampled_from([1, 4096]),
)
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_pieces_in_any_bands(
    seed: int, rows: int, cols: int, source: str, dtype: str, band: int, row_reads: int, tmp_path: Path
) -> None:
    """A matrix in a grid of boxes, each cut out of a wider matrix in its file, cast by torch."""
    disk, draw = Disk(tmp_path), random.Random(seed)
    value = torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)).to(DTYPES[source])
    pieces = []
    for top, bottom in bounds(draw, rows):
        for left, right in bounds(draw, cols):
            margin = draw.choice([0, 0, 5])
            wide = torch.zeros(bottom - top, right - left + 2 * margin, dtype=value.dtype)
            wide[:, margin : margin + right - left] = value[top:bottom, left:right]
            file, start = disk.put(wide)
            item = value.itemsize
            origin, stride = start + margin * item, wide.shape[1] * item
            pieces.append(Piece(top, left, bottom - top, right - left, file, origin, stride, source))
    target = Target("made", dtype, (rows, cols), tuple(pieces))
    assert target.operation == ("copy" if dtype == source else "cast")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(execute, "BAND", band)
        patch.setattr(execute, "_ROW_READS", row_reads)
        assert streamed(target) == raw(value.to(DTYPES[dtype]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_is_copied_bit_for_bit(dtype: str, disk: Disk) -> None:
    """NaNs with their payload, and -0.0, too; as whole rows and as a strided box."""
    width = 6
    size = 5 * (width + 2) * DTYPES[dtype].itemsize
    bits = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    value = bits.view(DTYPES[dtype]).view(5, width + 2)
    file, start = disk.put(value)
    item = value.itemsize
    whole = Piece(0, 0, 5, width + 2, file, start, (width + 2) * item, dtype)
    assert streamed(Target("whole", dtype, (5, width + 2), (whole,))) == raw(value)
    box = Piece(0, 0, 5, width, file, start + item, (width + 2) * item, dtype)
    assert streamed(Target("box", dtype, (5, width), (box,))) == raw(value[:, 1:-1])


def test_a_strided_box_at_the_very_end_of_its_file(disk: Disk) -> None:
    """No byte behind the last row is asked for."""
    value = torch.arange(24.0).view(4, 6)
    file, start = disk.put(value)
    piece = Piece(0, 0, 4, 3, file, start + 3 * 4, 6 * 4, "F32")
    assert streamed(Target("right half", "F32", (4, 3), (piece,))) == raw(value[:, 3:])


@pytest.mark.parametrize("shape", [(300, 200), (128, 128), (1, 1), (144, 130), (129, 7)])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("band", [1, 20_000])
def test_fp8_is_dequantised_as_the_reference_does(
    shape: tuple[int, int], dtype: str, band: int, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole, and boxes that begin inside of a block."""
    monkeypatch.setattr(execute, "BAND", band)
    codes, scale = quantise(torch.randn(*shape, generator=torch.Generator().manual_seed(2)), (128, 128))
    expected = dequantise(codes, scale, (128, 128)).to(DTYPES[dtype])
    scales = disk.store("scales", scale, "F32")
    file, start = disk.put(codes)
    rows, cols = shape
    for top, left in {(0, 0), (rows // 2, 0), (0, cols // 3), (rows - 1, cols - 1), (rows // 3, cols // 2)}:
        height, width = rows - top, cols - left
        piece = Piece(0, 0, height, width, file, start + top * cols + left, cols, "F8_E4M3", Scale(scales, top, left))
        target = Target("box", dtype, (height, width), (piece,))
        assert target.operation == "dequantise"
        assert streamed(target) == raw(expected[top:, left:])


@pytest.mark.parametrize("scales", ["fp32", "power-of-2"])
@pytest.mark.parametrize("band", [1, 60_000, 4 << 20])
def test_values_are_quantised_as_the_reference_does(
    scales: str, band: int, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(execute, "BAND", band)
    value = torch.randn(300, 200, generator=torch.Generator().manual_seed(3)).bfloat16()
    value[:128, :128] = 0
    file, start = disk.put(value)
    halves = tuple(Piece(r, 0, 150, 200, file, start + r * 400, 400, "BF16") for r in (0, 150))
    target = Target("made", "F8_E4M3", (300, 200), halves, Quantise(scales, None))  # type: ignore[arg-type]
    codes, scale = quantise(value, (128, 128), scales)  # type: ignore[arg-type]
    maker = Maker()
    assert b"".join(bytes(view) for view in maker.stream(target)) == raw(codes)
    assert maker.scales is not None and torch.equal(maker.scales, scale)
    assert target.scale_shape() == tuple(scale.shape) and target.operation == "quantise"


def test_kept_scales_stay_where_they_give_the_same_values(disk: Disk) -> None:
    """The values of FP8 codes under scales that a fresh quantisation would not choose, one block of them changed."""
    value = torch.randn(256, 384, generator=torch.Generator().manual_seed(4))
    codes, scale = quantise(value, (128, 128))
    kept = scale * 1.25
    held = dequantise(codes, kept, (128, 128)).bfloat16()
    held[130, 10] = 99
    file, start = disk.put(held)
    piece = Piece(0, 0, 256, 384, file, start, 768, "BF16")
    target = Target("made", "F8_E4M3", (256, 384), (piece,), Quantise("fp32", disk.store("kept", kept, "F32")))
    maker = Maker()
    found = torch.frombuffer(bytearray(b"".join(bytes(v) for v in maker.stream(target))), dtype=torch.uint8)
    fresh, fresh_scale = quantise(held, (128, 128))
    expected, expected_scale = codes.clone(), kept.clone()
    expected[128:, :128], expected_scale[1, 0] = fresh[128:, :128], fresh_scale[1, 0]
    assert maker.scales is not None and torch.equal(maker.scales, expected_scale)
    assert maker.blocks == Blocks(kept=5, new=1)
    assert torch.equal(found.view(256, 384), expected.view(torch.uint8))


def test_what_cannot_be_converted_is_named(disk: Disk) -> None:
    value = torch.zeros(130, 10, dtype=torch.bfloat16)
    value[129, 4] = torch.inf
    file, start = disk.put(value)
    piece = Piece(0, 0, 130, 10, file, start, 20, "BF16")
    with pytest.raises(UserError, match=r"lm_head cannot be quantised: .*row 129, column 4"):
        streamed(Target("lm_head", "F8_E4M3", (130, 10), (piece,), Quantise("fp32", None)))
    codes = torch.zeros(130, 10, dtype=torch.uint8)
    codes[128, 7] = 0x7F
    file, start = disk.put(codes)
    scales = disk.store("scales", torch.ones(2, 1), "F32")
    piece = Piece(0, 0, 130, 10, file, start, 10, "F8_E4M3", Scale(scales, 0, 0))
    with pytest.raises(UserError, match=rf"lm_head: {file}: .*row 128, column 7"):
        streamed(Target("lm_head", "BF16", (130, 10), (piece,)))


# (from, to): the largest number that stays finite, and the next one of the source's dtype.
NARROWED = {
    ("F32", "F16"): (65519.99609375, 65520.0),
    ("BF16", "F16"): (65280.0, 65536.0),
    ("F32", "BF16"): (float.fromhex("0x1.fefffep127"), float.fromhex("0x1.ffp127")),
}


@pytest.mark.parametrize(("source", "dtype"), NARROWED)
def test_numbers_that_would_become_infinities_are_named(source: str, dtype: str, disk: Disk) -> None:
    """Those that just fit are cast, infinities and NaNs that were there are carried on."""
    fits, beyond = NARROWED[source, dtype]
    value = torch.ones(40, 6, dtype=DTYPES[source])
    value[3, 4], value[5, 5], value[6, 0] = -fits, torch.inf, torch.nan
    assert value[3, 4].item() == -fits and value[3, 4].to(DTYPES[dtype]).isfinite()

    def target() -> Target:
        file, start = disk.put(value)
        width = value.itemsize * 6
        pieces = tuple(Piece(r, 0, 20, 6, file, start + r * width, width, source) for r in (0, 20))
        return Target("made", dtype, (40, 6), pieces)

    assert streamed(target()) == raw(value.to(DTYPES[dtype]))
    value[27, 2] = -beyond
    assert value[27, 2].to(DTYPES[dtype]).isinf()
    with pytest.raises(
        UserError, match=rf"made: -.* at row 27, column 2 is beyond the range of b?float16 \({disk.folder}"
    ):
        streamed(target())


def test_fp8_that_does_not_fit_is_named(disk: Disk) -> None:
    codes, scale = torch.full((130, 200), 0x7E, dtype=torch.uint8), torch.ones(2, 2)
    scale[1, 1] = 147  # 448 * 147 is more than float16 has
    file, start = disk.put(codes)
    piece = Piece(0, 0, 130, 200, file, start, 200, "F8_E4M3", Scale(disk.store("scales", scale, "F32"), 0, 0))
    assert streamed(Target("made", "BF16", (130, 200), (piece,)))
    with pytest.raises(UserError, match=rf"made: {file}: a value beyond the range of float16 at row 128, column 128"):
        streamed(Target("made", "F16", (130, 200), (piece,)))


def test_a_file_that_is_cut_or_gone_is_named(disk: Disk) -> None:
    file, start = disk.put(torch.ones(4, 6))
    target = Target("cut", "F32", (5, 6), (Piece(0, 0, 5, 6, file, start, 24, "F32"),))
    with pytest.raises(UserError, match=rf"{file} ends at byte 99"):
        streamed(target)
    gone = Target("gone", "F32", (1, 1), (Piece(0, 0, 1, 1, f"{disk.folder}/none", 0, 4, "F32"),))
    with pytest.raises(UserError, match=rf"{disk.folder}/none.*No such file"):
        streamed(gone)


def test_few_files_stay_open(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execute, "_OPEN_FILES", 3)
    files = [disk.put(torch.tensor([float(i)])) for i in range(10)]
    reader, into = Reader(), bytearray(4)
    for _ in range(2):
        for i, (file, start) in enumerate(files):
            reader.read(file, start, memoryview(into))
            assert torch.frombuffer(into, dtype=torch.float32).item() == i
            assert len(reader._open) <= 3
    reader.close()
    assert not reader._open


def test_buffers_are_used_again() -> None:
    buffer = Buffer()
    large = buffer.take(100)
    assert buffer.take(40).base is large.base and len(buffer.take(40)) == 40
    assert len(buffer.take(101)) == 101


def test_memory_is_bounded_by_bands(disk: Disk) -> None:
    """Whatever the tensor: what is asked for is about two bands, and what a maker allocates is no more."""
    value = torch.zeros(3000, 1024)  # 12 MB
    file, start = disk.put(value)
    piece = Piece(0, 0, 3000, 1024, file, start, 4096, "F32")
    copied, cast = (Target("x", dtype, (3000, 1024), (piece,)) for dtype in ("F32", "BF16"))
    assert buffer_bytes(copied) == execute.BAND
    assert buffer_bytes(cast) <= 3 * execute.BAND
    maker = Maker()
    for target in (copied, cast):
        assert max(len(view) for view in maker.stream(target)) <= execute.BAND
    assert sum(buffer._bytes.nbytes for buffer in (maker._band, maker._raw, maker._codes)) <= 3 * execute.BAND
