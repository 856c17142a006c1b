"""Block-FP8 on raw rows, fast on one CPU thread: the bits of `model/block_fp8.py`, in reused memory.

The executor hands over rows as they come from the disk and gets rows to write. Matrices lie in blocks of 128x128 with a
float32 scale each (DeepSeek's `weight_scale_inv`): value = code * scale. Rows are computed in strips that stay in the
processor's second-level cache, in buffers that are made once (`Scratch`): fresh memory costs more than the arithmetic.
torch would split a strip over its threads; callers that have workers of their own call torch.set_num_threads(1).

torch's cast from E4M3 takes one value at a time. Here bits do it: a code's sign and 7 magnitude bits, put where float16
has its sign, its low exponent and its high mantissa bits, are float16's spelling of value / 256, exactly and for
subnormal codes too. Only the two NaN codes would become numbers, so they are looked for first.

Shapes: R rows, C columns of a matrix or a part of it; P, Q blocks down and across.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from megatron_r1.convert.plan import SCALES
from megatron_r1.convert.storage import TORCH_NAMES
from megatron_r1.model.block_fp8 import E4M3_MAX, Scales, block_scales
from megatron_r1.model.precision import BLOCK

STRIP = 128 * 1024  # elements computed at a time: about 1 MiB with what is read and written
DTYPES = (torch.bfloat16, torch.float16, torch.float32)  # of values
_BITS = {2: (torch.int16, np.uint16), 4: (torch.int32, np.uint32)}  # by bytes of an element


class NotFinite(ValueError):
    """A NaN or an infinity, given or about to be made; `row` and `column` are its place in the matrix."""

    def __init__(self, what: str, row: int, column: int) -> None:
        super().__init__(f"{what} at row {row}, column {column}")
        self.row, self.column = row, column


class Scratch:
    """The buffers of one thread, for strips of up to `elements`, or of one row where that is longer."""

    def __init__(self, elements: int = STRIP) -> None:
        self._elements = elements
        self._allocate(elements)

    @property
    def bytes(self) -> int:
        """Their memory."""
        return self._bits.nbytes + self._floats.nbytes + self._again.nbytes + self._differs.nbytes

    def strips(self, rows: int, width: int) -> Iterator[slice]:
        """Slices of so many rows, and with each of them the buffers in its shape."""
        if width > len(self._floats):
            self._allocate(width)
        step = max(1, self._elements // width)
        for start in range(0, rows, step):
            strip = slice(start, min(start + step, rows))
            self._fit(strip.stop - strip.start, width)
            yield strip

    def values(self, codes: torch.Tensor) -> torch.Tensor:
        """float32, in `floats`: the values / 256 of a strip of E4M3 codes (int8, so that the sign is carried on)."""
        self.bits.copy_(codes).bitwise_left_shift_(7).bitwise_and_(~0x4000)
        return self.floats.copy_(self.halves)

    def _allocate(self, elements: int) -> None:
        self._bits = torch.empty(elements, dtype=torch.int16)
        self._floats = torch.empty(elements, dtype=torch.float32)
        self._again = torch.empty(elements, dtype=torch.float32)
        self._differs = np.empty(elements, dtype=np.bool_)
        self._shape = (0, 0)

    def _fit(self, rows: int, width: int) -> None:
        shape = (rows, width)
        if self._shape != shape:
            count = rows * width
            self.bits = self._bits[:count].view(shape)
            self.halves = self.bits.view(torch.float16)
            self.floats = self._floats[:count].view(shape)
            self.again = {dtype: self._again.view(dtype)[:count].view(shape) for dtype in DTYPES}
            self.differs = self._differs[:count].reshape(shape)
            self._shape = shape


def decode_scales(raw: bytes | np.ndarray, dtype: str, shape: Sequence[int]) -> torch.Tensor:
    """float32 scales of `shape` from their bytes on disk; the result owns its memory.

    dtype: one of SCALES, safetensors' names; F8_E8M0 is a byte e for 2^(e - 127), 255 for NaN. Raises ValueError
    for another one.
    """
    if dtype not in SCALES:
        raise ValueError(f"scales of dtype {dtype}; known are {', '.join(SCALES)}")
    return torch.frombuffer(bytearray(raw), dtype=getattr(torch, TORCH_NAMES[dtype])).float().reshape(*shape)


def dequantise_rows(
    codes: torch.Tensor,
    scale: torch.Tensor,
    out: torch.Tensor,
    scratch: Scratch,
    *,
    first_row: int = 0,
    first_column: int = 0,
) -> None:
    """Values of a part of a matrix: code * scale of its block in float32, then rounded once to `out`'s dtype.

    Args:
        codes: uint8 [R, C], E4M3 codes.
        scale: float32 [P, Q] of the whole matrix.
        out: bfloat16, float16 or float32 [R, C], written.
        scratch: this thread's.
        first_row: the part's first row in the matrix, anywhere in a block.
        first_column: its first column, likewise.

    Raises NotFinite for a NaN code, a scale that is not finite, and a value beyond the largest of `out`'s dtype.
    """
    largest = torch.finfo(out.dtype).max
    height, width = codes.shape
    signed = codes.view(torch.int8)
    top = 0
    while top < height:
        block = (first_row + top) // BLOCK
        bottom = min(height, (block + 1) * BLOCK - first_row)
        _refuse_nan_codes(codes[top:bottom], first_row + top, first_column)
        factor = _spread(scale[block], first_column, width)
        magnitude = float(factor.abs().amax())
        small = magnitude < 2.0**120  # times 256 is within float32
        if small:
            factor.mul_(256)
        else:
            _refuse(~torch.isfinite(factor[None]), "a scale that is not finite", first_row + top, first_column)
        for strip in scratch.strips(bottom - top, width):
            values = scratch.values(signed[top:bottom][strip])
            if not small:
                values.mul_(256)
            out[top:bottom][strip] = values.mul_(factor)
        if E4M3_MAX * magnitude > largest:
            made = out[top:bottom]
            _refuse(~torch.isfinite(made), f"a value beyond the range of {_name(out)}", first_row + top, first_column)
        top = bottom


def quantise_rows(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    scratch: Scratch,
    *,
    scales: Scales = "fp32",
    kept: torch.Tensor | None = None,
    first_row: int = 0,
) -> int:
    """E4M3 codes and scales of whole rows that begin a block; bit for bit `block_fp8.quantise`, apart from kept blocks.
    Returns how many blocks were kept.

    A block keeps its scale from `kept` where rounding to it and back (`dequantise_rows`) gives x to the bit, -0.0 too;
    every other block gets `block_scales` of its values. So a matrix that came from FP8 and was left alone goes back to
    the bytes that it had. Exactly: x = dequantise_rows(codes, kept) keeps every block whose scale can be kept (below),
    and gets back the very codes wherever no two codes of E4M3 come to one value of x's dtype, for which it is enough
    that scale >= 512 times the dtype's smallest subnormal (4.7e-38 bf16, 3.1e-5 fp16, 7.2e-43 fp32). Under that, x
    cannot tell some codes apart (in bf16 with a scale near 1e-39, or in fp16 at 1e-6): the scale still stays, and the
    codes are others for the same values.

    A float32 block is also kept where x is what the codes and the scale give after rounding to bfloat16: weights that
    went through BF16 on their way into a run that saves float32.

    Args:
        x: bfloat16, float16 or float32 [R, C]; finite. Only the last block of rows may be partial.
        codes: uint8 [R, C], written.
        scale: float32 [P, Q] of these rows' blocks, written.
        scratch: this thread's.
        scales: see `block_scales`.
        kept: float32 [P, Q] or None. One that is negative, or whose 448-fold is not finite in x's dtype, is not kept;
            0 is, for a block of zeros.
        first_row: the first row's place in the matrix, for messages.

    Raises NotFinite for a NaN or an infinity.
    """
    count = 0
    for block, top in enumerate(range(0, x.shape[0], BLOCK)):
        band, written = x[top : top + BLOCK], codes[top : top + BLOCK]
        stays = None
        if kept is not None:
            stays = _reproduces(band, kept[block], written, scratch)
            count += int(stays.sum())
            if bool(stays.all()):
                scale[block] = kept[block]
                continue
        fresh = block_scales(_block_amax(band, first_row + top), scales)
        scale[block] = fresh if stays is None or kept is None else torch.where(stays, kept[block], fresh)
        spread = _divisors(scale[block], x.shape[1])
        for strip in scratch.strips(len(band), x.shape[1]):
            _round(band[strip], spread, written[strip], scratch)
    return count


def largest_magnitude(x: torch.Tensor) -> float:
    """Of bfloat16, float16 or float32 values; NaN where there is one. By the bits, as `_block_amax`."""
    bits = _bits(x)
    top = max(int(bits.max()), int(bits.view(_BITS[bits.itemsize][1]).max()) & np.iinfo(bits.dtype).max)
    return float(torch.from_numpy(np.array(top, dtype=bits.dtype)).view(x.dtype))


def _reproduces(band: torch.Tensor, kept: torch.Tensor, codes: torch.Tensor, scratch: Scratch) -> torch.Tensor:
    """bool [Q]: blocks of a band [r, C] that these scales give back; only their codes are as they should be."""
    width = band.shape[1]
    forms = (torch.float32, torch.bfloat16) if band.dtype == torch.float32 else (band.dtype,)
    differs = [~((kept >= 0) & torch.isfinite((kept * E4M3_MAX).to(form))).numpy() for form in forms]
    spread, factor = _divisors(kept, width), _spread(kept, 0, width) * 256
    blocks = np.arange(0, width, BLOCK)
    signed, given = codes.view(torch.int8), _bits(band)
    for strip in scratch.strips(len(band), width):
        _round(band[strip], spread, codes[strip], scratch)
        values = scratch.values(signed[strip]).mul_(factor)
        for form, wrong in zip(forms, differs, strict=True):
            again = scratch.again[form].copy_(values)
            if form != band.dtype:
                again = values.copy_(again)
            columns = np.not_equal(given[strip], _bits(again), out=scratch.differs).any(axis=0)
            wrong |= np.logical_or.reduceat(columns, blocks)
        if all(wrong.all() for wrong in differs):
            break  # a trained matrix is found out after its first strip
    return torch.from_numpy(~np.logical_and.reduce(differs))


def _round(x: torch.Tensor, spread: torch.Tensor, codes: torch.Tensor, scratch: Scratch) -> None:
    """Codes of a strip, its scales spread over the columns; clamped, as not every torch's cast turns 500 into 448."""
    unit = scratch.floats.copy_(x).div_(spread).clamp_(-E4M3_MAX, E4M3_MAX)
    codes.view(torch.float8_e4m3fn).copy_(unit)


def _divisors(scale: torch.Tensor, width: int) -> torch.Tensor:
    """float32 [C]: what the values of each column are divided by; 1 for a scale of 0, which only zeros have."""
    return _spread(torch.where(scale == 0, 1.0, scale), 0, width)


def _name(x: torch.Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def _spread(scale: torch.Tensor, first_column: int, width: int) -> torch.Tensor:
    """float32 [C]: the scale of each column, of one row of blocks [Q]."""
    last = -(-(first_column + width) // BLOCK)
    start = first_column // BLOCK
    return scale[start:last].repeat_interleave(BLOCK)[first_column - start * BLOCK :][:width]


def _block_amax(band: torch.Tensor, first_row: int) -> torch.Tensor:
    """float32 [Q]: the largest magnitude of each block of a band [r, C] with r <= 128; raises NotFinite.

    Without their sign, the bits of floats are ordered as integers. With it, the largest signed integer is the largest
    positive number and the largest unsigned one the negative number of the largest magnitude; where a block has only
    one sign, either finds it. So two reductions do, and no copy without signs.
    """
    bits = _bits(band)
    unsigned = bits.view(_BITS[bits.itemsize][1])
    blocks = np.arange(0, band.shape[1], BLOCK)
    magnitude = np.iinfo(bits.dtype).max
    largest = [np.maximum.reduceat(each.max(axis=0), blocks) & magnitude for each in (bits, unsigned)]
    amax = torch.from_numpy(np.maximum(*(each.astype(bits.dtype) for each in largest))).view(band.dtype).float()
    if not bool(torch.isfinite(amax).all()):
        _refuse(~torch.isfinite(band), "a value that is not finite", first_row, 0)
    return amax


def _bits(x: torch.Tensor) -> np.ndarray[Any, Any]:
    return x.view(_BITS[x.element_size()][0]).numpy()


def _refuse_nan_codes(codes: torch.Tensor, first_row: int, first_column: int) -> None:
    """0x7F is the largest signed byte, 0xFF the largest unsigned one: two reductions find them."""
    unsigned = codes.numpy()
    if unsigned.max(initial=0) == 0xFF or unsigned.view(np.int8).max(initial=0) == 0x7F:
        _refuse(codes & 0x7F == 0x7F, "the E4M3 code of NaN", first_row, first_column)


def _refuse(wrong: torch.Tensor, what: str, first_row: int, first_column: int) -> None:
    """Raise NotFinite for the first place that is wrong, if any; `wrong` is bool [r, C]."""
    places = wrong.nonzero()
    if len(places):
        row, column = places[0].tolist()
        raise NotFinite(what, first_row + row, first_column + column)
