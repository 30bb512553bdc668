"""Number formats: what the codes mean.

A `Format` is a choice (INT4, group 128, asymmetric). Fitted to one weight matrix it becomes a `Grid`, which knows
the scales, turns weights into codes and back, column range by column range, and packs the finished codes. Rounding
algorithms see only this interface, so that each works with each format.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from copy import copy
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor

from kernels.packed import Packed


class Lattice(NamedTuple):
    """Evenly spaced grid points of neighboring columns: step · (code − zero) for codes from `lowest` to `highest`.

    Attributes:
        step: fp32 [out, columns], or [out, 1] where all columns share it; positive.
        zero: whole numbers, fp32, of the same shape.
    """

    step: Tensor
    zero: Tensor
    lowest: int
    highest: int


class Grid(ABC):
    """A format fitted to one weight matrix [out, in]."""

    group_size: int
    """Columns that share a scale; at least 1, at most `in`."""

    @abstractmethod
    def refit(self, group: int, weight: Tensor) -> None:
        """Fit the scales of one group of columns anew, to `weight` [out, columns of the group]."""

    @abstractmethod
    def encode(self, weight: Tensor, start: int = 0) -> Tensor:
        """Nearest codes, uint8, of `weight` [out, n], the columns from `start` on."""

    @abstractmethod
    def decode(self, codes: Tensor, start: int = 0) -> Tensor:
        """What the codes [out, n] of the columns from `start` on stand for: fp32 [out, n]."""

    @abstractmethod
    def permuted(self, order: Tensor) -> Grid:
        """The same scales for permuted columns: column i of the result is column `order[i]` of this grid.

        The columns of a group are then no longer neighbors, so the result cannot be refitted.
        """

    @abstractmethod
    def pack(self, codes: Tensor, order: Tensor | None = None) -> Packed:
        """Pack all codes [out, in].

        `order` is given if the grid was fitted to permuted columns, or permuted itself: column i of the grid
        is column `order[i]` of the matrix, and the codes are in the grid's order; the packed matrix is in the
        matrix's order.
        """

    def lattice(self, start: int, count: int) -> Lattice | None:  # noqa: ARG002
        """The grid points of `count` columns from `start` on, where they are evenly spaced around 0; else None."""
        return None

    def snap(self, weight: Tensor, start: int = 0) -> Tensor:
        """The grid points nearest to `weight` [out, n]: fp32 [out, n]."""
        return self.decode(self.encode(weight, start), start)


class BlockGrid(Grid):
    """A grid whose scales belong to blocks of neighboring columns, with no room for a group index.

    Attributes:
        format: that it was fitted for.
        group: the block of each column, int64 [in].
    """

    format: Format
    group: Tensor

    def permuted(self, order: Tensor) -> Self:
        grid = copy(self)
        grid.group = self.group[order]
        return grid

    def in_matrix_order(self, codes: Tensor, order: Tensor | None) -> Tensor:
        """The codes [out, in] in the order of the matrix, see `pack`.

        Raises:
            ValueError: the columns of a block are not neighbors there.
        """
        group = self.group
        if order is not None:
            inverse = torch.argsort(order)
            codes, group = codes[:, inverse], group[inverse]
        if not torch.equal(group, torch.arange(len(group), device=group.device) // self.group_size):
            raise ValueError(
                f"{self.format.name} stores no group index, so its blocks must be neighboring columns; "
                "fit the scales in the original column order (static_groups=true with act_order=true)"
            )
        return codes


@dataclass(frozen=True)
class Format(ABC):
    """A number format for weight matrices."""

    @property
    @abstractmethod
    def name(self) -> str:
        """Short and unique, such as `int4-g128`; used in tables, plans and cache keys."""

    @property
    @abstractmethod
    def bits(self) -> float:
        """Nominal width of a code."""

    @abstractmethod
    def fit(self, weight: Tensor) -> Grid:
        """Fit the grid to `weight`, fp32 [out, in]."""

    @abstractmethod
    def stored_bits(self, shape: tuple[int, int]) -> int:
        """Bits that a packed matrix of this shape [out, in] takes: equal to `Packed.stored_bits` of the result."""
