"""Integers in small groups whose scales and zero points are stored as integers, too (SpQR)."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.packed import Packed
from kernels.packing import unpack


class PackedAffine(Packed):
    """Codes of `bits` bits on a uniform grid with any origin: value = step · code + offset.

    Args:
        codes: uint8 [rows, packed bytes], see `kernels.packing`.
        step: fp16 [rows, groups].
        offset: fp16 [rows, groups].
        shape: (rows, columns).
        group_size: columns that share a step and an offset; the last group of a row may be shorter.
    """

    codes: Tensor
    step: Tensor
    offset: Tensor

    def __init__(
        self, codes: Tensor, step: Tensor, offset: Tensor, *, bits: int, shape: tuple[int, int], group_size: int
    ) -> None:
        super().__init__()
        self.bits, self.shape, self.group_size = bits, shape, group_size
        self.register_buffer("codes", codes)
        self.register_buffer("step", step)
        self.register_buffer("offset", offset)

    def dequantize(self) -> Tensor:
        codes = unpack(self.codes, int(self.bits), self.shape[1]).float()
        return codes.mul_(self._columns(self.step)).add_(self._columns(self.offset))

    def _columns(self, statistic: Tensor) -> Tensor:
        return statistic.float().repeat_interleave(self.group_size, dim=1)[:, : self.shape[1]]


class PackedTwoLevel(Packed):
    """Codes of `bits` bits: weight = scale · (code − zero), with scales and real-valued zero points packed, too.

    Args:
        codes: uint8 [out, packed bytes], see `kernels.packing`.
        scale: packed [groups, out]: a row holds the scales of one group of columns.
        zero: packed [groups, out].
        shape: (out, in).
        group_size: columns that share a scale; the last group of a row may be shorter.
        group_index: int16 or int32 [in], the group of each column, where columns of a group are not neighbors.
    """

    codes: Tensor
    group_index: Tensor | None

    def __init__(
        self,
        codes: Tensor,
        scale: Packed,
        zero: Packed,
        *,
        bits: int,
        shape: tuple[int, int],
        group_size: int,
        group_index: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.bits, self.shape, self.group_size = bits, shape, group_size
        self.scale, self.zero = scale, zero
        self.register_buffer("codes", codes)
        self.register_buffer("group_index", group_index)

    def unpacked_codes(self) -> Tensor:
        """uint8 [out, in]."""
        return unpack(self.codes, int(self.bits), self.shape[1])

    def dequantize(self) -> Tensor:
        if self.group_index is None:
            group = torch.arange(self.shape[1], device=self.codes.device) // self.group_size
        else:
            group = self.group_index.long()
        scale, zero = self.scale.dequantize()[group], self.zero.dequantize()[group]  # [in, out]
        return self.unpacked_codes().float().sub_(zero.t()).mul_(scale.t())
