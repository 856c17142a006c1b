"""The fast block-FP8 kernels give the bits of the slow ones in `model/block_fp8.py`; what is not finite is refused."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_r1.convert import fp8
from megatron_r1.convert.fp8 import (
    NotFinite,
    Scratch,
    decode_scales,
    dequantise_rows,
    largest_magnitude,
    quantise_rows,
)
from megatron_r1.model.block_fp8 import E4M3_MAX, Scales, dequantise, quantise

BLOCK = (128, 128)
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
CODES = torch.tensor([code for code in range(256) if code & 0x7F != 0x7F], dtype=torch.uint8)  # all finite ones
SMALLEST = {torch.bfloat16: 2.0**-133, torch.float16: 2.0**-24, torch.float32: 2.0**-149}  # subnormals
SCRATCH = Scratch()  # one for all tests: what an earlier call left in it must not matter

examples = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
seeds = st.integers(0, 2**31)
dtypes = st.sampled_from(DTYPES)
heights = st.sampled_from([1, 64, 127, 128, 129, 200, 300])  # 576 rows, a partial block, has its own test
widths = st.sampled_from([1, 16, 100, 128, 130, 260])
sizes = st.sampled_from([1, 1000, fp8.STRIP])  # strips of one row, of a few, of a block
scale_kinds: Any = st.sampled_from(["fp32", "power-of-2"])


def blocks(count: int) -> int:
    return math.ceil(count / 128)


def bits(x: torch.Tensor) -> torch.Tensor:
    """The same bytes as integers: -0.0 and 0.0 differ."""
    return x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.element_size()])


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(bits(one), bits(other))


def draw_codes(draw: torch.Generator, rows: int, columns: int) -> torch.Tensor:
    return CODES[torch.randint(0, len(CODES), (rows, columns), generator=draw)]


def draw_scale(draw: torch.Generator, rows: int, columns: int, low: float, high: float) -> torch.Tensor:
    """float32 [P, Q], log-uniform between 2^low and 2^high."""
    exponent = low + (high - low) * torch.rand(blocks(rows), blocks(columns), generator=draw, dtype=torch.float64)
    return torch.exp2(exponent).float()


def draw_values(draw: torch.Generator, rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Blocks of every magnitude of the dtype, among them zeros, one huge value, subnormals and -0.0."""
    info = torch.finfo(dtype)
    x = torch.randn(rows, columns, generator=draw, dtype=torch.float64)
    x *= torch.exp(2 * torch.randn(rows, columns, generator=draw, dtype=torch.float64))
    low, high = math.log2(SMALLEST[dtype]), math.log2(info.max) - 12
    x *= (
        draw_scale(draw, rows, columns, low, high)
        .double()
        .repeat_interleave(128, 0)
        .repeat_interleave(128, 1)[:rows, :columns]
    )
    x[torch.rand(rows, columns, generator=draw) < 0.1] = -0.0
    top = 128 * int(torch.randint(0, blocks(rows), (1,), generator=draw))
    left = 128 * int(torch.randint(0, blocks(columns), (1,), generator=draw))
    kind = int(torch.randint(0, 4, (1,), generator=draw))
    if kind == 1:
        x[top : top + 128, left : left + 128] = 0
    elif kind == 2:
        x[top, left] = -info.max
    elif kind == 3:
        x[top : top + 128, left : left + 128] = -x[top : top + 128, left : left + 128].abs()  # one sign only
    return x.clamp(-info.max, info.max).to(dtype)


def reference_values(codes: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return dequantise(codes.view(torch.float8_e4m3fn), scale, BLOCK).to(dtype)


def fast_values(codes: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype, scratch: Scratch = SCRATCH) -> Any:
    out = torch.full(codes.shape, 7.0, dtype=dtype)
    dequantise_rows(codes, scale, out, scratch)
    return out


def first_infinity(values: torch.Tensor) -> list[int] | None:
    """(row, column) of the first block of rows' first infinity: where dequantise_rows stops."""
    places = torch.isinf(values).nonzero()
    return places[0].tolist() if len(places) else None


def fast_codes(x: torch.Tensor, scales: Scales, kept: torch.Tensor | None, scratch: Scratch = SCRATCH) -> Any:
    codes = torch.full(x.shape, 99, dtype=torch.uint8)
    scale = torch.full((blocks(x.shape[0]), blocks(x.shape[1])), 7.0)
    quantise_rows(x, codes, scale, scratch, scales=scales, kept=kept)
    return codes, scale


def reference_codes(x: torch.Tensor, scales: Scales, kept: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The rule of kept scales written out, a block at a time."""
    codes, scale = quantise(x, BLOCK, scales)
    codes = codes.view(torch.uint8).clone()
    if kept is None:
        return codes, scale
    for p in range(scale.shape[0]):
        for q in range(scale.shape[1]):
            place = (slice(128 * p, 128 * p + 128), slice(128 * q, 128 * q + 128))
            old = float(kept[p, q])
            rounded = (x[place].float() / (old or 1.0)).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
            for form in {x.dtype, torch.bfloat16} if x.dtype == torch.float32 else {x.dtype}:
                if not (old >= 0 and torch.tensor(E4M3_MAX * old).to(form).isfinite()):
                    continue
                if same((rounded.float() * old).to(form).to(x.dtype), x[place].contiguous()):
                    codes[place], scale[p, q] = rounded.view(torch.uint8), old
    return codes, scale


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("exponent", [-149.0, -140.5, -126.0, -13.3, 0.0, 100.7, 119.5, 120.5, 127.9])
def test_every_code_times_every_kind_of_scale(exponent: float, dtype: torch.dtype) -> None:
    """All 254 finite codes, subnormal and negative ones and both zeros, with scales from float32's edge to edge."""
    for scale in (2.0**exponent, -(2.0**exponent), 0.0):
        codes, factor = CODES.expand(2, 254).contiguous(), torch.full((1, 2), scale)
        expected = reference_values(codes, factor, dtype)
        if (first := first_infinity(expected)) is not None:
            with pytest.raises(NotFinite, match=f"beyond the range of .*float.* at row 0, column {first[1]}$"):
                fast_values(codes, factor, dtype)
        else:
            assert same(fast_values(codes, factor, dtype), expected)
    assert float(expected.abs().max()) == 0 and bool((bits(expected) != 0).any())  # a scale of 0 leaves signs


@examples
@given(seed=seeds, rows=heights, columns=widths, dtype=dtypes, elements=sizes)
def test_values_equal_the_reference(seed: int, rows: int, columns: int, dtype: torch.dtype, elements: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    codes, scale = draw_codes(draw, rows, columns), draw_scale(draw, rows, columns, -149, 127)
    expected = reference_values(codes, scale, dtype)
    if (first := first_infinity(expected)) is not None:
        with pytest.raises(NotFinite, match="at row {}, column {}$".format(*first)):
            fast_values(codes, scale, dtype, Scratch(elements))
    else:
        assert same(fast_values(codes, scale, dtype, Scratch(elements)), expected)


@examples
@given(seed=seeds, rows=heights, columns=widths, dtype=dtypes, elements=sizes)
def test_values_near_the_largest_equal_the_reference(
    seed: int, rows: int, columns: int, dtype: torch.dtype, elements: int
) -> None:
    """Where the largest code just fits and just does not."""
    draw = torch.Generator().manual_seed(seed)
    high = math.log2(torch.finfo(dtype).max / 448)
    codes, scale = draw_codes(draw, rows, columns), draw_scale(draw, rows, columns, high - 2, high + 0.01)
    expected = reference_values(codes, scale, dtype)
    if (first := first_infinity(expected)) is not None:
        with pytest.raises(NotFinite, match="at row {}, column {}$".format(*first)):
            fast_values(codes, scale, dtype, Scratch(elements))
    else:
        assert same(fast_values(codes, scale, dtype, Scratch(elements)), expected)


@examples
@given(data=st.data(), seed=seeds)
def test_any_part_of_a_matrix(data: st.DataObject, seed: int) -> None:
    """Row and column ranges that begin and end anywhere, read from a wider matrix and written into one."""
    draw = torch.Generator().manual_seed(seed)
    codes, scale = draw_codes(draw, 300, 290), draw_scale(draw, 300, 290, -20, 20)
    top, left = data.draw(st.integers(0, 299)), data.draw(st.integers(0, 289))
    bottom, right = data.draw(st.integers(top + 1, 300)), data.draw(st.integers(left + 1, 290))
    place = (slice(top, bottom), slice(left, right))
    out = torch.full((300, 290), 7.0, dtype=torch.bfloat16)
    dequantise_rows(codes[place], scale, out[place], SCRATCH, first_row=top, first_column=left)
    expected = torch.full((300, 290), 7.0, dtype=torch.bfloat16)
    expected[place] = reference_values(codes, scale, torch.bfloat16)[place]
    assert same(out, expected)


@examples
@given(seed=seeds, rows=heights, columns=widths, dtype=dtypes, scales=scale_kinds, elements=sizes)
def test_fresh_codes_equal_the_reference(
    seed: int, rows: int, columns: int, dtype: torch.dtype, scales: Scales, elements: int
) -> None:
    x = draw_values(torch.Generator().manual_seed(seed), rows, columns, dtype)
    codes, scale = fast_codes(x, scales, None, Scratch(elements))
    expected = reference_codes(x, scales, None)
    assert same(codes, expected[0]) and same(scale, expected[1])
    assert not bool(((codes & 0x7F) == 0x7F).any())


@examples
@given(data=st.data(), seed=seeds, rows=heights, columns=widths, dtype=dtypes, elements=sizes)
def test_kept_scales_equal_the_reference(
    data: st.DataObject, seed: int, rows: int, columns: int, dtype: torch.dtype, elements: int
) -> None:
    """Blocks as they came, blocks that were trained a little, and scales that nobody can keep."""
    draw = torch.Generator().manual_seed(seed)
    scales = data.draw(scale_kinds)
    kept = draw_scale(draw, rows, columns, data.draw(st.sampled_from([-149, -30])), 6)
    x = reference_values(draw_codes(draw, rows, columns), kept, dtype)
    touched = torch.rand(rows, columns, generator=draw) < 2 / (rows * columns)
    x = torch.where(touched, x * 1.01, x).clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max)
    useless = torch.tensor([0.0, -1.0, math.nan, math.inf, 2.0**127])[torch.randint(0, 5, kept.shape, generator=draw)]
    kept = torch.where(torch.rand(kept.shape, generator=draw) < 0.2, useless, kept)
    codes, scale = fast_codes(x, scales, kept, Scratch(elements))
    expected = reference_codes(x, scales, kept)
    assert same(codes, expected[0]) and same(scale, expected[1])


@examples
@given(seed=seeds, rows=heights, columns=widths, dtype=dtypes, scales=scale_kinds)
def test_the_round_trip_gives_the_source_s_bytes(
    seed: int, rows: int, columns: int, dtype: torch.dtype, scales: Scales
) -> None:
    """Over all finite codes, with any scale from 512 smallest subnormals up to what keeps 448 * scale finite."""
    draw = torch.Generator().manual_seed(seed)
    low = math.log2(512 * SMALLEST[dtype])
    high = math.log2(torch.finfo(dtype).max / 448) - 0.001
    codes, scale = draw_codes(draw, rows, columns), draw_scale(draw, rows, columns, low, high)
    scale[0, 0] = 2.0**low
    again = fast_codes(fast_values(codes, scale, dtype), scales, scale)
    assert same(again[0], codes) and same(again[1], scale)


@examples
@given(seed=seeds, dtype=dtypes, below=st.floats(0, 9))
def test_where_values_merge_the_scale_stays_and_the_values_too(seed: int, dtype: torch.dtype, below: float) -> None:
    """Smaller scales: what differs from the source are codes that x's dtype cannot tell apart."""
    draw = torch.Generator().manual_seed(seed)
    codes, scale = draw_codes(draw, 128, 256), torch.full((1, 2), 512 * SMALLEST[dtype] * 2.0**-below)
    x = fast_values(codes, scale, dtype)
    again = fast_codes(x, "fp32", scale)
    assert same(again[1], scale) and same(fast_values(again[0], scale, dtype), x)


def test_codes_do_merge_below_the_stated_scale() -> None:
    """So the condition of the docstring is needed: at a quarter of it 16 and 15 * 2^-9 become one value."""
    for dtype in DTYPES:
        codes = CODES.expand(1, 254).contiguous()
        scale = torch.full((1, 2), 512 * SMALLEST[dtype] / 4)
        assert not same(fast_codes(fast_values(codes, scale, dtype), "fp32", scale)[0], codes)


def test_a_changed_bit_frees_only_its_block() -> None:
    draw = torch.Generator().manual_seed(3)
    codes, scale = draw_codes(draw, 576, 356), draw_scale(draw, 576, 356, -14, -10)
    x = fast_values(codes, scale, torch.bfloat16)
    x[575, 300] = 0.123  # the last block of rows is half a block, the last of columns 100 wide
    again, scales = fast_codes(x, "fp32", scale)
    differs = scales != scale
    assert differs.nonzero().tolist() == [[4, 2]] and scales[4, 2] == x[512:, 256:].float().abs().max() / 448
    assert same(again[:512], codes[:512]) and same(again[:, :256].contiguous(), codes[:, :256].contiguous())
    assert same(fast_codes(x, "fp32", None)[1][4:, 2:], scales[4:, 2:])


def test_the_zeros_signs_decide_too() -> None:
    codes, scale = torch.zeros(128, 128, dtype=torch.uint8), torch.full((1, 1), 0.5)
    codes[5, 6] = 0x80
    x = fast_values(codes, scale, torch.bfloat16)
    assert math.copysign(1, float(x[5, 6])) == -1.0
    again = fast_codes(x, "fp32", scale)
    assert same(again[0], codes) and same(again[1], scale)
    assert fast_codes(x, "fp32", None)[1].item() == 1.0  # alone, a block of zeros has no scale


def test_power_of_2_scales_are_the_next_power_up() -> None:
    """Of amax / 448, exactly: an amax of 448 * 2^k has that 2^k, the next float the double of it."""
    for dtype in DTYPES:
        for k in range(-8, 7):
            exact = torch.tensor(448 * 2.0**k, dtype=dtype)
            more = (bits(exact.reshape(1)) + 1).view(dtype)
            for amax, expected in ((exact.reshape(1), 2.0**k), (more, 2.0 ** (k + 1))):
                assert fast_codes(-amax.reshape(1, 1), "power-of-2", None)[1].item() == expected
                assert expected == 2.0 ** math.ceil(math.log2(float(amax) / 448))


def test_power_of_2_blocks_come_back_without_kept_scales() -> None:
    """Exact scaling: values that were rounded once stay as they are, when the block still has its largest code."""
    draw = torch.Generator().manual_seed(8)
    x = draw_values(draw, 300, 200, torch.bfloat16)
    codes, scale = fast_codes(x, "power-of-2", None)
    values = fast_values(codes, scale, torch.float32)
    again = fast_codes(values, "power-of-2", None)
    assert same(fast_values(again[0], again[1], torch.float32), values)


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_codes_of_nan_are_refused(code: int) -> None:
    codes = torch.zeros(200, 7168, dtype=torch.uint8)
    codes[0, :] = 0x80
    codes[150, 7001] = code
    with pytest.raises(NotFinite, match="code of NaN at row 451, column 7002") as caught:
        dequantise_rows(codes, torch.ones(4, 57), torch.empty(200, 7168), SCRATCH, first_row=301, first_column=1)
    assert (caught.value.row, caught.value.column) == (451, 7002)


@pytest.mark.parametrize("scale", [math.nan, math.inf, -math.inf])
def test_scales_that_are_not_finite_are_refused(scale: float) -> None:
    scales = torch.ones(2, 2)
    scales[1, 1] = scale
    with pytest.raises(NotFinite, match="a scale that is not finite at row 128, column 128"):
        fast_values(torch.zeros(200, 200, dtype=torch.uint8), scales, torch.bfloat16)


@pytest.mark.parametrize("kept", [None, 1.0, 2.0**119.5])
@pytest.mark.parametrize("value", [math.nan, -math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_that_are_not_finite_are_refused(dtype: torch.dtype, value: float, kept: float | None) -> None:
    x = torch.zeros(200, 300, dtype=dtype)
    x[140, 290] = value
    x[10, 200] = -448
    with pytest.raises(NotFinite, match="not finite at row 396, column 290"):
        quantise_rows(
            x,
            torch.empty(200, 300, dtype=torch.uint8),
            torch.empty(2, 3),
            SCRATCH,
            kept=None if kept is None else torch.full((2, 3), kept),
            first_row=256,
        )


def test_what_would_be_the_code_of_nan_is_not_kept() -> None:
    """480 * scale lies where the NaN code would decode to; it must become 448 of a fresh scale."""
    codes, scale = fast_codes(torch.full((1, 1), 480.0), "fp32", torch.ones(1, 1))
    assert codes.item() == 0x7E and scale.item() == np.float32(480) / np.float32(448)


def test_a_scale_of_0_stays_with_its_zeros() -> None:
    """Their signs too; beside them a block that is not zero gets another scale, and 0 is never divided by."""
    kept = torch.tensor([[0.0, 0.0, 0.5]])
    x = torch.zeros(128, 384, dtype=torch.bfloat16)
    x[3, 4], x[5, 130], x[:, 256:] = -0.0, 7.0, 1.0
    codes, scale = fast_codes(x, "fp32", kept)
    assert scale.tolist() == [[0.0, 7.0 / np.float32(448), 0.5]]
    assert codes[3, 4] == 0x80 and int(codes[:, :128].sum()) == 0x80
    assert same(fast_values(codes, scale, torch.bfloat16), x)


def test_float32_blocks_that_went_through_bfloat16_keep_their_bytes() -> None:
    """A block at a time: one is as BF16 had it, one as float32 has it, in one a value moved by a float32 ulp."""
    draw = torch.Generator().manual_seed(5)
    codes, scale = draw_codes(draw, 200, 300), draw_scale(draw, 200, 300, -14, -10)
    exact, rounded = fast_values(codes, scale, torch.float32), fast_values(codes, scale, torch.bfloat16).float()
    assert not torch.equal(exact, rounded)
    x = rounded.clone()
    x[:, 128:256] = exact[:, 128:256]
    assert all(map(same, fast_codes(x, "fp32", scale), (codes, scale)))
    x[130, 20] = torch.nextafter(x[130, 20], torch.tensor(math.inf))
    again = fast_codes(x, "fp32", scale)
    assert (again[1] != scale).nonzero().tolist() == [[1, 0]]
    again[0][128:, :128] = codes[128:, :128]
    assert same(again[0], codes)


@examples
@given(seed=seeds, rows=heights, columns=widths, dtype=dtypes)
def test_the_largest_magnitude(seed: int, rows: int, columns: int, dtype: torch.dtype) -> None:
    """Of both signs and of one, in a part of a matrix, beside infinities and NaNs of either sign."""
    x = draw_values(torch.Generator().manual_seed(seed), rows, columns, dtype)
    for part in (x, x[:, columns // 2 :], x.abs(), -x.abs()):
        assert largest_magnitude(part) == part.float().abs().max()
    for value in (math.inf, -math.inf):
        x[rows // 2, columns // 2] = value
        assert largest_magnitude(x) == math.inf
    for value in (math.nan, -math.nan):
        x[0, columns - 1] = value
        assert math.isnan(largest_magnitude(x))


def test_kept_blocks_are_counted() -> None:
    draw = torch.Generator().manual_seed(6)
    scale = draw_scale(draw, 300, 300, -14, -10)
    x = fast_values(draw_codes(draw, 300, 300), scale, torch.bfloat16)
    x[0, 0], x[290, 290], x[291, 291] = 3.0, 3.0, 3.0
    codes, written = torch.empty(300, 300, dtype=torch.uint8), torch.empty(3, 3)
    assert quantise_rows(x, codes, written, SCRATCH, kept=scale) == 7
    assert quantise_rows(x, codes, written, SCRATCH) == 0


@pytest.mark.parametrize("kept", [-0.0, -1.0, math.nan, math.inf])
def test_scales_that_cannot_be_kept_are_replaced(kept: float) -> None:
    """Even where rounding with them would give the values back: zeros, and a negative scale's own values."""
    codes = CODES.expand(128, 254).contiguous()
    x = fast_values(codes, torch.full((1, 2), -1.0 if kept == -1 else 0.0), torch.bfloat16)
    found = fast_codes(x, "fp32", torch.full((1, 2), kept))
    expected = reference_codes(x, "fp32", None)
    assert same(found[0], expected[0]) and same(found[1], torch.ones(1, 2))


def test_a_row_wider_than_a_strip() -> None:
    draw = torch.Generator().manual_seed(2)
    codes, scale = draw_codes(draw, 3, fp8.STRIP + 70), draw_scale(draw, 3, fp8.STRIP + 70, -20, 0)
    x = fast_values(codes, scale, torch.bfloat16, Scratch())
    assert same(x, reference_values(codes, scale, torch.bfloat16))
    assert same(fast_codes(x, "fp32", scale, Scratch())[0], codes)


def test_scales_from_the_disk() -> None:
    values = torch.tensor([[1.0, -2.5, 2.0**-149], [448.0, 0.0, math.inf]])
    for name, dtype in (("F32", torch.float32), ("BF16", torch.bfloat16), ("F16", torch.float16)):
        raw = bits(values.to(dtype)).numpy().view(np.uint8)
        decoded = decode_scales(raw.reshape(-1), name, (2, 3))
        assert same(decoded, values.to(dtype).float()) and same(decode_scales(raw.tobytes(), name, (2, 3)), decoded)
    exponents = np.arange(256, dtype=np.uint8)
    decoded = decode_scales(exponents, "F8_E8M0", (2, 128)).flatten()
    assert decoded[:255].tolist() == [2.0 ** (e - 127) for e in range(255)] and math.isnan(decoded[255])
    raw = np.zeros(4, dtype=np.uint8)
    decoded = decode_scales(raw, "F32", (1, 1))
    raw[:] = 1
    assert decoded.item() == 0.0  # its own memory: readers use theirs again
    with pytest.raises(ValueError, match="scales of dtype I64; known are F32, BF16, F16, F8_E8M0"):
        decode_scales(b"12345678", "I64", (1, 1))


def test_the_kernels_load_no_megatron() -> None:
    code = "import sys, megatron_r1.convert.fp8; print('megatron' in sys.modules, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == ["False", "True"]
