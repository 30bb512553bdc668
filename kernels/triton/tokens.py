"""Activations as the kernels read them: fp16 under a power of two of their own, and sums over groups."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton.decode import offset


class Halves(NamedTuple):
    """What stands for x [tokens, columns]: x = factor · halves, exact for 16-bit x.

    Tokens are padded with zeros to whole tiles.

    Args:
        halves: fp16 [tokens, blocks · block].
        sums: fp32 [2, groups, tokens]: of `halves` times what the decoded weights are too large by, negative, and of
            `halves`.
        factor: fp32 [blocks, tokens], powers of two.
    """

    halves: Tensor
    sums: Tensor
    factor: Tensor


@triton.jit
def _halve(
    x: tl.tensor,
    order: tl.tensor,
    halves: tl.tensor,
    sums: tl.tensor,
    factor: tl.tensor,
    count: tl.tensor,
    columns: tl.tensor,
    BLOCK: tl.constexpr,
    SLAB: tl.constexpr,
    BITS: tl.constexpr,
    PARTS: tl.constexpr,
    ORDERED: tl.constexpr,
) -> None:
    token, block = tl.program_id(0), tl.program_id(1)
    M, blocks = tl.num_programs(0), tl.num_programs(1)
    within = tl.arange(0, BLOCK)
    k = block * BLOCK + within
    mask = k < tl.where(token < count, columns, 0)
    source = tl.load(order + k, mask=k < columns, other=0) if ORDERED else k
    values = tl.load(x + token.to(tl.int64) * columns + source, mask=mask, other=0).to(tl.float32)
    # The largest number of the block comes into [2**14, 2**15), just below the end of fp16, so that small ones survive.
    exponent = (tl.max(tl.abs(values), 0).to(tl.int32, bitcast=True) >> 23) & 0xFF
    exponent = tl.maximum(exponent, 15)
    tl.store(factor + block * M + token, ((exponent - 14) << 23).to(tl.float32, bitcast=True))
    values *= ((268 - exponent) << 23).to(tl.float32, bitcast=True)
    half = values.to(tl.float16)
    tl.store(halves + token.to(tl.int64) * blocks * BLOCK + k, half)
    values = half.to(tl.float32)
    group = block * PARTS + tl.arange(0, PARTS)
    large = tl.sum(tl.reshape(-values * offset(within // SLAB, BITS), (PARTS, BLOCK // PARTS)), 1)
    tl.store(sums + group * M + token, large)
    tl.store(sums + (blocks * PARTS + group) * M + token, tl.sum(tl.reshape(values, (PARTS, BLOCK // PARTS)), 1))


def halved(x: Tensor, block: int, slab: int, bits: int, group: int, order: Tensor | None, tile: int) -> Halves:
    """For one multiplication.

    Args:
        x: [tokens, columns], contiguous.
        block: columns of a block.
        slab: columns of a slab.
        bits: of the codes, see `kernels.triton.decode`.
        group: columns of a group, a divisor of the block.
        order: int32 [columns], the column that comes at each place, or None.
        tile: tokens that a program multiplies with.
    """
    count, columns = x.shape
    tokens, blocks, parts = -(-count // tile) * tile, -(-columns // block), block // group
    halves = torch.empty(tokens, blocks * block, dtype=torch.float16, device=x.device)
    sums = torch.empty(2, blocks * parts, tokens, device=x.device)
    factor = torch.empty(blocks, tokens, device=x.device)
    constants = {"BLOCK": block, "SLAB": slab, "BITS": bits, "PARTS": parts, "ORDERED": order is not None}
    _halve[(tokens, blocks)](x, order, halves, sums, factor, count, columns, **constants, num_warps=1)
    return Halves(halves, sums, factor)
