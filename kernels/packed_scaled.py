"""A matrix whose inputs are scaled at run time, for scales that fold into no operator before it."""

from __future__ import annotations

from torch import Tensor

from kernels.packed import Packed


class PackedScaled(Packed):
    """base · diag(columns).

    Args:
        base: the codes.
        columns: fp16 [in], what each input is multiplied by.
    """

    columns: Tensor

    def __init__(self, base: Packed, columns: Tensor) -> None:
        super().__init__()
        self.bits, self.shape = base.bits, base.shape
        self.base = base
        self.register_buffer("columns", columns)

    def dequantize(self) -> Tensor:
        return self.base.dequantize() * self.columns.float()

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        product: Tensor = self.base(x * self.columns.to(x.dtype), bias)
        return product
