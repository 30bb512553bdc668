"""A matrix whose decoded weights are rounded once more, to the number format that the multiplication is done in."""

from __future__ import annotations

from torch import Tensor

from kernels.minifloat import Element
from kernels.packed import Packed


class PackedRecast(Packed):
    """step · nearest element of (base / step): 4-bit integers that are multiplied as FP8, say (W4A8).

    Args:
        base: the codes.
        step: fp32 [], positive.
        element: the number format of base / step.
    """

    step: Tensor

    def __init__(self, base: Packed, step: Tensor, element: Element) -> None:
        super().__init__()
        self.bits, self.shape = base.bits, base.shape
        self.base, self.element = base, element
        self.register_buffer("step", step)

    def dequantize(self) -> Tensor:
        return self.element.snap(self.base.dequantize() / self.step) * self.step
