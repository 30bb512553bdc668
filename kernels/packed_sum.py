"""A matrix stored as a sum: codes, and what they leave over in another form."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.packed import Packed

INDEX_LIMIT = 2**15  # columns that int16 can number


class PackedSum(Packed):
    """base + correction, such as dense and sparse (SqueezeLLM, SpQR) or codes and low rank (LoRC).

    Args:
        base: the codes; its width is the width of the sum.
        correction: a matrix of the same shape.
    """

    def __init__(self, base: Packed, correction: Packed) -> None:
        super().__init__()
        if base.shape != correction.shape:
            raise ValueError(f"a matrix of {base.shape} cannot be corrected by one of {correction.shape}")
        self.bits, self.shape = base.bits, base.shape
        self.base, self.correction = base, correction

    def dequantize(self) -> Tensor:
        return self.base.dequantize() + self.correction.dequantize()

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        summed: Tensor = self.base(x, bias) + self.correction(x)
        return summed


class PackedSparse(Packed):
    """A matrix of few nonzero values, row by row (CSR).

    Args:
        values: fp16 [nonzeros], row by row.
        columns: int16 [nonzeros], or int32 where a row has more than 2^15 columns.
        row_start: int32 [out + 1]: row r has the values from row_start[r] to row_start[r + 1].
        shape: (out, in).
    """

    values: Tensor
    columns: Tensor
    row_start: Tensor

    def __init__(self, values: Tensor, columns: Tensor, row_start: Tensor, *, shape: tuple[int, int]) -> None:
        super().__init__()
        self.bits, self.shape = 16, shape
        self.register_buffer("values", values)
        self.register_buffer("columns", columns)
        self.register_buffer("row_start", row_start)

    @classmethod
    def of(cls, matrix: Tensor, mask: Tensor) -> PackedSparse:
        """What `matrix` [out, in] holds where `mask`, bool [out, in], is true."""
        rows, columns = matrix.shape
        counts = torch.cat([mask.new_zeros(1, dtype=torch.int64), mask.sum(1).cumsum(0)])
        index = torch.int16 if columns <= INDEX_LIMIT else torch.int32
        where = mask.nonzero()[:, 1].to(index)
        return cls(matrix[mask].to(torch.float16), where, counts.to(torch.int32), shape=(rows, columns))

    def dequantize(self) -> Tensor:
        counts = self.row_start.diff().long()
        rows = torch.arange(self.shape[0], device=counts.device).repeat_interleave(counts)
        matrix = torch.zeros(self.shape, device=counts.device)
        matrix[rows, self.columns.long()] = self.values.float()
        return matrix


class PackedLowRank(Packed):
    """The product of two thin matrices, each stored in a form of its own.

    Args:
        left: [out, rank].
        right: [rank, in].
    """

    def __init__(self, left: Packed, right: Packed) -> None:
        super().__init__()
        if left.shape[1] != right.shape[0]:
            raise ValueError(f"matrices of {left.shape} and {right.shape} have no product")
        self.bits, self.shape = left.bits, (left.shape[0], right.shape[1])
        self.left, self.right = left, right

    def dequantize(self) -> Tensor:
        return self.left.dequantize() @ self.right.dequantize()

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        inner = F.linear(x, self.right.dequantize().to(x.dtype))
        return F.linear(inner, self.left.dequantize().to(x.dtype), bias)
