"""GPTQ (Frantar et al., ICLR 2023, arXiv 2210.17323): round column by column, and let the columns still to
come absorb the error; the engine is in `methods.rounding.sweep`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from methods.base import Stat
from methods.formats.base import Format, Grid
from methods.rounding.base import ROUNDINGS, Rounded, Rounder, Rounding
from methods.rounding.sweep import Columns, by_blocks, by_energy, damped_factor, dead_inputs, sweep

FEW = 32  # columns that compensate each other one by one; affects speed only


@ROUNDINGS.register("gptq")
@dataclass(frozen=True)
class GPTQRounding(Rounding):
    """Column-wise rounding with error feedback.

    Scales of a group are fitted when its first column is reached, to the weights as compensated so far. (The
    official code, where a group starts inside a block, fits to weights that lack the compensation of that
    block.)

    Inputs that are always zero say nothing about their weights: these become zero, as in the official code.

    Args:
        act_order: visit inputs in decreasing order of their energy (the diagonal of the Gram matrix).
        damping: added to the diagonal, relative to the mean diagonal of inputs that are not always zero.
        static_groups: fit all scales beforehand, to the original weights in the original column order, so
            that with act_order no group index has to be stored.
        block: columns between two updates of the rest; affects speed only.
    """

    act_order: bool = False
    damping: float = 0.01
    static_groups: bool = False
    block: int = 128

    needs: ClassVar[frozenset[Stat]] = frozenset({Stat.GRAM})

    def __post_init__(self) -> None:
        if self.damping < 0 or self.block < 1:
            raise ValueError(
                f"GPTQ cannot use damping={self.damping} with block={self.block}; the paper has 0.01 and 128"
            )

    def given(self, gram: Tensor | None) -> Rounder:
        if gram is None:
            raise ValueError("GPTQ rounds by the Gram matrix of the linear's input, and none was given")
        order = by_energy(gram) if self.act_order else None
        dead = dead_inputs(gram)
        factor = damped_factor(gram if order is None else gram[order][:, order], self.damping)

        def rounder(weight: Tensor, fmt: Format) -> Rounded:
            return self._round(weight.masked_fill(dead, 0), fmt, factor, order)

        return rounder

    def _round(self, weight: Tensor, fmt: Format, factor: Tensor, order: Tensor | None) -> Rounded:
        visited = weight if order is None else weight[:, order]
        if self.static_groups:
            grid = fmt.fit(weight)
            grid = grid if order is None else grid.permuted(order)
        else:
            grid = fmt.fit(visited)
        columns = NearestColumns(grid, weight.shape[1], refit=not self.static_groups)
        rounded = sweep(visited, factor, columns, self.block)
        if order is not None:
            rounded = rounded[:, torch.argsort(order)]
        return Rounded(grid.pack(columns.codes, order), rounded)


class GridColumns(Columns):
    """Every column to its nearest grid points.

    Args:
        grid: fitted to the whole matrix.
        count: columns of the matrix.
        refit: fit the scales of a group anew when its first column is reached.
    """

    def __init__(self, grid: Grid, count: int, refit: bool) -> None:
        self.period = grid.group_size if refit else count
        self.grid = grid
        self._codes: list[Tensor] = []

    @property
    def codes(self) -> Tensor:
        """The codes of the columns taken so far: uint8 [out, columns]."""
        return torch.cat(self._codes, dim=1)

    def begin(self, start: int, weight: Tensor) -> None:
        if start:  # the first group cannot have been compensated since the grid was fitted
            self.grid.refit(start // self.period, weight)

    def take(self, column: Tensor, index: int) -> Tensor:
        self._codes.append(self.grid.encode(column, index))
        return self.grid.decode(self._codes[-1], index)


class NearestColumns(GridColumns):
    """The same, with five operations a column where grid points are evenly spaced."""

    def take_all(self, current: Tensor, factor: Tensor, start: int) -> Tensor:
        lattice = self.grid.lattice(start, len(current))
        if lattice is None:
            return super().take_all(current, factor, start)
        step, zero = (numbers.t().expand_as(current).contiguous() for numbers in (lattice.step, lattice.zero))
        low, high = lattice.lowest - zero, lattice.highest - zero
        multiples = torch.empty_like(current)

        def take(part: Tensor, diagonal: Tensor, first: int) -> Tensor:
            rows = slice(first, first + len(part))
            return nearest_plane(part, diagonal, step[rows], low[rows], high[rows], multiples[rows])

        points = by_blocks(current, factor, FEW, take)
        self._codes.append(multiples.add_(zero).to(torch.uint8).t())
        return points


def nearest_plane(target: Tensor, factor: Tensor, step: Tensor, low: Tensor, high: Tensor, multiples: Tensor) -> Tensor:
    """Babai's algorithm: the multiples of `step` that `target` becomes, column by column, fp32 [columns, out].

    Looks left: column i is due (ΔW R)_i / R_ii of the columns before it.

    Args:
        target: [columns, out]; as are `step`, the least and the largest factor.
        factor: the diagonal block of R that belongs to it [columns, columns].
        multiples: receives the factors [columns, out].
    """
    feedback = (factor / factor.diagonal()).t().contiguous()  # row i: what column i takes over of earlier errors
    error, due = torch.empty_like(target), torch.empty_like(target[0])
    before = error.t()
    rows = zip(target, step, low, high, multiples, error, feedback, strict=True)
    for i, (weight, unit, least, most, multiple, left, gains) in enumerate(rows):
        torch.addmv(weight, before[:, :i], gains[:i], out=due)
        torch.div(due, unit, out=multiple).round_().clamp_(least, most)
        torch.addcmul(weight, multiple, unit, value=-1, out=left)
    return multiples * step
