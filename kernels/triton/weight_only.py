"""W{2,3,4,8}A16: integer codes with scales and zeros per group, multiplied with 16-bit activations.

Per group of columns, Σ s (q − z) x = s (Σ q x − z Σ x): the tensor cores sum q x, with q exact in fp16, and what the
group has in common is applied to sums instead of weights. The sums start at what undoes the powers of two
of `kernels.triton.decode`, so a group costs three operations per output whatever the width.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.packed import Packed, PackedInteger
from kernels.triton.decode import magic, split, start
from kernels.triton.finish import finish
from kernels.triton.launch import Regime, counters, in_tiles, interpreted, launch, unfit
from kernels.triton.layout import pairs, slab, words
from kernels.triton.tokens import Halves, halved

REGIMES = (Regime(16, 16, 128, 4, 4), Regime(32, 32, 128, 8, 4), Regime(256, 64, 128, 8, 3))
"""Beyond the last, the matrix is decoded once and left to cuBLAS."""

DECODED_ROWS = 32
WIDTHS = (2, 3, 4, 8)
BLOCKS = (256, 128, 64)
SLABS = (16, 32, 64)  # columns that a tensor core takes at least, and that registers hold at most


@dataclass(frozen=True)
class Prepared:
    """The matrix as the kernel reads it.

    Args:
        words: int16 [rows, blocks · block · bits / 16], see `kernels.triton.layout`.
        pairs: int32 [groups, rows], of fp16 scales and zeros.
        order: int32 [in], the column of x at each place, where groups are not neighbours.
        block: columns of a block.
        span: columns of a group.
        shape: (out, in).
        arrived: see `kernels.triton.launch.counters`.
    """

    words: Tensor
    pairs: Tensor
    order: Tensor | None
    bits: int
    block: int
    span: int
    shape: tuple[int, int]
    arrived: Tensor


def supports(packed: Packed, x: Tensor) -> str | None:
    """None if `multiply` can take these, else why not."""
    if not isinstance(packed, PackedInteger) or packed.bits not in WIDTHS:
        return f"only integers of {WIDTHS} bits are decoded here"
    if x.dtype not in (torch.float16, torch.bfloat16):
        return f"activations must have 16 bits, not {x.dtype}"
    if not _block(packed):
        return f"groups of {packed.group_size} columns do not fit blocks of {BLOCKS} columns at {packed.bits} bits"
    if packed.group_index is not None and not _full_groups(packed.group_index, packed.group_size):
        return f"the group index does not fill groups of {packed.group_size} columns in turn"
    return unfit(x.device)


def prepare(packed: PackedInteger) -> Prepared:
    """Reorders codes, scales and zeros; nothing is rounded."""
    bits, codes, size = int(packed.bits), packed.unpacked_codes(), _block(packed)
    groups = -(-(codes.shape[1] + -codes.shape[1] % size) // _span(packed))
    order = None
    if packed.group_index is not None:
        order = torch.argsort(packed.group_index.long(), stable=True)
        codes = codes[:, order]
    return Prepared(
        words=words(codes, bits, size),
        pairs=pairs(packed.scale, packed.unpacked_zero(), groups),
        order=None if order is None else order.int(),
        bits=bits,
        block=size,
        span=_span(packed),
        shape=packed.shape,
        arrived=counters(packed.shape[0], codes.device),
    )


def block(bits: int, span: int, columns: int) -> int:
    """Columns of a block: the most that groups of `span`, and the columns that there are, permit; 0 if none do."""
    fitting = [size for size in BLOCKS if slab(bits, size) in SLABS and span % slab(bits, size) == 0]
    whole = [size for size in fitting if columns % size == 0]
    few = [size for size in whole if size <= 2 * span]  # more groups a block take more registers than there are
    return max(few or whole[-1:] or fitting[-1:], default=0)


def multiply(prepared: Prepared, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., in] fp16 or bf16 times the transposed matrix, plus bias [out]: [..., out] in the dtype of x."""
    return in_tiles(x, bias, REGIMES, partial(add_multiplied, prepared), partial(decoded, prepared, x.dtype))


def add_multiplied(
    prepared: Prepared, x: Tensor, addend: Tensor | None, tile: Regime, split: int | None = None
) -> Tensor:
    """x [tokens, in] times the transposed matrix, plus an addend [tokens or 1, out]: [tokens, out]."""
    (rows, columns), group = prepared.shape, gcd(prepared.span, prepared.block)
    blocks, size = -(-columns // prepared.block), slab(prepared.bits, prepared.block)
    call = launch(x, rows, blocks, tile, prepared.arrived, addend, split)
    inputs: Halves = halved(x, prepared.block, size, prepared.bits, group, prepared.order, tile.tokens)
    _multiply[call.grid](
        *inputs, prepared.words, prepared.pairs, *call.ending, blocks, prepared.pairs.shape[1],
        BITS=prepared.bits, BLOCK=prepared.block, PARTS=prepared.block // group,
        SPAN=0 if len(prepared.pairs) == 1 else prepared.span // group, **call.constants,
    )  # fmt: skip
    return call.y


def decoded(prepared: Prepared, dtype: torch.dtype) -> Tensor:
    """The matrix [out, in], each weight rounded once, for calls with many tokens."""
    rows, columns = prepared.shape
    matrix = torch.empty(rows, columns, dtype=dtype, device=prepared.words.device)
    group = gcd(prepared.span, prepared.block)
    grid = (-(-rows // DECODED_ROWS), -(-columns // prepared.block))
    _decode[grid](
        prepared.words, prepared.pairs, prepared.order, matrix, rows, columns, prepared.pairs.shape[1],
        BITS=prepared.bits, BLOCK=prepared.block, PARTS=prepared.block // group,
        SPAN=0 if len(prepared.pairs) == 1 else prepared.span // group,
        ROWS=DECODED_ROWS, ORDERED=prepared.order is not None, ASM=not interpreted(),
        num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return matrix


@triton.jit
def _multiply(
    halves: tl.tensor,
    sums: tl.tensor,
    factor: tl.tensor,
    words: tl.tensor,
    pairs: tl.tensor,
    partial: tl.tensor,
    arrived: tl.tensor,
    addend: tl.tensor,
    addend_stride: tl.tensor,
    out: tl.tensor,
    M: tl.tensor,
    N: tl.tensor,
    blocks: tl.tensor,
    padded: tl.tensor,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    SPAN: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
    ADD: tl.constexpr,
    ASM: tl.constexpr,
) -> None:
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    SLAB: tl.constexpr = BLOCK * (1 if BITS == 3 else BITS) // 16
    WORDS: tl.constexpr = BLOCK * BITS // 16
    w = tl.arange(0, SLAB)
    tokens = tl.num_programs(1) * TOKENS
    row = words + n.to(tl.int64)[:, None] * (blocks * WORDS) + w[None, :]
    token = halves + m.to(tl.int64)[None, :] * (blocks * BLOCK) + w[:, None]
    slabs: tl.constexpr = BLOCK // SLAB // PARTS
    total = tl.full((ROWS, TOKENS), 0, tl.float32)
    first, last = blocks * tl.program_id(2) // SPLIT, blocks * (tl.program_id(2) + 1) // SPLIT
    for block in tl.range(first, last, num_stages=STAGES):
        tile = tl.load(row + block * WORDS)
        second = tl.load(row + block * WORDS + SLAB) if BITS == 3 else tile
        third = tl.load(row + block * WORDS + 2 * SLAB) if BITS == 3 else tile
        subtotal = tl.full((ROWS, TOKENS), 0, tl.float32)
        for part in tl.static_range(PARTS):
            group = block * PARTS + part
            product = tl.broadcast_to(tl.load(sums + group * tokens + m)[None, :], (ROWS, TOKENS))
            for j in tl.static_range(part * slabs, (part + 1) * slabs):
                numbers = tl.load(token + block * BLOCK + j * SLAB)
                product = tl.dot(magic(tile, second, third, j, BITS, ASM), numbers, product)
            step, zero = split(tl.load(pairs + (group // SPAN if SPAN else 0) * padded + n))
            plain = tl.load(sums + (blocks * PARTS + group) * tokens + m)
            product -= zero[:, None] * plain[None, :]
            subtotal += product * step[:, None]
        total += subtotal * tl.load(factor + block * tokens + m)[None, :]
    finish(total, n, m, partial, arrived, addend, addend_stride, out, M, N, SPLIT, ADD)


@triton.jit
def _decode(
    words: tl.tensor,
    pairs: tl.tensor,
    order: tl.tensor,
    matrix: tl.tensor,
    N: tl.tensor,
    columns: tl.tensor,
    padded: tl.tensor,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    SPAN: tl.constexpr,
    ROWS: tl.constexpr,
    ORDERED: tl.constexpr,
    ASM: tl.constexpr,
) -> None:
    SLAB: tl.constexpr = BLOCK * (1 if BITS == 3 else BITS) // 16
    WORDS: tl.constexpr = BLOCK * BITS // 16
    slabs: tl.constexpr = BLOCK // SLAB // PARTS
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    w, block = tl.arange(0, SLAB), tl.program_id(1)
    row = words + (n.to(tl.int64)[:, None] * tl.num_programs(1) + block) * WORDS + w[None, :]
    tile = tl.load(row)
    second = tl.load(row + SLAB) if BITS == 3 else tile
    third = tl.load(row + 2 * SLAB) if BITS == 3 else tile
    for part in tl.static_range(PARTS):
        step, zero = split(tl.load(pairs + (((block * PARTS + part) // SPAN) if SPAN else 0) * padded + n))
        for j in tl.static_range(part * slabs, (part + 1) * slabs):
            code = magic(tile, second, third, j, BITS, ASM).to(tl.float32) - (1 << (10 - start(j, BITS)))
            weight = (code - zero[:, None]) * step[:, None]
            k = block * BLOCK + j * SLAB + w
            target = tl.load(order + k, mask=k < columns, other=0) if ORDERED else k
            place = matrix + n.to(tl.int64)[:, None] * columns + target[None, :]
            tl.store(place, weight.to(matrix.dtype.element_ty), mask=(n < N)[:, None] & (k < columns)[None, :])


def _span(packed: PackedInteger) -> int:
    """Columns that share a scale; a group that is longer than a row ends with it."""
    columns = packed.shape[1]
    return packed.group_size if packed.group_size < columns else -(-columns // max(BLOCKS)) * max(BLOCKS)


def _block(packed: PackedInteger) -> int:
    return block(int(packed.bits), _span(packed), packed.shape[1])


def _full_groups(index: Tensor, size: int) -> bool:
    ordered = index.long().sort().values
    return bool((ordered == torch.arange(len(ordered), device=index.device) // size).all())
