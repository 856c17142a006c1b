"""Blockwise FP8 (E4M3) in plain torch: scales, rounding, and back. The slow definition that faster code must equal.

`model/fp8.py` emulates training in FP8 with it; `convert/fp8.py` computes the same bits on checkpoints. No Megatron.
Scheme: DeepSeek-V3's technical report, arXiv 2412.19437, section 3.3; scales as in its checkpoints' `weight_scale_inv`.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F

E4M3_MAX = 448.0  # largest finite E4M3 value
Scales = Literal["fp32", "power-of-2"]


def block_scales(amax: torch.Tensor, scales: Scales) -> torch.Tensor:
    """float32 scales of blocks from their largest magnitudes: value = quantised * scale.

    amax / 448, or the next power of two from there up (then dividing and multiplying by it is exact). A block of zeros,
    or one so small that amax / 448 is 0 in float32, gets 1 and becomes zeros.
    """
    scale = amax.float() / E4M3_MAX
    if scales == "power-of-2":
        mantissa, exponent = torch.frexp(scale)  # scale = mantissa * 2^exponent, mantissa in [0.5, 1)
        rounded = torch.ldexp(torch.ones_like(scale), torch.where(mantissa == 0.5, exponent - 1, exponent))
        scale = torch.where(torch.isfinite(scale) & (scale > 0), rounded, scale)
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def quantise(x: torch.Tensor, block: tuple[int, int], scales: Scales = "fp32") -> tuple[torch.Tensor, torch.Tensor]:
    """Round a matrix to E4M3 with one scale a block.

    Args:
        x: [R, C], any float dtype.
        block: rows and columns of a block; those at the lower and right edge may be partial.
        scales: see `block_scales`.

    Returns:
        float8_e4m3fn [R, C], and float32 scales [ceil(R / rows), ceil(C / columns)]. A block that holds an infinity or
        a NaN has no usable scale and is NaN throughout once multiplied back, so that it is noticed.
    """
    (rows, columns), (height, width) = x.shape, block
    padded = F.pad(x.float(), (0, -columns % width, 0, -rows % height))
    down, across = padded.shape[0] // height, padded.shape[1] // width
    blocks = padded.unflatten(1, (across, width)).unflatten(0, (down, height))  # [R / h, h, C / w, w]
    scale = block_scales(blocks.abs().amax((1, 3)), scales)
    unit = (blocks / scale[:, None, :, None]).clamp(-E4M3_MAX, E4M3_MAX)
    return unit.to(torch.float8_e4m3fn).flatten(2, 3).flatten(0, 1)[:rows, :columns], scale


def dequantise(values: torch.Tensor, scale: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """float32 [R, C] from `quantise`'s two tensors: values * scale of their block."""
    rows, columns = values.shape
    spread = scale.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return values.float() * spread[:rows, :columns]


def rounded(x: torch.Tensor, block: tuple[int, int], scales: Scales = "fp32") -> torch.Tensor:
    """float32 [R, C]: what is left of a matrix after E4M3."""
    return dequantise(*quantise(x, block, scales), block)
