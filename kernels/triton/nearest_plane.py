"""GPTQ's column loop: Babai's algorithm on one block of columns, all columns in one launch and rows in parallel.

A thread keeps the errors of one row's columns in registers, so that what a column is due is a sum within a thread.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton.launch import unfit
from kernels.triton.rounding import nearest

MOST = 128  # columns whose errors fit into the registers of a thread
THREADS = 32


def supports(target: Tensor) -> str | None:
    """None if `nearest_plane` can take this, else why not."""
    if len(target) > MOST:
        return f"{len(target)} columns are more than the {MOST} whose errors fit into registers"
    return unfit(target.device)


def nearest_plane(target: Tensor, factor: Tensor, step: Tensor, low: Tensor, high: Tensor, multiples: Tensor) -> Tensor:
    """The multiples of `step` that `target` becomes, column by column, each due the errors before it: the result of
    `methods.rounding.gptq.nearest_plane` up to the order of sums. fp32 [columns, out].

    Args:
        target: fp32 [columns, out]; as are `step`, the least and the largest factor, whole numbers.
        factor: fp32 [columns, columns], upper triangular: the diagonal block of R, with R Rᵀ the Gram matrix.
        multiples: receives the factors, fp32 [columns, out].
    """
    count, rows = target.shape
    size = max(triton.next_power_of_2(count), 16)
    gains = (factor / factor.diagonal()).triu(1).contiguous()  # column i: what column i takes over of earlier errors
    tensors = [tensor.contiguous() for tensor in (target, step, low, high)]
    points = torch.empty_like(multiples)
    _columns[(triton.cdiv(rows, THREADS),)](
        *tensors, gains, multiples, points, count, rows, multiples.stride(0), COLUMNS=size, ROWS=THREADS,
        num_warps=1, enable_fp_fusion=True,
    )  # fmt: skip
    return points


@triton.jit
def _columns(
    target: tl.tensor,
    step: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    gains: tl.tensor,
    multiples: tl.tensor,
    points: tl.tensor,
    count: tl.tensor,
    rows: tl.tensor,
    stride: tl.tensor,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    mask = row < rows
    errors = tl.full((COLUMNS, ROWS), 0, tl.float32)
    for i in range(count):
        place = i * rows + row
        weight = tl.load(target + place, mask=mask, other=0)
        unit = tl.load(step + place, mask=mask, other=1)
        share = tl.load(gains + column * count + i, mask=column < i, other=0)
        due = weight + tl.sum(errors * share[:, None], 0)
        least, most = tl.load(low + place, mask=mask, other=0), tl.load(high + place, mask=mask, other=0)
        # Whole limits commute with rounding, and come first, since `nearest` is exact for numbers that are not large.
        multiple = nearest(tl.minimum(tl.maximum(tl.div_rn(due, unit), least), most))
        point = multiple * unit
        tl.store(multiples + i * stride + row, multiple, mask=mask)
        tl.store(points + i * rows + row, point, mask=mask)
        errors = tl.where((column == i)[:, None], (weight - point)[None, :], errors)
