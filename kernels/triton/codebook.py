"""Codes of 2, 3 or 4 bits that look their weights up in a table of their row, multiplied with 16-bit activations.

The table of a row stays in registers of the threads that decode the row's codes, its low and its high bytes apart:
PRMT picks four of eight bytes by four codes of three bits in one instruction. For a fourth bit it picks twice, and
then between the picks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels.packed import Packed
from kernels.packed_codebook import PackedCodebook
from kernels.triton.decode import field, lookup, lookup_four
from kernels.triton.finish import finish
from kernels.triton.launch import Regime, counters, in_tiles, launch, unfit
from kernels.triton.layout import ROWS, slab, words
from kernels.triton.tokens import halved

REGIMES = (Regime(16, 16, 64, 4, 3), Regime(256, 64, 64, 4, 3))
"""Beyond the last, the matrix is decoded once and left to cuBLAS."""

WIDTHS = (2, 3, 4)
BLOCK = 256  # columns, for 3 bits; less where words hold two or four codes


@dataclass(frozen=True)
class Prepared:
    """The matrix as the kernel reads it.

    Args:
        words: int16 [rows, blocks · block · bits / 16], see `kernels.triton.layout`.
        codebook: fp16 [rows, 2**bits].
        tables: int32 [4 or 8, rows]: the low bytes of entries 0–3, 4–7 and so on, then their high bytes.
        packed: the same as stored.
        arrived: see `kernels.triton.launch.counters`.
    """

    words: Tensor
    codebook: Tensor
    tables: Tensor
    packed: PackedCodebook
    arrived: Tensor


def supports(packed: Packed, x: Tensor) -> str | None:
    """None if `multiply` can take these, else why not."""
    if not isinstance(packed, PackedCodebook) or packed.bits not in WIDTHS:
        return f"only codebooks of {WIDTHS} bits are looked up here"
    if x.dtype not in (torch.float16, torch.bfloat16):
        return f"activations must have 16 bits, not {x.dtype}"
    return unfit(x.device)


def prepare(packed: PackedCodebook) -> Prepared:
    """Reorders codes; nothing is rounded."""
    bits, rows = int(packed.bits), packed.shape[0]
    table = F.pad(packed.codebook, (0, 0, 0, -rows % ROWS)).contiguous()
    codes, arrived = words(packed.unpacked_codes(), bits, BLOCK), counters(rows, table.device)
    return Prepared(codes, table, byte_tables(table), packed, arrived)


def byte_tables(table: Tensor) -> Tensor:
    """fp16 [rows, entries] as the kernel looks entries up: int32 [4 or 8, rows], see `Prepared`."""
    table = F.pad(table, (0, max(8 - table.shape[1], 0))).contiguous()
    halves = table.view(torch.uint8).unflatten(1, (-1, 4, 2)).permute(3, 1, 0, 2)  # [byte, four, row, entry]
    return halves.contiguous().view(torch.int32).flatten(0, 1).squeeze(-1)


def multiply(prepared: Prepared, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., in] fp16 or bf16 times the transposed matrix, plus bias [out]: [..., out] in the dtype of x."""
    return in_tiles(
        x, bias, REGIMES, partial(add_multiplied, prepared), lambda: prepared.packed.dequantize().to(x.dtype)
    )


def add_multiplied(
    prepared: Prepared, x: Tensor, addend: Tensor | None, tile: Regime, split: int | None = None
) -> Tensor:
    """x [tokens, in] times the transposed matrix, plus an addend [tokens or 1, out]: [tokens, out]."""
    (rows, columns), bits = prepared.packed.shape, int(prepared.packed.bits)
    blocks = -(-columns // BLOCK)
    call = launch(x, rows, blocks, tile, prepared.arrived, addend, split)
    halves, _, factor = halved(x, BLOCK, slab(bits, BLOCK), bits, BLOCK, None, tile.tokens)
    _multiply[call.grid](
        halves, factor, prepared.words, prepared.codebook, prepared.tables, *call.ending, blocks,
        prepared.tables.shape[1], BITS=bits, BLOCK=BLOCK, **call.constants,
    )  # fmt: skip
    return call.y


@triton.jit
def _multiply(
    halves: tl.tensor,
    factor: tl.tensor,
    words: tl.tensor,
    codebook: tl.tensor,
    tables: tl.tensor,
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
    if ASM:
        l0, l1 = tl.load(tables + n)[:, None], tl.load(tables + padded + n)[:, None]
        h0, h1 = tl.load(tables + 2 * padded + n)[:, None], tl.load(tables + 3 * padded + n)[:, None]
        if BITS == 4:
            l2, l3 = h0, h1
            h0, h1 = tl.load(tables + 4 * padded + n)[:, None], tl.load(tables + 5 * padded + n)[:, None]
            h2, h3 = tl.load(tables + 6 * padded + n)[:, None], tl.load(tables + 7 * padded + n)[:, None]
    else:
        table = tl.load(codebook + n[:, None] * (1 << BITS) + tl.arange(0, 1 << BITS)[None, :])
    total = tl.full((ROWS, TOKENS), 0, tl.float32)
    first, last = blocks * tl.program_id(2) // SPLIT, blocks * (tl.program_id(2) + 1) // SPLIT
    for block in tl.range(first, last, num_stages=STAGES):
        tile = tl.load(row + block * WORDS)
        second = tl.load(row + block * WORDS + SLAB) if BITS == 3 else tile
        third = tl.load(row + block * WORDS + 2 * SLAB) if BITS == 3 else tile
        product = tl.full((ROWS, TOKENS), 0, tl.float32)
        if ASM and BITS == 4:
            four = lookup_four(tile, l0, l1, l2, l3, h0, h1, h2, h3)
        for j in tl.static_range(BLOCK // SLAB):
            if not ASM:
                weights = tl.gather(table, field(tile, second, third, j, BITS), 1)
            elif BITS == 4:
                weights = four[j]
            else:
                weights = lookup(tile, second, third, l0, l1, h0, h1, j, BITS)
            product = tl.dot(weights, tl.load(token + block * BLOCK + j * SLAB), product)
        total += product * tl.load(factor + block * tokens + m)[None, :]
    finish(total, n, m, partial, arrived, addend, addend_stride, out, M, N, SPLIT, ADD)
