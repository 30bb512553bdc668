"""INT2 to INT8, symmetric or asymmetric, per output channel or per group of input channels."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kernels.packed import PackedInteger
from kernels.packing import pack, row_bytes
from methods.formats.base import Format, Grid, Lattice

WIDTHS = range(2, 9)
TINIEST_SCALE = 2.0**-24  # smallest positive fp16: scales are stored in fp16


@dataclass(frozen=True)
class Integer(Format):
    """A uniform grid of 2**bits points per group.

    Asymmetric: the range is [min(w, 0), max(w, 0)] and the zero point a stored code. Symmetric: the range is
    ±max|w| with the zero point fixed at 2**(bits-1) and scale 2·max|w|/(2**bits − 1), as in GPTQ's code; the
    largest positive weight is then clipped by half a step. Restricted: symmetric without the lowest code, so that
    max|w| of either sign is a grid point, with scale max|w|/(2**(bits-1) − 1), as is usual in INT8 practice
    (ZeroQuant, LLM.int8(), SmoothQuant).

    Args:
        width: bits of a code, 2 to 8.
        group_size: columns that share a scale and zero point; 0 means the whole row (per output channel).
        symmetric: fixed instead of stored zero points.
        restricted: leave the lowest code of a symmetric grid unused.
        clip: shrink each group's range to minimize Σ|Q(w) − w|^2.4, the search of GPTQ's code
            (80 factors from 1 down to 0.21).
    """

    width: int
    group_size: int = 0
    symmetric: bool = False
    clip: bool = False
    restricted: bool = False

    CLIP_FACTORS: ClassVar[tuple[float, ...]] = tuple(1 - i / 100 for i in range(80))
    CLIP_NORM: ClassVar[float] = 2.4

    def __post_init__(self) -> None:
        if self.width not in WIDTHS:
            raise ValueError(f"integer formats have 2 to 8 bits, not {self.width}")
        if self.group_size < 0:
            raise ValueError(f"group size {self.group_size} is not positive; 0 means per channel")
        if self.restricted and not self.symmetric:
            raise ValueError("an asymmetric grid uses all of its codes; give restricted formats symmetric=True")

    @property
    def name(self) -> str:
        group = f"g{self.group_size}" if self.group_size else "channel"
        options = {"sym": self.symmetric, "restricted": self.restricted, "clip": self.clip}
        return "-".join([f"int{self.width}", group, *(name for name, chosen in options.items() if chosen)])

    @property
    def bits(self) -> float:
        return self.width

    @property
    def lowest(self) -> int:
        """The least code in use."""
        return int(self.restricted)

    def fit(self, weight: Tensor) -> IntegerGrid:
        columns = weight.shape[1]
        size = self.columns_per_group(columns)
        ragged = columns % size
        body, tail = weight[:, : columns - ragged], weight[:, columns - ragged :]
        scale, zero = self.scale_and_zero(body.unflatten(1, (-1, size)))  # [out, groups]
        if ragged:
            last_scale, last_zero = self.scale_and_zero(tail)
            scale = torch.cat([scale, last_scale[:, None]], dim=1)
            zero = torch.cat([zero, last_zero[:, None]], dim=1)
        return IntegerGrid(self, scale, zero, columns)

    def stored_bits(self, shape: tuple[int, int]) -> int:
        out, columns = shape
        groups = out * -(-columns // self.columns_per_group(columns))
        zeros = 0 if self.symmetric else 8 * row_bytes(groups, self.width)
        return 8 * out * row_bytes(columns, self.width) + 16 * groups + zeros

    def columns_per_group(self, columns: int) -> int:
        """The group size in a matrix of so many columns."""
        return min(self.group_size or columns, columns)

    def scale_and_zero(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Scale (fp32 values that fp16 represents) and zero point of weights [..., group]: each [...]."""
        low, high = weight.amin(-1).clamp(max=0), weight.amax(-1).clamp(min=0)
        if not self.clip:
            return self._from_range(low, high)
        best = torch.full_like(low, torch.inf)
        scale, zero = self._from_range(low, high)
        for factor in self.CLIP_FACTORS:
            s, z = self._from_range(factor * low, factor * high)
            codes = self.nearest(weight, s.unsqueeze(-1), z.unsqueeze(-1))
            error = ((codes - z.unsqueeze(-1)) * s.unsqueeze(-1) - weight).abs_().pow_(self.CLIP_NORM).sum(-1)
            better = error < best
            best = torch.where(better, error, best)
            scale, zero = torch.where(better, s, scale), torch.where(better, z, zero)
        return scale, zero

    def nearest(self, weight: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """The codes, as floats, of `weight` under scales and zero points that broadcast with it. Half-way cases go to
        the even multiple of the scale, as torch.round does."""
        return torch.round(weight / scale).add_(zero).clamp_(self.lowest, 2**self.width - 1)

    def _from_range(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        top = 2**self.width - 1
        empty = (low == 0) & (high == 0)  # an all-zero group: any scale will do
        low, high = torch.where(empty, -1.0, low), torch.where(empty, 1.0, high)
        if self.symmetric:
            high = torch.maximum(-low, high)
            low = -high
        scale = ((high - low) / (top - self.lowest)).to(torch.float16).float().clamp(min=TINIEST_SCALE)
        if self.symmetric:
            return scale, torch.full_like(scale, 2 ** (self.width - 1))
        return scale, torch.round(-low / scale).clamp(0, top)


class IntegerGrid(Grid):
    """Scales and zero points of one weight matrix, fitted by `Integer.fit` or learned.

    Args:
        fmt: the format.
        scale: fp32 [out, groups], positive; rounded to what fp16 represents, as it is stored.
        zero: fp32 [out, groups], whole numbers in [0, 2**width − 1]; of symmetric formats 2**(width − 1).
        columns: of the matrix.
    """

    def __init__(self, fmt: Integer, scale: Tensor, zero: Tensor, columns: int) -> None:
        self.format = fmt
        self.columns = columns
        self.group_size = fmt.columns_per_group(columns)
        self.scale = scale.to(torch.float16).float().clamp(min=TINIEST_SCALE)
        self.zero = zero
        self.group = [column // self.group_size for column in range(columns)]

    def refit(self, group: int, weight: Tensor) -> None:
        self.scale[:, group], self.zero[:, group] = self.format.scale_and_zero(weight)

    def encode(self, weight: Tensor, start: int = 0) -> Tensor:
        scale, zero = self._columns(start, weight.shape[1])
        return self.format.nearest(weight, scale, zero).to(torch.uint8)

    def decode(self, codes: Tensor, start: int = 0) -> Tensor:
        scale, zero = self._columns(start, codes.shape[1])
        return (codes - zero) * scale

    def lattice(self, start: int, count: int) -> Lattice:
        return Lattice(*self._columns(start, count), self.format.lowest, 2**self.format.width - 1)

    def permuted(self, order: Tensor) -> IntegerGrid:
        grid = copy(self)
        grid.group = [self.group[column] for column in order.tolist()]
        return grid

    def pack(self, codes: Tensor, order: Tensor | None = None) -> PackedInteger:
        group_index = None
        if order is not None:
            inverse = torch.argsort(order)
            codes = codes[:, inverse]
            index = torch.tensor(self.group, device=order.device)[inverse]
            if not torch.equal(index, torch.arange(self.columns, device=order.device) // self.group_size):
                group_index = index.to(torch.int16 if self.scale.shape[1] < 2**15 else torch.int32)
        zero = None if self.format.symmetric else pack(self.zero.reshape(1, -1), self.format.width)
        return PackedInteger(
            pack(codes, self.format.width),
            self.scale.to(torch.float16),
            zero,
            bits=self.format.width,
            shape=(codes.shape[0], codes.shape[1]),
            group_size=self.group_size,
            group_index=group_index,
        )

    def _columns(self, start: int, count: int) -> tuple[Tensor, Tensor]:
        """Scale and zero of each of `count` columns: [out, count], or [out, 1] where they share one group."""
        group = self.group[start : start + count]
        first = group[0]
        if group.count(first) == count:
            return self.scale[:, first : first + 1], self.zero[:, first : first + 1]
        index = torch.tensor(group, device=self.scale.device)
        return self.scale.index_select(1, index), self.zero.index_select(1, index)
