"""W8A8, W4A8 and FP8: activations are rounded to 8 bits per token, and tensor cores multiply codes with codes.

Σ s (q − z) · t x = s t (Σ q x − z Σ x) with the codes q and x, s per channel or per group, and t per token. Codes of
8 bits are stored as signed bytes. A byte with two codes of 4 bits is read as two bytes, each 16 times a signed code,
with one or two operations for four weights (as in QServe, arXiv 2405.04532, but without overflow by construction);
the 16 is taken off at the end.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels.activations import TokenScale, integers
from kernels.linear import Inputs
from kernels.minifloat import E4M3, Element
from kernels.packed import Packed, PackedInteger
from kernels.packed_float import PackedFloat, decoded_scale
from kernels.triton.decode import split
from kernels.triton.finish import finish
from kernels.triton.launch import Regime, counters, in_tiles, launch, unfit
from kernels.triton.layout import ROWS, pairs
from kernels.triton.rounding import rounded

REGIMES = (Regime(16, 16, 128, 4, 4), Regime(64, 64, 128, 4, 4), Regime(2**31, 128, 128, 8, 3))
BLOCKS = (128, 64)
HIGH_OF_LOW: tl.constexpr = tl.constexpr("{ .reg .b32 t; shl.b32 t, $1, 4; and.b32 $0, t, 0xf0f0f0f0; }")
FLOATS = 89  # the first compute capability, times ten, whose tensor cores multiply FP8


@dataclass(frozen=True)
class Prepared:
    """The matrix as the kernel reads it.

    Args:
        codes: int8 or float8_e4m3fn [rows, blocks · block · bits / 8].
        pairs: int32 [groups, rows], of fp16 scales and of zeros of signed codes.
        span: columns of a group, 0 if each channel is one.
        factor: of the whole matrix.
        arrived: see `kernels.triton.launch.counters`.
    """

    codes: Tensor
    pairs: Tensor
    bits: int
    block: int
    span: int
    shape: tuple[int, int]
    factor: float
    arrived: Tensor


def supports(packed: Packed, x: Tensor, inputs: Inputs | None) -> str | None:
    """None if `multiply` computes what `packed` does with inputs that `inputs` rounds, else why not."""
    element: Element = integers(8)
    if isinstance(packed, PackedFloat):
        per_channel = packed.group_size >= packed.shape[1] and packed.scale_code is None
        if packed.element != E4M3 or not per_channel:
            return "of the block-scaled floats, only FP8 (E4M3) per channel is multiplied in 8 bits"
        if x.is_cuda and torch.cuda.get_device_capability(x.device) < divmod(FLOATS, 10):
            return "tensor cores multiply FP8 from compute capability 8.9 on"
        element = E4M3
    elif isinstance(packed, PackedInteger) and packed.bits in (4, 8) and packed.group_index is None:
        if type(packed) is not PackedInteger:
            return "zeros must be whole numbers"
        if packed.group_size < packed.shape[1] and not _block(packed):
            return f"groups of {packed.group_size} columns do not fit blocks of {BLOCKS} columns"
    else:
        return "only integers of 4 or 8 bits, with groups of neighbours, and FP8 are multiplied in 8 bits"
    if not isinstance(inputs, TokenScale) or inputs.element != element:
        return f"inputs must be rounded to {element.name} per token"
    return unfit(x.device)


def prepare(packed: PackedInteger | PackedFloat) -> Prepared:
    """Reorders codes, scales and zeros; nothing is rounded."""
    rows, columns = packed.shape
    arrived = counters(rows, packed.codes.device)
    if isinstance(packed, PackedFloat):
        size, codes = BLOCKS[0], _padded(packed.unpacked_codes(), BLOCKS[0]).view(torch.float8_e4m3fn)
        tensor = 1.0 if packed.tensor_scale is None else float(packed.tensor_scale)
        both = pairs(decoded_scale(packed.scale, None, None), torch.zeros_like(packed.scale), 1)
        return Prepared(codes, both, 8, size, 0, packed.shape, tensor, arrived)
    bits, span = int(packed.bits), packed.group_size if packed.group_size < columns else 0
    size = _block(packed) if span else BLOCKS[0]
    signed = packed.unpacked_codes() ^ 2 ** (bits - 1)  # the lowest bits of code − 2**(bits − 1)
    codes = _padded(signed, size)
    if bits == 4:
        low, high = codes.unflatten(1, (-1, 2, size // 2)).unbind(2)
        codes = (low | high << 4).flatten(1)
    groups = -(-(columns + -columns % size) // span) if span else 1
    both = pairs(packed.scale, packed.unpacked_zero() - 2 ** (bits - 1), groups)
    return Prepared(
        codes.view(torch.int8).contiguous(), both, bits, size, span, packed.shape, 1 / 16 if bits == 4 else 1.0, arrived
    )


def multiply(prepared: Prepared, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., in] times the transposed matrix, plus bias [out]: [..., out] in the dtype of x."""
    return in_tiles(x, bias, REGIMES, partial(add_multiplied, prepared))


def add_multiplied(
    prepared: Prepared, x: Tensor, addend: Tensor | None, tile: Regime, split: int | None = None
) -> Tensor:
    """x [tokens, in] times the transposed matrix, plus an addend [tokens or 1, out]: [tokens, out]."""
    (rows, columns), dtype = prepared.shape, prepared.codes.dtype
    blocks = -(-columns // prepared.block)
    group = min(prepared.span, prepared.block) or prepared.block
    call = launch(x, rows, blocks, tile, prepared.arrived, addend, split)
    inputs = rounded(x, blocks * prepared.block, group, dtype, tile.tokens)
    _multiply[call.grid](
        *inputs, prepared.codes, prepared.pairs, *call.ending, blocks, prepared.pairs.shape[1], prepared.factor,
        BITS=prepared.bits, BLOCK=prepared.block, PARTS=prepared.block // group, SPAN=prepared.span // group,
        FLOAT=dtype.is_floating_point, **call.constants,
    )  # fmt: skip
    return call.y


@triton.jit
def _multiply(
    inputs: tl.tensor,
    token_scale: tl.tensor,
    sums: tl.tensor,
    codes: tl.tensor,
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
    factor: tl.tensor,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    SPAN: tl.constexpr,
    FLOAT: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
    ADD: tl.constexpr,
    ASM: tl.constexpr,
) -> None:
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    BYTES: tl.constexpr = BLOCK * BITS // 8
    SLAB: tl.constexpr = BYTES // PARTS if BITS == 8 else BYTES
    slabs: tl.constexpr = BLOCK // SLAB // PARTS
    kind: tl.constexpr = tl.float32 if FLOAT else tl.int32
    k = tl.arange(0, SLAB)
    tokens = tl.num_programs(1) * TOKENS
    row = codes + n.to(tl.int64)[:, None] * (blocks * BYTES) + k[None, :]
    token = inputs + m.to(tl.int64)[None, :] * (blocks * BLOCK) + k[:, None]
    total = tl.full((ROWS, TOKENS), 0, tl.float32)
    whole = tl.full((ROWS, TOKENS), 0, kind)
    plain = tl.full((TOKENS,), 0, tl.float32)
    first, last = blocks * tl.program_id(2) // SPLIT, blocks * (tl.program_id(2) + 1) // SPLIT
    for block in tl.range(first, last, num_stages=STAGES):
        packed = tl.load(row + block * BYTES) if BITS == 4 else block
        for part in tl.static_range(PARTS):
            product = tl.full((ROWS, TOKENS), 0, kind) if SPAN else whole
            for j in tl.static_range(part * slabs, (part + 1) * slabs):
                numbers = tl.load(token + block * BLOCK + j * SLAB)
                weights = nibbles(packed, j, ASM) if BITS == 4 else tl.load(row + block * BYTES + j * SLAB)
                product = tl.dot(weights, numbers, product, out_dtype=kind, max_num_imprecise_acc=SLAB)
            group = block * PARTS + part
            codes_sum = tl.load(sums + group * tokens + m) * (16 if BITS == 4 else 1)
            if SPAN:
                step, zero = split(tl.load(pairs + group // SPAN * padded + n))
                total += (product.to(tl.float32) - zero[:, None] * codes_sum[None, :]) * step[:, None]
            else:
                whole = product
                plain += codes_sum
    if SPAN == 0:
        step, zero = split(tl.load(pairs + n))
        total = (whole.to(tl.float32) - zero[:, None] * plain[None, :]) * step[:, None]
    total *= tl.load(token_scale + m)[None, :] * factor
    finish(total, n, m, partial, arrived, addend, addend_stride, out, M, N, SPLIT, ADD)


@triton.jit
def nibbles(packed: tl.tensor, high: tl.constexpr, ASM: tl.constexpr) -> tl.tensor:
    """16 times the signed codes in the high or low halves of bytes: int8, of the shape of the bytes."""
    if ASM:
        code: tl.constexpr = "and.b32 $0, $1, 0xf0f0f0f0;" if high else HIGH_OF_LOW
        value = tl.inline_asm_elementwise(code, "=r,r", [packed], dtype=tl.int8, is_pure=True, pack=4)
    elif high:
        value = packed & -16
    else:
        value = (packed.to(tl.int32) << 4).to(tl.int8)
    return value


def _block(packed: PackedInteger) -> int:
    """Columns of a block: the most that groups permit; 0 if none do."""
    span, parts = packed.group_size, 2 if packed.bits == 4 else 4  # slabs, of which a group needs one or more
    return next((size for size in BLOCKS if span % size == 0 or (size % span == 0 and size // span <= parts)), 0)


def _padded(codes: Tensor, block: int) -> Tensor:
    """With zeros up to whole blocks of columns and a multiple of `ROWS` rows."""
    return F.pad(codes, (0, -codes.shape[1] % block, 0, -codes.shape[0] % ROWS))
