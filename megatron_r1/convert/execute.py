"""Carries a plan out: streams every tensor through reused buffers, in bands of rows.

Memory is a few buffers a worker, whatever the size of tensor, shard or model. Bytes that nobody has to change go
from `pread` to `pwrite`; the others pass one kernel on the way. `stream` yields a tensor's bytes in order, so the same
code writes a file (`write.py`), compares one (`verify.py`) and fills a parameter (`load.py`).
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from megatron_r1.config.errors import UserError
from megatron_r1.convert import fp8
from megatron_r1.convert.manifest import Blocks, disk_errors
from megatron_r1.convert.plan import BLOCK, Piece, Target
from megatron_r1.convert.storage import ITEMSIZE, TORCH_NAMES, Stored

BAND = 4 << 20  # bytes of a band: larger than caches gain from, small beside the imports
_OPEN_FILES = 128
_ROW_READS = 4096  # bytes of a row from which rows are read one by one rather than with what lies between them


_LIMITS = {"F16": 65520.0, "BF16": float.fromhex("0x1.ffp127")}  # from here on, values round to infinity


class Reader:
    """Reads byte ranges of many files, the last few of which stay open. Not for several threads."""

    def __init__(self) -> None:
        self._open: OrderedDict[str, int] = OrderedDict()

    def read(self, file: str, start: int, into: memoryview) -> None:
        """Fill `into` from byte `start` on. Raises UserError where the file ends before, and as `disk_errors`."""
        try:
            handle = self._handle(file)
            while len(into):
                count = os.preadv(handle, [into], start)
                if count == 0:
                    raise UserError(f"{file} ends at byte {start}, within a tensor: it is truncated; copy it again")
                into, start = into[count:], start + count
        except OSError as error:
            with disk_errors(Path(file)):
                raise error

    def close(self) -> None:
        """Close all files."""
        while self._open:
            os.close(self._open.popitem()[1])

    def _handle(self, file: str) -> int:
        handle = self._open.get(file)
        if handle is None:
            if len(self._open) >= _OPEN_FILES:
                os.close(self._open.popitem(last=False)[1])
            handle = self._open[file] = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        self._open.move_to_end(file)
        return handle


class Buffer:
    """Memory that grows to the largest size asked for and is used again: fresh pages cost more than the copy."""

    def __init__(self) -> None:
        self._bytes = np.empty(0, np.uint8)

    def take(self, size: int) -> np.ndarray:
        """uint8 [size], with whatever was in it."""
        if self._bytes.size < size:
            self._bytes = np.empty(size, np.uint8)
        return self._bytes[:size]


class Maker:
    """Makes targets from their pieces; one a thread."""

    def __init__(self) -> None:
        self.reader = Reader()
        self.scales: torch.Tensor | None = None  # of the quantised target that was streamed last
        self.blocks = Blocks()  # of that target
        self._band, self._raw, self._codes = Buffer(), Buffer(), Buffer()
        self._scratch = fp8.Scratch()
        self._scale_of: tuple[Stored | None, torch.Tensor] = (None, torch.empty(0))

    def stream(self, target: Target) -> Iterator[memoryview]:
        """The bytes of a target in order, each view valid until the next. Raises UserError for an unusable source."""
        if target.quantise is not None:
            yield from self._quantised(target)
        elif target.operation == "copy" and all(_whole_rows(piece, target.cols) for piece in target.pieces):
            yield from self._copied(target)
        else:
            for first, last in _bands(target, target.dtype):
                yield _bytes(self.rows(target, first, last, target.dtype))

    def rows(self, target: Target, first: int, last: int, dtype: str, into: torch.Tensor | None = None) -> torch.Tensor:
        """[last - first, columns] of a target in this dtype, in `into` or a buffer that the next call uses again."""
        if into is None:
            item = ITEMSIZE[dtype]
            flat = self._band.take((last - first) * target.cols * item)
            into = _tensor(flat, dtype, (last - first, target.cols))
        for piece in target.pieces:
            low, high = max(first, piece.row), min(last, piece.row + piece.rows)
            if low < high:
                box = into[low - first : high - first, piece.col : piece.col + piece.cols]
                self._fill(piece, low - piece.row, box, dtype, target.name)
        return into

    def close(self) -> None:
        """Close the files it has open."""
        self.reader.close()

    def _copied(self, target: Target) -> Iterator[memoryview]:
        band, filled = self._band.take(min(BAND, target.bytes)).data, 0
        for piece in target.pieces:
            at, end = piece.start, piece.start + piece.bytes
            while at < end:
                view = band[filled : filled + end - at]
                self.reader.read(piece.file, at, view)
                at, filled = at + len(view), filled + len(view)
                if filled == len(band):
                    yield band
                    filled = 0
        if filled:
            yield band[:filled]

    def _quantised(self, target: Target) -> Iterator[memoryview]:
        rule, source = target.quantise, target.pieces[0].dtype
        assert rule is not None
        scales, held = torch.empty(target.scale_shape(), dtype=torch.float32), 0
        kept = None if rule.kept is None else self.scale(rule.kept)
        for first, last in _bands(target, source, multiple=BLOCK):
            values = self.rows(target, first, last, source)
            codes = _tensor(self._codes.take(values.numel()), "U8", tuple(values.shape))
            own = slice(first // BLOCK, -(-last // BLOCK))
            try:
                held += fp8.quantise_rows(
                    values,
                    codes,
                    scales[own],
                    self._scratch,
                    scales=rule.scales,
                    kept=None if kept is None else kept[own],
                    first_row=first,
                )
            except fp8.NotFinite as error:
                raise UserError(f"{target.name} cannot be quantised: {error}") from error
            yield _bytes(codes)
        self.scales, self.blocks = scales, Blocks(held, scales.numel() - held)

    def scale(self, stored: Stored) -> torch.Tensor:
        """float32 [ceil(rows / 128), ceil(columns / 128)] of a scale tensor; the last one is kept."""
        if self._scale_of[0] is not stored:
            raw = np.empty(stored.bytes, np.uint8)
            self.reader.read(stored.chunks[0].file, stored.chunks[0].start, raw.data)
            self._scale_of = stored, fp8.decode_scales(raw, stored.dtype, stored.shape)
        return self._scale_of[1]

    def _fill(self, piece: Piece, row: int, box: torch.Tensor, dtype: str, name: str) -> None:
        """Rows of a piece, from its row `row` on, into a box of the target."""
        count = box.shape[0]
        if (
            piece.scale is None
            and piece.dtype == dtype
            and box.is_contiguous()
            and box.device.type == "cpu"
            and _whole_rows(piece, piece.cols)
        ):
            self.reader.read(piece.file, piece.start + row * piece.stride, _bytes(box))
            return
        raw = self._read_rows(piece, row, count)
        if piece.scale is None:
            if dtype in _LIMITS and (piece.dtype == "F32" or (piece.dtype, dtype) == ("BF16", "F16")):
                _refuse_overflow(raw, dtype, name, piece, row)
            box.copy_(raw)
            return
        try:
            fp8.dequantise_rows(
                raw.view(torch.uint8),
                self.scale(piece.scale.stored),
                box,
                self._scratch,
                first_row=piece.scale.row + row,
                first_column=piece.scale.col,
            )
        except fp8.NotFinite as error:
            raise UserError(f"{name}: {piece.file}: {error}") from error

    def _read_rows(self, piece: Piece, row: int, count: int) -> torch.Tensor:
        """[count, piece.cols] in the dtype of the piece, in a buffer that the next call uses again."""
        width = piece.cols * ITEMSIZE[piece.dtype]
        start = piece.start + row * piece.stride
        if piece.stride == width or width < _ROW_READS:
            # Rows and what lies between them, except behind the last, where the file may end.
            size = (count - 1) * piece.stride + width
            raw = self._raw.take(count * piece.stride)
            self.reader.read(piece.file, start, raw[:size].data)
            rows = raw.reshape(count, piece.stride)[:, :width]
        else:
            rows = self._raw.take(count * width).reshape(count, width)
            for i in range(count):
                self.reader.read(piece.file, start + i * piece.stride, rows[i].data)
        return torch.from_numpy(rows).view(getattr(torch, TORCH_NAMES[piece.dtype]))


def _refuse_overflow(values: torch.Tensor, dtype: str, name: str, piece: Piece, row: int) -> None:
    """Raise UserError where rows of a piece, from its row `row` on, hold a number that would become an infinity."""
    if fp8.largest_magnitude(values) < _LIMITS[dtype]:
        return
    places = (torch.isfinite(values) & (values.abs() >= _LIMITS[dtype])).nonzero()
    if len(places):
        i, j = places[0].tolist()
        raise UserError(
            f"{name}: {float(values[i, j]):g} at row {piece.row + row + i}, column {piece.col + j} is beyond the range "
            f"of {TORCH_NAMES[dtype]} ({piece.file}). Choose another --dtype"
        )


def buffer_bytes(target: Target) -> int:
    """Memory of the buffers that making this target takes, about."""
    if target.operation == "copy" and all(_whole_rows(piece, target.cols) for piece in target.pieces):
        return min(BAND, target.bytes)
    dtype = target.pieces[0].dtype if target.quantise is not None else target.dtype
    first, last = next(_bands(target, dtype, BLOCK if target.quantise is not None else 1), (0, 0))
    widest = max((ITEMSIZE[piece.dtype] for piece in target.pieces), default=0) + ITEMSIZE[target.dtype]
    return (last - first) * target.cols * widest


def _whole_rows(piece: Piece, cols: int) -> bool:
    """Whether the piece's rows are so wide and lie behind each other."""
    return piece.scale is None and piece.cols == cols and piece.stride == cols * ITEMSIZE[piece.dtype]


def _bands(target: Target, dtype: str, multiple: int = 1) -> Iterator[tuple[int, int]]:
    """(first, last) rows of bands of about BAND bytes."""
    rows = max(1, BAND // max(1, target.cols * ITEMSIZE[dtype]))
    rows = max(multiple, rows // multiple * multiple)
    for first in range(0, target.rows, rows):
        yield first, min(first + rows, target.rows)


def _tensor(flat: np.ndarray, dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.from_numpy(flat).view(getattr(torch, TORCH_NAMES[dtype])).view(shape)


def _bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor."""
    return tensor.view(torch.uint8).view(-1).numpy().data
