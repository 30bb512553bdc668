"""Codes and a few weights in full (SqueezeLLM, SpQR): the sparse part is computed first, and the dense kernel adds it
as it would a bias, so that the output is rounded and written once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.packed import Packed, PackedInteger
from kernels.packed_codebook import PackedCodebook
from kernels.packed_sum import PackedSparse, PackedSum
from kernels.triton import codebook, weight_only
from kernels.triton.launch import regime

CHUNK = 64  # weights of a row that a program takes at once
TOKENS = 16


@dataclass(frozen=True)
class Prepared:
    """Both parts."""

    dense: weight_only.Prepared | codebook.Prepared
    sparse: PackedSparse


def supports(packed: Packed, x: Tensor) -> str | None:
    """None if `multiply` can take these, else why not."""
    if not isinstance(packed, PackedSum) or not isinstance(packed.correction, PackedSparse):
        return "only sums of codes and a sparse matrix are taken here"
    if isinstance(packed.base, PackedCodebook):
        return codebook.supports(packed.base, x)
    return weight_only.supports(packed.base, x)


def prepare(packed: PackedSum) -> Prepared:
    """Nothing is rounded."""
    base, sparse = packed.base, packed.correction
    assert isinstance(base, PackedCodebook | PackedInteger) and isinstance(sparse, PackedSparse)
    return Prepared(codebook.prepare(base) if isinstance(base, PackedCodebook) else weight_only.prepare(base), sparse)


def multiply(prepared: Prepared, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., in] fp16 or bf16 times the transposed sum, plus bias [out]: [..., out] in the dtype of x."""
    tokens = x.reshape(-1, x.shape[-1]).contiguous()
    addend = sparse_product(prepared.sparse, tokens, bias)
    dense = prepared.dense
    module = codebook if isinstance(dense, codebook.Prepared) else weight_only
    tile = regime(module.REGIMES, len(tokens))
    if tile is None:
        y = (module.multiply(dense, tokens).float() + addend).to(x.dtype)
    else:
        y = module.add_multiplied(dense, tokens, addend, tile)
    return y.view(*x.shape[:-1], prepared.sparse.shape[0])


def sparse_product(sparse: PackedSparse, x: Tensor, bias: Tensor | None) -> Tensor:
    """x [tokens, in] times the transposed sparse matrix, plus bias [out]: fp32 [tokens, out]."""
    count, (rows, columns) = len(x), sparse.shape
    y = torch.empty(count, rows, device=x.device)
    _multiply[(rows, -(-count // TOKENS))](
        x, sparse.values, sparse.columns, sparse.row_start, bias, y, count, rows, columns,
        TOKENS=TOKENS, CHUNK=CHUNK, ADD=bias is not None, num_warps=2, enable_fp_fusion=True,
    )  # fmt: skip
    return y


@triton.jit
def _multiply(
    x: tl.tensor,
    values: tl.tensor,
    places: tl.tensor,
    row_start: tl.tensor,
    bias: tl.tensor,
    y: tl.tensor,
    M: tl.tensor,
    N: tl.tensor,
    columns: tl.tensor,
    TOKENS: tl.constexpr,
    CHUNK: tl.constexpr,
    ADD: tl.constexpr,
) -> None:
    row = tl.program_id(0)
    m = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    total = tl.full((TOKENS, CHUNK), 0, tl.float32)
    end = tl.load(row_start + row + 1)
    for start in range(tl.load(row_start + row), end, CHUNK):
        i = start + tl.arange(0, CHUNK)
        weights = tl.load(values + i, mask=i < end, other=0).to(tl.float32)
        k = tl.load(places + i, mask=i < end, other=0).to(tl.int32)
        mask = (m < M)[:, None] & (i < end)[None, :]
        inputs = tl.load(x + m.to(tl.int64)[:, None] * columns + k[None, :], mask=mask, other=0).to(tl.float32)
        total += inputs * weights[None, :]
    result = tl.sum(total, 1)
    if ADD:
        result += tl.load(bias + row).to(tl.float32)
    tl.store(y + m.to(tl.int64) * N + row, result, mask=m < M)
