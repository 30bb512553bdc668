"""What is timed: our kernels and their peers, each as a function of the input and one of several weights.

A contender is correct if it multiplies with the matrix that its own weights stand for; how well that matrix
approximates another is not asked here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.activations import TokenScale, integers
from kernels.bench.gpu.shapes import Shape
from kernels.minifloat import E4M3
from kernels.packed import PackedInteger
from kernels.packed_codebook import PackedCodebook
from kernels.packed_float import PackedFloat
from kernels.packing import row_bytes
from kernels.triton import codebook, eight_bit, weight_only


@dataclass(frozen=True)
class Contender:
    """One implementation on one shape.

    Args:
        weight_bytes: that a call reads.
        call: of the input, bf16 [tokens, columns], and a weight.
        weight: the first, with which results are checked.
        fresh: another weight of the same form with other numbers.
        truth: the matrix that the first weight stands for, fp32 [rows, columns]; empty if results go unchecked, since
            a bare product has no inputs in common with the others.
        inputs: how inputs are rounded before, or None.
    """

    name: str
    weight_bytes: int
    call: Callable[[Tensor, Any], Tensor]
    weight: Any
    fresh: Callable[[], Any]
    truth: Callable[[], Tensor]
    inputs: TokenScale | None = None


Maker = Callable[[Shape, int], Contender]
"""Of the shape and the number of tokens."""


def dense(shape: Shape, tokens: int) -> Contender:
    """cuBLAS."""
    del tokens

    def fresh() -> Tensor:
        return torch.randn(shape[:2], dtype=torch.bfloat16, device="cuda") * 0.02

    first = fresh()
    return Contender("cuBLAS bf16", first.nbytes, F.linear, first, fresh, first.float)


def weight_only_codes(shape: Shape, tokens: int, bits: int) -> Contender:
    """Integers of `bits` bits with bf16 activations."""
    del tokens
    packed = _integers(shape, bits, 128)
    first = weight_only.prepare(packed)

    def fresh() -> weight_only.Prepared:  # any words are codes
        return replace(first, words=_like(first.words, -(2**15), 2**15), pairs=first.pairs.clone())

    size = first.words.nbytes + first.pairs.nbytes
    return Contender(f"W{bits}A16 g128", size, _call(weight_only), first, fresh, packed.dequantize)


def eight_bit_codes(shape: Shape, tokens: int, bits: int, group: int) -> Contender:
    """Integers of `bits` bits with 8-bit activations, their rounding included; group 0 is a channel."""
    del tokens
    packed = _integers(shape, bits, group or shape.columns)
    first = eight_bit.prepare(packed)

    def fresh() -> eight_bit.Prepared:
        return replace(first, codes=_like(first.codes, -128, 128), pairs=first.pairs.clone())

    name, size = f"W{bits}A8 {f'g{group}' if group else 'channel'}", first.codes.nbytes + first.pairs.nbytes
    return Contender(name, size, _call(eight_bit), first, fresh, packed.dequantize, TokenScale(integers(8)))


def fp8(shape: Shape, tokens: int) -> Contender:
    """FP8 with FP8 activations, their rounding included."""
    del tokens
    rows, columns = shape[:2]
    scale = torch.rand(rows, 1, device="cuda").mul_(1e-3).add_(1e-4).half()
    codes = E4M3.encode(torch.randn(rows, columns, device="cuda") * 60)
    packed = PackedFloat(codes, scale, element=E4M3, scale_code=None, shape=(rows, columns), group_size=columns)
    first = eight_bit.prepare(packed)

    def fresh() -> eight_bit.Prepared:
        other = torch.randn(first.codes.shape, device="cuda").mul_(60).to(torch.float8_e4m3fn)
        return replace(first, codes=other)

    return Contender(
        "FP8 channel", first.codes.nbytes, _call(eight_bit), first, fresh, packed.dequantize, TokenScale(E4M3)
    )


def looked_up(shape: Shape, tokens: int, bits: int) -> Contender:
    """Codes of `bits` bits that name entries of their row's table."""
    del tokens
    rows, columns = shape[:2]
    table = torch.randn(rows, 2**bits, device="cuda").mul_(0.02).half()
    packed = PackedCodebook(_bytes(rows, row_bytes(columns, bits)), table, bits=bits, shape=(rows, columns))
    first = codebook.prepare(packed)

    def fresh() -> codebook.Prepared:
        return replace(first, words=_like(first.words, -(2**15), 2**15))

    size = first.words.nbytes + table.nbytes
    return Contender(f"codebook W{bits}A16", size, _call(codebook), first, fresh, packed.dequantize)


OURS: tuple[Maker, ...] = (
    *(partial(weight_only_codes, bits=bits) for bits in (4, 3, 2, 8)),
    partial(eight_bit_codes, bits=8, group=0),
    partial(eight_bit_codes, bits=4, group=128),
    fp8,
    *(partial(looked_up, bits=bits) for bits in (4, 3)),
)


def _call(module: ModuleType) -> Callable[[Tensor, Any], Tensor]:
    return lambda x, prepared: module.multiply(prepared, x)


def _integers(shape: Shape, bits: int, group: int) -> PackedInteger:
    rows, columns = shape[:2]
    groups = -(-columns // group)
    scale = (torch.rand(rows, groups, device="cuda") * 0.02 + 0.005).half()
    codes, zero = _bytes(rows, row_bytes(columns, bits)), _bytes(1, row_bytes(rows * groups, bits))
    return PackedInteger(codes, scale, zero, bits=bits, shape=(rows, columns), group_size=group)


def _bytes(rows: int, size: int) -> Tensor:
    return torch.randint(256, (rows, size), dtype=torch.uint8, device="cuda")


def _like(tensor: Tensor, low: int, high: int) -> Tensor:
    return torch.randint(low, high, tensor.shape, dtype=tensor.dtype, device=tensor.device)
