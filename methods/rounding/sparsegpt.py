"""SparseGPT (Frantar and Alistarh, ICML 2023, arXiv 2301.00774): GPTQ that sets weights to zero and, if wanted, rounds
the others; the engine is in `methods.rounding.sweep`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kernels.packed_pruned import pruned
from methods.base import Stat
from methods.formats.base import Format, Grid
from methods.formats.dense import DenseGrid
from methods.rounding.base import ROUNDINGS, Rounded, Rounder, Rounding
from methods.rounding.gptq import GridColumns
from methods.rounding.sweep import damped_factor, dead_inputs, sweep


@dataclass(frozen=True)
class Unrounded(Format):
    """16-bit floats of a matrix that is pruned without being quantized. (`Dense` ones are not pruned either.)"""

    @property
    def name(self) -> str:
        return "unrounded16"

    @property
    def bits(self) -> float:
        return 16

    def fit(self, weight: Tensor) -> DenseGrid:
        return DenseGrid(weight)

    def stored_bits(self, shape: tuple[int, int]) -> int:
        return 16 * shape[0] * shape[1]


@dataclass(frozen=True)
class Pruning:
    """Which weights go.

    Attributes:
        share: of the weights that are compared with each other.
        span: columns whose weights are compared.
        rowwise: compare only weights of one row, as an n:m pattern wants; otherwise those of all rows.
    """

    share: float
    span: int
    rowwise: bool

    def mask(self, cost: Tensor) -> Tensor:
        """True at the lowest of the costs [out, columns], their number rounded to the nearest: bool [out, columns]."""
        compared = cost if self.rowwise else cost.reshape(1, -1)
        lowest = compared.topk(round(self.share * compared.shape[1]), dim=1, largest=False).indices
        return torch.zeros_like(compared, dtype=torch.bool).scatter_(1, lowest, True).view_as(cost)


@ROUNDINGS.register("sparsegpt")
@dataclass(frozen=True)
class SparseGPTRounding(Rounding):
    """Column-wise pruning and rounding with error feedback (algorithm 1).

    A weight w goes if w² R_jj², what losing it costs after compensation by later columns, is among the lowest of
    the next 128 columns; these are chosen when the first of them is reached, so that weights compensated so far
    are compared. Of an n:m pattern, the n lowest of every m consecutive weights of a row go. Kept weights are
    rounded to the format, and both errors are passed on together.

    Scales of a group are fitted as in `methods.rounding.gptq`, when its first column is reached; the official code
    fits one scale a row, beforehand. Exactly the given share is pruned; the official code prunes one weight more
    in 128 columns. No comparison reaches beyond a group.

    Args:
        sparsity: share of weights to prune, at least 0 and less than 1.
        pattern: `2:4`, or another n:m with n weights in every m pruned, in place of `sparsity`.
        damping: added to the diagonal, relative to the mean diagonal of inputs that are not always zero.
        block: columns whose weights are compared.
    """

    sparsity: float = 0.5
    pattern: str = ""
    damping: float = 0.01
    block: int = 128

    needs: ClassVar[frozenset[Stat]] = frozenset({Stat.GRAM})

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1 or self.damping < 0 or self.block < 1:
            raise ValueError(
                f"SparseGPT cannot use sparsity={self.sparsity:g} with damping={self.damping:g} and "
                f"block={self.block}; the paper has 0.5, 0.01 and 128"
            )
        self._pattern()

    def given(self, gram: Tensor | None) -> Rounder:
        if gram is None:
            raise ValueError("SparseGPT prunes by the Gram matrix of the linear's input, and none was given")
        dead = dead_inputs(gram)
        factor = damped_factor(gram, self.damping)

        def rounder(weight: Tensor, fmt: Format) -> Rounded:
            weight = weight.masked_fill(dead, 0)
            grid, count = fmt.fit(weight), weight.shape[1]
            columns = PrunedColumns(grid, count, factor.diagonal().square(), self.pruning(grid.group_size, count))
            rounded = sweep(weight, factor, columns)
            packed = grid.pack(columns.codes)
            return Rounded(pruned(packed, columns.mask) if columns.mask.any() else packed, rounded)

        return rounder

    def pruning(self, group_size: int, columns: int) -> Pruning:
        """What to compare in a matrix with so many columns, in groups of so many.

        Raises:
            ValueError: a group is no multiple of the pattern.
        """
        pattern = self._pattern()
        if pattern is None:
            return Pruning(self.sparsity, self.block, False)
        gone, of = pattern
        if group_size < columns and group_size % of:
            raise ValueError(f"groups of {group_size} columns are no multiple of the pattern {self.pattern}")
        return Pruning(gone / of, of, True)

    def _pattern(self) -> tuple[int, int] | None:
        """n and m, or None."""
        if not self.pattern:
            return None
        parts = re.fullmatch(r"(\d+):(\d+)", self.pattern)
        if parts is None or not 0 < int(parts[1]) < int(parts[2]):
            raise ValueError(f"{self.pattern!r} is no pattern; write '2:4' to prune 2 of every 4 weights of a row")
        return int(parts[1]), int(parts[2])


class PrunedColumns(GridColumns):
    """Columns to their nearest grid points, except weights that are pruned.

    Args:
        grid: fitted to the whole matrix.
        count: columns of the matrix.
        importance: R_jj² of each column, fp32 [in].
        pruning: what is compared; its span starts anew with every group.
    """

    def __init__(self, grid: Grid, count: int, importance: Tensor, pruning: Pruning) -> None:
        self.grouped = grid.group_size < count
        super().__init__(grid, count, refit=self.grouped)
        if not self.grouped:
            self.period = pruning.span
        self.importance, self.pruning = importance, pruning
        self._masks: list[Tensor] = []

    @property
    def mask(self) -> Tensor:
        """Where weights are pruned: bool [out, columns]."""
        return torch.cat(self._masks, dim=1)

    def begin(self, start: int, weight: Tensor) -> None:
        if self.grouped:
            super().begin(start, weight)
        # The sweep's own working copy: compensation inside the period appears in it.
        self._start, self._current = start, weight

    def take(self, column: Tensor, index: int) -> Tensor:
        offset = index - self._start
        if not offset % self.pruning.span:
            compared = self._current[:, offset : offset + self.pruning.span]
            cost = compared.square() * self.importance[index : index + compared.shape[1]]
            self._masks.append(self.pruning.mask(cost))
        gone = self._masks[-1][:, offset % self.pruning.span].unsqueeze(1)
        return super().take(column, index).masked_fill(gone, 0)
