"""A matrix some of whose columns are stored in 16 bits, whatever stores the rest."""

from __future__ import annotations

from torch import Tensor

from kernels.packed import Packed, PackedDense
from kernels.packed_sum import INDEX_LIMIT


class PackedColumns(Packed):
    """A packed matrix and columns that stand in place of its own.

    The base keeps its codes of these columns, so that it stays a dense matrix; they are counted as stored.

    Args:
        base: the whole matrix; its width is the width of the result.
        kept: the columns, [out, kept].
        index: int16 [kept], or int32 where the matrix has more than 2^15 columns: their places, all different.
    """

    index: Tensor

    def __init__(self, base: Packed, kept: PackedDense, index: Tensor) -> None:
        super().__init__()
        if kept.shape != (base.shape[0], len(index)):
            raise ValueError(f"columns of {kept.shape} do not fit {len(index)} places in a matrix of {base.shape}")
        self.bits, self.shape = base.bits, base.shape
        self.base, self.kept = base, kept
        self.register_buffer("index", index)

    @classmethod
    def of(cls, base: Packed, kept: PackedDense, where: Tensor) -> PackedColumns:
        """With `kept` in the columns where the mask, bool [in], is true."""
        index = where.nonzero().flatten()
        return cls(base, kept, index.short() if len(where) <= INDEX_LIMIT else index.int())

    def dequantize(self) -> Tensor:
        return self.base.dequantize().index_copy(1, self.index.long(), self.kept.dequantize())
