"""SpQR (Dettmers et al., ICLR 2024, arXiv 2306.03078): GPTQ that keeps single weights in 16 bits where rounding them
costs too much; the engine is in `methods.rounding.sweep`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from kernels.packed_sum import PackedSparse, PackedSum
from methods.base import Stat
from methods.formats.base import Format
from methods.formats.two_level import EXACT, TwoLevel
from methods.rounding.base import ROUNDINGS, Rounded, Rounder, Rounding
from methods.rounding.sweep import Columns, by_energy, damped_factor, dead_inputs, sweep


@ROUNDINGS.register("spqr")
@dataclass(frozen=True)
class SpQRRounding(Rounding):
    """Column-wise rounding with error feedback and unstructured outliers (algorithm 1).

    A weight that misses its grid point by d costs (d · R_jj)², see `methods.rounding.sweep`. It becomes an outlier
    if this exceeds `outlier_threshold` times the mean, over columns, of the column's variance times R_jj²: what
    replacing columns by their means would cost a weight. (The normalization is the official code's.) The scales of a
    group are fitted without its likely outliers, which `leave_one_out` finds just before.

    What the grid point of an outlier leaves over is stored in fp16, so nothing of it but fp16's rounding error is
    passed on. A matrix without outliers has no sparse part. With act_order the group of each column is stored, as
    GPTQ does; the official code stores the permutation, which takes no less.

    Args:
        outlier_threshold: the smaller, the more outliers; infinite for none, which leaves GPTQ.
        damping: added to the diagonal, relative to the mean diagonal of inputs that are not always zero.
        act_order: visit inputs in decreasing order of their energy (the diagonal of the Gram matrix).
        block: columns between two updates of the rest; affects speed only.
    """

    outlier_threshold: float = 0.2
    damping: float = 1.0
    act_order: bool = True
    block: int = 128

    needs: ClassVar[frozenset[Stat]] = frozenset({Stat.GRAM})

    def __post_init__(self) -> None:
        if not self.outlier_threshold >= 0 or self.damping < 0 or self.block < 1:
            raise ValueError(
                f"SpQR cannot use outlier_threshold={self.outlier_threshold:g} with damping={self.damping:g} and "
                f"block={self.block}; its authors have 0.2, 1 and 128"
            )

    def given(self, gram: Tensor | None) -> Rounder:
        if gram is None:
            raise ValueError("SpQR rounds by the Gram matrix of the linear's input, and none was given")
        order = by_energy(gram) if self.act_order else None
        dead = dead_inputs(gram)
        factor = damped_factor(gram if order is None else gram[order][:, order], self.damping)

        def rounder(weight: Tensor, fmt: Format) -> Rounded:
            return self._round(weight.masked_fill(dead, 0), fmt, factor, order)

        return rounder

    def _round(self, weight: Tensor, fmt: Format, factor: Tensor, order: Tensor | None) -> Rounded:
        visited = weight if order is None else weight[:, order]
        columns = OutlierColumns(visited, fmt, factor.diagonal().square(), self.outlier_threshold)
        rounded = sweep(visited, factor, columns, self.block)
        base, residual = columns.grid.pack(columns.codes, order), columns.residual
        if order is not None:
            inverse = torch.argsort(order)
            rounded, residual = rounded[:, inverse], residual[:, inverse]
        outliers = residual != 0
        if not outliers.any():
            return Rounded(base, rounded)
        return Rounded(PackedSum(base, PackedSparse.of(residual, outliers)), rounded)


class OutlierColumns(Columns):
    """Every weight to its nearest grid point, and what that leaves over, in fp16, where it costs too much.

    Args:
        weight: [out, in], in the order of the sweep.
        fmt: of the grid.
        importance: R_jj² of each column, fp32 [in].
        threshold: in units of the mean of variance · importance over columns.
    """

    def __init__(self, weight: Tensor, fmt: Format, importance: Tensor, threshold: float) -> None:
        self.grid = fmt.fit(weight)
        self.period = self.grid.group_size
        self.importance = importance
        several = len(weight) > 1  # a single row has no variance: any cost exceeds the threshold
        self.limit = threshold * (weight.var(0, correction=int(several)) * importance).mean()
        # Likely outliers are found with statistics that are not quantized, as in the official code.
        self._judge = replace(fmt, stats_bits=EXACT) if isinstance(fmt, TwoLevel) else fmt
        self._codes: list[Tensor] = []
        self._residual: list[Tensor] = []

    @property
    def codes(self) -> Tensor:
        """The codes of the columns taken so far: uint8 [out, columns]."""
        return torch.cat(self._codes, dim=1)

    @property
    def residual(self) -> Tensor:
        """What outliers add to their grid points, fp32 [out, columns] of values that fp16 represents; 0 elsewhere."""
        return torch.cat(self._residual, dim=1)

    def begin(self, start: int, weight: Tensor) -> None:
        saved = leave_one_out(weight, self.importance[start : start + weight.shape[1]], self._judge)
        self.grid.refit(start // self.period, filled(weight, saved > self.limit))

    def take(self, column: Tensor, index: int) -> Tensor:
        codes = self.grid.encode(column, index)
        point = self.grid.decode(codes, index)
        missing = column - point
        outlier = missing.square() * self.importance[index] > self.limit
        residual = torch.where(outlier, missing, 0).to(torch.float16).float()
        self._codes.append(codes)
        self._residual.append(residual)
        return point + residual


def leave_one_out(weight: Tensor, importance: Tensor, fmt: Format) -> Tensor:
    """How much the weighted squared error of a group falls if one of its weights is left out: [out, group].

    The grid is fitted to the weights that stay. It depends on their range alone, so that only two weights of a
    row, its extremes, need a grid of their own; leaving out another one saves that one's error. (A format that
    searches for a better range than that, `Integer(clip=True)`, is judged as if it did not search anew.)

    Args:
        weight: [out, group].
        importance: the weight of each column's squared error, [group].
    """
    error = (fmt.fit(weight).snap(weight) - weight).square() * importance
    total, saved = error.sum(1, keepdim=True), error.clone()
    for extreme in (weight.argmin(1, keepdim=True), weight.argmax(1, keepdim=True)):
        left_out = torch.zeros_like(weight, dtype=torch.bool).scatter_(1, extreme, True)
        rest = (fmt.fit(filled(weight, left_out)).snap(weight) - weight).square() * importance
        saved.scatter_(1, extreme, total - rest.masked_fill(left_out, 0).sum(1, keepdim=True))
    return saved


def filled(weight: Tensor, left_out: Tensor) -> Tensor:
    """`weight` [out, group] with those left out replaced by the mean of the others of their row, if there are any."""
    kept = ~left_out
    mean = (weight * kept).sum(1, keepdim=True) / kept.sum(1, keepdim=True)
    return torch.where(left_out & kept.any(1, keepdim=True), mean, weight)
