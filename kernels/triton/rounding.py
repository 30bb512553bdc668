"""Activations of 8 bits: each token is rounded under a scale of its own, as `kernels.activations.TokenScale` does."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 1024  # columns that a program holds at once


class Eighths(NamedTuple):
    """What stands for x [tokens, columns]: x ≈ scale · codes. Tokens are padded with zeros to whole tiles.

    Args:
        codes: int8 or float8_e4m3fn [tokens, columns up to a multiple].
        scale: fp32 [tokens].
        sums: fp32 [groups, tokens] of integer codes; exact.
    """

    codes: Tensor
    scale: Tensor
    sums: Tensor


@triton.jit
def nearest_e4m3(x: tl.tensor) -> tl.tensor:
    """The E4M3 numbers nearest to x fp32, |x| ≤ 448, half-way cases to even: fp32."""
    exponent = tl.maximum((x.to(tl.int32, bitcast=True) >> 23) & 0xFF, 121)  # 2**-6 and below: subnormal steps
    return nearest(x * ((257 - exponent) << 23).to(tl.float32, bitcast=True)) * ((exponent - 3) << 23).to(
        tl.float32, bitcast=True
    )


@triton.jit
def nearest(x: tl.tensor) -> tl.tensor:
    """The whole numbers nearest to x fp32, |x| < 2**22, half-way cases to even: there fp32 has no fractions left."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _round(
    x: tl.tensor,
    codes: tl.tensor,
    scales: tl.tensor,
    sums: tl.tensor,
    count: tl.tensor,
    columns: tl.tensor,
    padded: tl.tensor,
    GROUP: tl.constexpr,
    CHUNK: tl.constexpr,
    FLOAT: tl.constexpr,
) -> None:
    token, tokens = tl.program_id(0), tl.num_programs(0)
    limit = tl.where(token < count, columns, 0)
    source, target = x + token.to(tl.int64) * columns, codes + token.to(tl.int64) * padded
    within = tl.arange(0, CHUNK)
    peak = tl.full((CHUNK,), 0, tl.float32)
    for start in range(0, padded, CHUNK):
        values = tl.load(source + start + within, mask=start + within < limit, other=0).to(tl.float32)
        peak = tl.maximum(peak, tl.abs(values), propagate_nan=tl.PropagateNan.ALL)
    largest = tl.max(peak, 0)
    scale = tl.div_rn(largest, 448.0 if FLOAT else 127.0)
    scale = tl.where(scale == 0, 1.0, scale)
    tl.store(scales + token, scale)
    for start in range(0, padded, CHUNK):
        k = start + within
        values = tl.load(source + k, mask=k < limit, other=0).to(tl.float32)
        values = tl.div_rn(values, tl.full((CHUNK,), 0, tl.float32) + scale)
        rounded = nearest_e4m3(values) if FLOAT else nearest(values)
        tl.store(target + k, rounded.to(codes.dtype.element_ty), mask=k < padded)
        group = start // GROUP + tl.arange(0, CHUNK // GROUP)
        total = tl.sum(tl.reshape(rounded, (CHUNK // GROUP, GROUP)), 1)
        tl.store(sums + group * tokens + token, total, mask=group * GROUP < padded)


def rounded(x: Tensor, padded: int, group: int, dtype: torch.dtype, tile: int) -> Eighths:
    """For one multiplication.

    Args:
        x: [tokens, columns], contiguous.
        padded: columns of the result.
        group: columns of a group, a power of two up to 1024.
        dtype: int8 or float8_e4m3fn.
        tile: tokens that a program multiplies with.
    """
    count, columns = x.shape
    tokens = -(-count // tile) * tile
    codes = torch.empty(tokens, padded, dtype=dtype, device=x.device)
    scale = torch.empty(tokens, device=x.device)
    sums = torch.empty(-(-padded // group), tokens, device=x.device)
    constants = {"GROUP": group, "CHUNK": CHUNK, "FLOAT": dtype.is_floating_point}
    _round[(tokens,)](x, codes, scale, sums, count, columns, padded, **constants, num_warps=4)
    return Eighths(codes, scale, sums)
