"""Block-scaled floats: FP8 per channel, the MX formats, NVFP4."""

from __future__ import annotations

from torch import Tensor

from kernels.minifloat import Code, Element
from kernels.packed import Packed
from kernels.packing import unpack


class PackedFloat(Packed):
    """Codes of a small number format: weight = element · block scale · tensor scale.

    Args:
        codes: uint8 [out, packed bytes], see `kernels.packing`.
        scale: one per block, [out, blocks]: uint8 codes of `scale_code`, or fp16 if that is None.
        tensor_scale: fp32 [], or None for 1.
        element: the number format of the codes.
        scale_code: the number format of the block scales.
        shape: (out, in).
        group_size: columns that share a scale; the last block of a row may be shorter.
    """

    codes: Tensor
    scale: Tensor
    tensor_scale: Tensor | None

    def __init__(
        self,
        codes: Tensor,
        scale: Tensor,
        tensor_scale: Tensor | None = None,
        *,
        element: Element,
        scale_code: Code | None,
        shape: tuple[int, int],
        group_size: int,
    ) -> None:
        super().__init__()
        self.bits, self.shape, self.group_size = element.bits, shape, group_size
        self.element, self.scale_code = element, scale_code
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.register_buffer("tensor_scale", tensor_scale)

    def unpacked_codes(self) -> Tensor:
        """uint8 [out, in]."""
        return unpack(self.codes, self.element.bits, self.shape[1])

    def dequantize(self) -> Tensor:
        scale = decoded_scale(self.scale, self.scale_code, self.tensor_scale)
        columns = scale.repeat_interleave(self.group_size, dim=1)[:, : self.shape[1]]
        return self.element.decode(self.unpacked_codes()).mul_(columns)


def decoded_scale(scale: Tensor, scale_code: Code | None, tensor_scale: Tensor | None) -> Tensor:
    """The factor of each block, from what `PackedFloat` stores: fp32 [out, blocks]."""
    factor = scale.float() if scale_code is None else scale_code.decode(scale)
    return factor if tensor_scale is None else factor * tensor_scale
