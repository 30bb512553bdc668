"""Integers whose width differs from one group of columns to the next (SliM-LLM)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.packed import Packed
from kernels.packing import pack, row_bytes, unpack

WIDTH_BITS = 2
SPREAD = 2**WIDTH_BITS - 1
"""Largest difference between two widths in one matrix."""


class PackedGroupWidths(Packed):
    """Integers on a uniform grid: weight = scale · (code − zero), one scale and zero a row and group, and one width
    a group of columns.

    Zero points are codes of their group's width. Groups of one bit, whose two levels lie anywhere, have them in fp16.

    Args:
        codes: uint8 [out, packed bytes]: all columns of the least width, then those of the next, see `pack_columns`.
        scale: fp16 [out, groups].
        zero: uint8 [1, packed bytes], of groups of two and more bits, row by row.
        level: fp16 [out, groups of one bit], their zero points.
        width: uint8 [1, packed bytes], 2-bit codes of each group's width minus `narrowest`.
        narrowest: the least width.
        shape: (out, in).
        group_size: columns that share a scale; the last group of a row may be shorter.
        order: int16 or int32 [in], where columns of a group are not neighbours: the matrix's column that is i-th here.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    level: Tensor
    width: Tensor
    order: Tensor | None

    def __init__(
        self,
        codes: Tensor,
        scale: Tensor,
        zero: Tensor,
        level: Tensor,
        width: Tensor,
        *,
        narrowest: int,
        shape: tuple[int, int],
        group_size: int,
        order: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.narrowest, self.shape, self.group_size = narrowest, shape, group_size
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.register_buffer("zero", zero)
        self.register_buffer("level", level)
        self.register_buffer("width", width)
        self.register_buffer("order", order)
        self.bits = float(self._column_widths().float().mean())

    @classmethod
    def of(
        cls,
        codes: Tensor,
        scale: Tensor,
        zero: Tensor,
        widths: Sequence[int],
        group_size: int,
        order: Tensor | None = None,
    ) -> PackedGroupWidths:
        """Pack codes uint8 [out, in] with scale and zero fp32 [out, groups] and one width a group."""
        group_width = torch.tensor(widths, device=codes.device)
        column_width = group_width.repeat_interleave(group_size)[: codes.shape[1]]
        several = group_width > 1
        return cls(
            pack_columns(codes, column_width),
            scale.to(torch.float16),
            pack_columns(zero[:, several].reshape(1, -1), group_width[several].repeat(len(zero))),
            zero[:, ~several].to(torch.float16),
            pack((group_width - min(widths)).unsqueeze(0), WIDTH_BITS),
            narrowest=min(widths),
            shape=(codes.shape[0], codes.shape[1]),
            group_size=group_size,
            order=order,
        )

    def widths(self) -> Tensor:
        """int64 [groups]."""
        return unpack(self.width, WIDTH_BITS, self.scale.shape[1])[0].long() + self.narrowest

    def unpacked_codes(self) -> Tensor:
        """uint8 [out, in]; with `order`, in the order of storage."""
        return unpack_columns(self.codes, self._column_widths())

    def unpacked_zero(self) -> Tensor:
        """fp32 [out, groups]."""
        widths, zero = self.widths(), torch.empty_like(self.scale, dtype=torch.float32)
        several = widths > 1
        zero[:, several] = unpack_columns(self.zero, widths[several].repeat(len(zero))).view(len(zero), -1).float()
        zero[:, ~several] = self.level.float()
        return zero

    def dequantize(self) -> Tensor:
        group = torch.arange(self.shape[1], device=self.codes.device) // self.group_size
        stored = (self.unpacked_codes().float() - self.unpacked_zero()[:, group]) * self.scale.float()[:, group]
        return stored if self.order is None else stored[:, torch.argsort(self.order)]

    def _column_widths(self) -> Tensor:
        return self.widths().repeat_interleave(self.group_size)[: self.shape[1]]


def pack_columns(codes: Tensor, widths: Tensor) -> Tensor:
    """Pack codes [rows, columns] of different widths, int64 [columns]: uint8 [rows, packed bytes].

    Sections of one width each, the least first, and inside a section the layout of `kernels.packing`.
    """
    sections = [pack(codes[:, widths == width], width) for width in sorted(set(widths.tolist()))]
    return torch.cat(sections, dim=1) if sections else codes.new_empty(len(codes), 0, dtype=torch.uint8)


def unpack_columns(packed: Tensor, widths: Tensor) -> Tensor:
    """The inverse of `pack_columns`: uint8 [rows, columns]."""
    codes = torch.empty(len(packed), len(widths), dtype=torch.uint8, device=packed.device)
    start = 0
    for width, count in sorted(Counter(widths.tolist()).items()):
        stop = start + row_bytes(count, width)
        codes[:, widths == width] = unpack(packed[:, start:stop], width, count)
        start = stop
    return codes


def columns_bytes(widths: Sequence[int]) -> int:
    """Bytes that one row of `pack_columns` takes."""
    return sum(row_bytes(count, width) for width, count in Counter(widths).items())
