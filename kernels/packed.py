"""What a quantized weight matrix stores, and the one operation that reads it: `forward`.

Everything a `Packed` keeps is a buffer, so its storage is counted from the tensors themselves, it moves between
devices as any module does, and accounting, export, evaluation and kernels cannot disagree about its content.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.packing import unpack


class Packed(nn.Module, ABC):
    """A weight matrix [out, in] in storage form. Subclasses register all they store as buffers."""

    shape: tuple[int, int]
    bits: float
    """Nominal width of a code; what is really stored is `stored_bits`."""
    bias_name: ClassVar[str | None] = None
    """The buffer with the bias, where `forward` adds one in a form of its own. Biases are counted apart."""

    @abstractmethod
    def dequantize(self) -> Tensor:
        """The matrix the codes stand for: fp32 [out, in]."""

    def stored_bits(self) -> int:
        """Bits of everything stored for the matrix: codes, scales, zeros, outliers, indices, codebooks."""
        matrix = [buffer for name, buffer in self.named_buffers() if name != self.bias_name]
        return sum(8 * buffer.numel() * buffer.element_size() for buffer in matrix)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., in] times the transposed matrix: [..., out], in the dtype of x."""
        return F.linear(x, self.dequantize().to(x.dtype), bias)


class PackedInteger(Packed):
    """Codes of `bits` bits on a uniform grid: weight = scale · (code − zero), one scale and zero a group.

    Args:
        codes: uint8 [out, packed bytes], see `kernels.packing`.
        scale: fp16 [out, groups].
        zero: uint8 packed codes of all zeros in one row, or None for a symmetric grid (zero = 2**(bits-1)).
        shape: (out, in).
        group_size: columns that share a scale; the last group of a row may be shorter.
        group_index: int16 or int32 [in], the group of each column, where columns of a group are not neighbours.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    group_index: Tensor | None

    def __init__(
        self,
        codes: Tensor,
        scale: Tensor,
        zero: Tensor | None,
        *,
        bits: int,
        shape: tuple[int, int],
        group_size: int,
        group_index: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.bits, self.shape, self.group_size = bits, shape, group_size
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.register_buffer("zero", zero)
        self.register_buffer("group_index", group_index)

    def unpacked_codes(self) -> Tensor:
        """uint8 [out, in]."""
        return unpack(self.codes, int(self.bits), self.shape[1])

    def unpacked_zero(self) -> Tensor:
        """fp32 [out, groups]."""
        if self.zero is None:
            return torch.full_like(self.scale, 2 ** (int(self.bits) - 1), dtype=torch.float32)
        return unpack(self.zero, int(self.bits), self.scale.numel()).view(self.scale.shape).float()

    def dequantize(self) -> Tensor:
        out, columns = self.shape
        codes, scale, zero = self.unpacked_codes().float(), self.scale.float(), self.unpacked_zero()
        if self.group_index is None and columns % self.group_size == 0:
            grouped = codes.view(out, -1, self.group_size)
            return grouped.sub_(zero.unsqueeze(-1)).mul_(scale.unsqueeze(-1)).view(out, columns)
        if self.group_index is None:
            group = torch.arange(columns, device=codes.device) // self.group_size
        else:
            group = self.group_index.long()
        return codes.sub_(zero[:, group]).mul_(scale[:, group])


class PackedDense(Packed):
    """A matrix kept in 16 bits."""

    weight: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        if weight.element_size() != 2:
            raise ValueError(f"PackedDense stores 16-bit floats, not {weight.dtype}")
        self.bits, self.shape = 16, (weight.shape[0], weight.shape[1])
        self.register_buffer("weight", weight)

    def dequantize(self) -> Tensor:
        return self.weight.float()
