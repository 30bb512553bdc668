"""LDLQ (Chee et al., QuIP, NeurIPS 2023, arXiv 2307.13304, section 3): adaptive rounding with linear feedback.

With the Gram matrix H = (L + I) D (L + I)ᵀ, L strictly lower triangular, column j becomes the grid point nearest to
w_j + Σ_{i>j} (w_i − ŵ_i) L_ij, from the last column to the first. That is GPTQ on reversed columns: reversed, L + I is
the upper factor R of the sweep with its columns divided by the diagonal, and what a column receives from those before
it is the same. Hence one engine serves both. (The paper writes the mirror image, an upper factor from the first column
to the last, which is GPTQ itself, its theorem 6; the order here is that of the official code.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from methods.base import Stat
from methods.formats.base import Format, Grid
from methods.rounding.base import ROUNDINGS, Rounded, Rounder, Rounding
from methods.rounding.gptq import GridColumns
from methods.rounding.sweep import damped_factor, dead_inputs, sweep


@ROUNDINGS.register("ldlq")
@dataclass(frozen=True)
class LDLQ(Rounding):
    """GPTQ from the last column to the first on a fixed grid, then optional greedy passes.

    Scales are those of the original weights, as in the paper, whose grid is fixed. Inputs that are always zero say
    nothing about their weights: these become zero.

    Args:
        damping: added to the diagonal, relative to the mean diagonal of inputs that are not always zero.
        greedy_passes: sweeps of coordinate descent afterwards, at most; they end early at a fixed point.
        block: columns between two updates of the rest; affects speed only.
    """

    damping: float = 0.01
    greedy_passes: int = 0
    block: int = 128

    needs: ClassVar[frozenset[Stat]] = frozenset({Stat.GRAM})

    def __post_init__(self) -> None:
        if self.damping < 0 or self.greedy_passes < 0 or self.block < 1:
            raise ValueError(
                f"LDLQ cannot use damping={self.damping}, greedy_passes={self.greedy_passes} and block={self.block}; "
                "defaults are 0.01, 0 and 128"
            )

    def given(self, gram: Tensor | None) -> Rounder:
        if gram is None:
            raise ValueError("LDLQ rounds by the Gram matrix of the linear's input, and none was given")
        dead = dead_inputs(gram)
        factor = damped_factor(gram.flip(0, 1), self.damping)

        def rounder(weight: Tensor, fmt: Format) -> Rounded:
            return self._round(weight.masked_fill(dead, 0), fmt, factor)

        return rounder

    def _round(self, weight: Tensor, fmt: Format, factor: Tensor) -> Rounded:
        reverse = torch.arange(weight.shape[1] - 1, -1, -1, device=weight.device)
        grid = fmt.fit(weight).permuted(reverse)
        columns = GridColumns(grid, weight.shape[1], refit=False)
        rounded, codes = sweep(weight.flip(1), factor, columns, self.block), columns.codes
        if self.greedy_passes:
            hessian = factor @ factor.t()
            rounded, codes = descend(weight.flip(1), rounded, codes, hessian, grid, self.greedy_passes, self.block)
        return Rounded(grid.pack(codes, reverse), rounded.flip(1))


def descend(
    weight: Tensor, rounded: Tensor, codes: Tensor, hessian: Tensor, grid: Grid, passes: int, block: int
) -> tuple[Tensor, Tensor]:
    """Coordinate descent: each column in turn to the grid points that lose least while all others stay.

    No step increases tr(ΔW H ΔWᵀ). (The official code rounds a whole pass without bounds and clamps afterwards, which
    can increase it.)

    Args:
        weight: fp32 [out, in]; `rounded` is where to start from, with its codes.
        hessian: H, fp32 [in, in].

    Returns:
        The weights rounded anew, fp32 [out, in], and their codes.
    """
    rounded, codes = rounded.clone(), codes.clone()
    for _ in range(passes):
        before = codes.clone()
        for start in range(0, weight.shape[1], block):
            columns = slice(start, start + block)
            gradient = (rounded - weight) @ hessian[:, columns]  # [out, block]
            for i, column in enumerate(range(start, min(start + block, weight.shape[1]))):
                target = rounded[:, column] - gradient[:, i] / hessian[column, column]
                codes[:, column] = grid.encode(target.unsqueeze(1), column).squeeze(1)
                point = grid.decode(codes[:, column, None], column).squeeze(1)
                change = point - rounded[:, column]
                rounded[:, column] = point
                gradient.addr_(change, hessian[column, columns])
        if torch.equal(codes, before):
            break
    return rounded, codes
