"""Integers whose width differs from one group of input channels to the next, as SliM-LLM stores them."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from kernels.packed_group_widths import SPREAD, WIDTH_BITS, PackedGroupWidths, columns_bytes
from kernels.packing import PLANES, row_bytes
from methods.formats.base import Format, Grid
from methods.formats.integer import TINIEST_SCALE, Integer

Ranges: TypeAlias = Callable[[Tensor, int, int], tuple[Tensor, Tensor]]
"""Scale and zero point, each [out], of one group: of its weights [out, n], its width, and its first column."""

STEEPEST = 2.0**10  # bound of a one-bit zero point, so that fp16 holds it to a fraction of a step


@dataclass(frozen=True)
class GroupWidths(Format):
    """Asymmetric integers with one width for each group of columns, common to all rows.

    From two bits on, a group is as in `Integer`. One bit is two levels anywhere, see `two_levels`.

    Args:
        widths: of each group, 1 to 8 bits, and not more than 3 bits apart.
        group_size: columns of a group; the last may be shorter.
    """

    widths: tuple[int, ...]
    group_size: int

    def __post_init__(self) -> None:
        if not set(self.widths) <= set(PLANES) or max(self.widths) - min(self.widths) > SPREAD:
            raise ValueError(f"widths of groups are 1 to 8 bits and at most {SPREAD} apart, not {self.widths}")
        if self.group_size < 1:
            raise ValueError(f"group size {self.group_size} is not positive")

    @property
    def name(self) -> str:
        return f"int-g{self.group_size}-{''.join(map(str, self.widths))}"

    @property
    def bits(self) -> float:
        return sum(self.widths) / len(self.widths)

    def fit(self, weight: Tensor) -> GroupWidthsGrid:
        grid = GroupWidthsGrid(self, weight)
        for group, part in enumerate(weight.split(grid.group_size, dim=1)):
            grid.refit(group, part)
        return grid

    def stored_bits(self, shape: tuple[int, int]) -> int:
        out, columns = shape
        column_widths = [self.widths[column // self.group_size] for column in range(columns)]
        zeros = [width for width in self.widths if width > 1] * out
        scales = 16 * out * (len(self.widths) + self.widths.count(1))  # and one-bit zero points
        widths = 8 * row_bytes(len(self.widths), WIDTH_BITS)
        return 8 * out * columns_bytes(column_widths) + 8 * columns_bytes(zeros) + scales + widths


class GroupWidthsGrid(Grid):
    """Scales and zero points of one weight matrix.

    Args:
        fmt: the format.
        weight: fp32 [out, in]; its values do not matter until a group is fitted.
        ranges: how a group is fitted; to the extremes of its weights by default.

    Raises:
        ValueError: the format has another number of groups.
    """

    def __init__(self, fmt: GroupWidths, weight: Tensor, ranges: Ranges | None = None) -> None:
        out, columns = weight.shape
        groups = -(-columns // fmt.group_size)
        if len(fmt.widths) != groups:
            raise ValueError(f"{columns} columns have {groups} groups of {fmt.group_size}, not {len(fmt.widths)}")
        self.format, self.ranges = fmt, ranges or extremes
        self.group_size = min(fmt.group_size, columns)
        self.scale, self.zero = weight.new_ones(out, groups), weight.new_zeros(out, groups)
        self.top = 2 ** torch.tensor(fmt.widths, device=weight.device) - 1  # largest code, [groups]
        self.group = torch.arange(columns, device=weight.device) // self.group_size

    def refit(self, group: int, weight: Tensor) -> None:
        width = self.format.widths[group]
        self.scale[:, group], self.zero[:, group] = self.ranges(weight, width, group * self.group_size)

    def encode(self, weight: Tensor, start: int = 0) -> Tensor:
        group = self.group[start : start + weight.shape[1]]
        zero = self.zero[:, group]
        # A whole zero point is added after rounding, so that half-way cases fall as they do in `Integer`.
        codes = torch.round(weight / self.scale[:, group] + zero.frac()) + zero.trunc()
        return codes.clamp(min=0).minimum(self.top[group]).to(torch.uint8)

    def decode(self, codes: Tensor, start: int = 0) -> Tensor:
        group = self.group[start : start + codes.shape[1]]
        return (codes - self.zero[:, group]) * self.scale[:, group]

    def permuted(self, order: Tensor) -> GroupWidthsGrid:
        grid = copy(self)
        grid.group = self.group[order]
        return grid

    def pack(self, codes: Tensor, order: Tensor | None = None) -> PackedGroupWidths:
        if order is not None:
            inverse = torch.argsort(order)
            codes, group = codes[:, inverse], self.group[inverse]
            order = torch.argsort(group, stable=True)  # columns group by group
            codes = codes[:, order]
            if torch.equal(order, torch.arange(len(order), device=order.device)):
                order = None
            else:
                order = order.to(torch.int16 if len(order) <= 2**15 else torch.int32)
        return PackedGroupWidths.of(codes, self.scale, self.zero, self.format.widths, self.group_size, order)


def extremes(weight: Tensor, width: int, start: int) -> tuple[Tensor, Tensor]:
    """Between the least and the largest weight of each row; see `Ranges`."""
    del start
    return two_levels(weight) if width == 1 else Integer(width).scale_and_zero(weight)


def two_levels(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero point of one-bit codes, for weights [out, n]: the levels m ± E|w − m| with m the mean.

    Given that weights above and below their mean are told apart, no levels symmetric around it are closer to them.
    Both numbers are values that fp16 represents. (SliM-LLM's code takes m ± E|w|, which is the same where m = 0.)
    """
    mean = weight.mean(1)
    half = (weight - mean.unsqueeze(1)).abs().mean(1)
    scale = torch.maximum(2 * half, mean.abs() / STEEPEST).to(torch.float16).float().clamp(min=TINIEST_SCALE)
    return scale, (0.5 - mean / scale).to(torch.float16).float()
