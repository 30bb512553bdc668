"""A small number format under one scale for the whole matrix: FP8 per tensor."""

from __future__ import annotations

from torch import Tensor

from kernels.minifloat import Element
from kernels.packed import Packed
from kernels.packing import unpack


class PackedTensorFloat(Packed):
    """weight = element · scale.

    Args:
        codes: uint8 [out, packed bytes], see `kernels.packing`.
        scale: fp32 [].
        element: the number format of the codes.
        shape: (out, in).
    """

    codes: Tensor
    scale: Tensor

    def __init__(self, codes: Tensor, scale: Tensor, *, element: Element, shape: tuple[int, int]) -> None:
        super().__init__()
        self.bits, self.shape, self.element = element.bits, shape, element
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)

    def dequantize(self) -> Tensor:
        return self.element.decode(unpack(self.codes, self.element.bits, self.shape[1])) * self.scale
