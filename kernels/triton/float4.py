"""NVFP4 and MXFP4 on the tensor cores of 16-bit floats, multiplied with 16-bit activations.

The bits of an E2M1 number, moved to where fp16 has its sign, the low end of its exponent and the top of its fraction,
are that number times 2**-14, subnormal ones included; so a weight is decoded without arithmetic. A block has four
groups, each a slab of its own, whose sums take the groups' scales; four scales of a byte are one int32.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels.minifloat import E2M1, E4M3, E8M0
from kernels.packed import Packed
from kernels.packed_float import PackedFloat
from kernels.triton.finish import finish
from kernels.triton.launch import Regime, counters, in_tiles, launch, unfit
from kernels.triton.layout import ROWS, words
from kernels.triton.tokens import halved

REGIMES = (Regime(16, 16, 128, 4, 4), Regime(256, 64, 128, 8, 3))
"""Beyond the last, the matrix is decoded once and left to cuBLAS."""

GROUPS = (16, 32)
STRIDE = 256  # columns of one turn of the loop, several blocks


@dataclass(frozen=True)
class Prepared:
    """The matrix as the kernel reads it.

    Args:
        words: int16 [rows, blocks · group], see `kernels.triton.layout`.
        scales: int32 [blocks, rows], of the four groups of a block.
        exponents: whether scales are E8M0, else they are E4M3.
        factor: of the whole matrix, 2**14 included.
        packed: the same as stored.
        arrived: see `kernels.triton.launch.counters`.
    """

    words: Tensor
    scales: Tensor
    exponents: bool
    factor: float
    packed: PackedFloat
    arrived: Tensor


def supports(packed: Packed, x: Tensor) -> str | None:
    """None if `multiply` can take these, else why not."""
    if not isinstance(packed, PackedFloat) or packed.element != E2M1 or packed.scale_code not in (E4M3, E8M0):
        return "only E2M1 numbers under scales of E4M3 or E8M0 are decoded here"
    if packed.group_size not in GROUPS:
        return f"groups must have {GROUPS} columns, not {packed.group_size}"
    if x.dtype not in (torch.float16, torch.bfloat16):
        return f"activations must have 16 bits, not {x.dtype}"
    return unfit(x.device)


def prepare(packed: PackedFloat) -> Prepared:
    """Reorders codes and scales; nothing is rounded. Scales of 2**-127 count as zero."""
    (rows, columns), group = packed.shape, packed.group_size
    codes = F.pad(packed.unpacked_codes(), (0, -columns % STRIDE))
    added = codes.shape[1] // group - packed.scale.shape[1]
    scales = F.pad(packed.scale, (0, added, 0, -rows % ROWS)).contiguous().view(torch.int32)
    tensor = 1.0 if packed.tensor_scale is None else float(packed.tensor_scale)
    return Prepared(
        words(codes, 4, 4 * group),
        scales.t().contiguous(),
        packed.scale_code == E8M0,
        tensor * 2**14,
        packed,
        counters(rows, packed.codes.device),
    )


def multiply(prepared: Prepared, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., in] fp16 or bf16 times the transposed matrix, plus bias [out]: [..., out] in the dtype of x."""
    return in_tiles(
        x, bias, REGIMES, partial(add_multiplied, prepared), lambda: prepared.packed.dequantize().to(x.dtype)
    )


def add_multiplied(
    prepared: Prepared, x: Tensor, addend: Tensor | None, tile: Regime, split: int | None = None
) -> Tensor:
    """x [tokens, in] times the transposed matrix, plus an addend [tokens or 1, out]: [tokens, out]."""
    (rows, _), group = prepared.packed.shape, prepared.packed.group_size
    turns = len(prepared.scales) * 4 * group // STRIDE
    call = launch(x, rows, turns, tile, prepared.arrived, addend, split)
    halves, _, factor = halved(x, STRIDE, group, 4, STRIDE, None, tile.tokens)
    _multiply[call.grid](
        halves, factor, prepared.words, prepared.scales, *call.ending, turns, prepared.scales.shape[1],
        prepared.factor, GROUP=group, STRIDE=STRIDE, EXPONENTS=prepared.exponents, **call.constants,
    )  # fmt: skip
    return call.y


@triton.constexpr_function
def place(slab: int) -> str:
    """PTX: two fp16 numbers, $0, of the E2M1 codes of a slab in the pair of words $1."""
    first = slab // 2 * 4 + 8 * (slab % 2)  # the lowest bit of a code
    sign = f"shl.b32 t, $1, {12 - first}; and.b32 t, t, 0x80008000;"
    move = f"shl.b32 u, $1, {9 - first};" if first < 9 else f"shr.b32 u, $1, {first - 9};"
    return f"{{ .reg .b32 t, u; {sign} {move} lop3.b32 $0, u, 0x0e000e00, t, 0xea; }}"


@triton.jit
def decoded(words: tl.tensor, slab: tl.constexpr, ASM: tl.constexpr) -> tl.tensor:
    """The slab's E2M1 numbers, times 2**-14: fp16, of the shape of the tile of words int16."""
    if ASM:
        value = tl.inline_asm_elementwise(place(slab), "=r,r", [words], dtype=tl.float16, is_pure=True, pack=2)
    else:
        code = (words.to(tl.int32) >> (slab // 2 * 4 + 8 * (slab % 2))) & 15
        value = (((code & 8) << 12) | ((code & 7) << 9)).to(tl.int16).to(tl.float16, bitcast=True)
    return value


@triton.jit
def _multiply(
    halves: tl.tensor,
    factor: tl.tensor,
    words: tl.tensor,
    scales: tl.tensor,
    partial: tl.tensor,
    arrived: tl.tensor,
    addend: tl.tensor,
    addend_stride: tl.tensor,
    out: tl.tensor,
    M: tl.tensor,
    N: tl.tensor,
    turns: tl.tensor,
    padded: tl.tensor,
    whole: tl.tensor,
    GROUP: tl.constexpr,
    STRIDE: tl.constexpr,
    EXPONENTS: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
    ADD: tl.constexpr,
    ASM: tl.constexpr,
) -> None:
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    w = tl.arange(0, GROUP)
    tokens = tl.num_programs(1) * TOKENS
    row = words + n.to(tl.int64)[:, None] * (turns * STRIDE // 4) + w[None, :]
    token = halves + m.to(tl.int64)[None, :] * (turns * STRIDE) + w[:, None]
    blocks: tl.constexpr = STRIDE // (4 * GROUP)
    total = tl.full((ROWS, TOKENS), 0, tl.float32)
    first, last = turns * tl.program_id(2) // SPLIT, turns * (tl.program_id(2) + 1) // SPLIT
    for turn in tl.range(first, last, num_stages=STAGES):
        subtotal = tl.full((ROWS, TOKENS), 0, tl.float32)
        for i in tl.static_range(blocks):
            tile = tl.load(row + (turn * blocks + i) * GROUP)
            four = tl.load(scales + (turn * blocks + i) * padded + n)
            for j in tl.static_range(4):
                numbers = tl.load(token + ((turn * blocks + i) * 4 + j) * GROUP)
                byte = (four >> (8 * j)) & 0xFF
                if EXPONENTS:
                    scale = (byte << 23).to(tl.float32, bitcast=True)
                else:  # fp32 with the same exponent field has 2**-120 of the value; scales are not negative
                    scale = ((byte & 0x7F) << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36
                zero = tl.full((ROWS, TOKENS), 0, tl.float32)
                subtotal += tl.dot(decoded(tile, j, ASM), numbers, zero) * scale[:, None]
        total += subtotal * tl.load(factor + turn * tokens + m)[None, :]
    finish(total * whole, n, m, partial, arrived, addend, addend_stride, out, M, N, SPLIT, ADD)
