"""GPTQ (Frantar et al., ICLR 2023, arXiv 2210.17323): round column by column, and let the columns still to
come absorb the error.

With H = R Rᵀ the damped Gram matrix and R *upper* triangular, the loss tr(ΔW H ΔWᵀ) is ‖ΔW R‖², and its
column i involves only the columns j ≤ i of ΔW. Rounding from left to right is therefore Babai's nearest-plane
algorithm in the lattice that R spans. The paper's factor, the Cholesky factor U of H⁻¹, is R⁻¹: one
factorization of H suffices, H is never inverted, and only the small diagonal blocks of R are.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from methods.base import Stat
from methods.formats.base import Format, Grid
from methods.rounding.base import ROUNDINGS, Rounded, Rounder, Rounding

log = logging.getLogger(__name__)

ATTEMPTS = 5


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
        energy = gram.diagonal()
        order = torch.argsort(energy, descending=True, stable=True) if self.act_order else None
        dead = (energy == 0) & energy.any()  # without any data (an expert never reached) keep all weights
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
        codes, rounded = _sweep(visited, grid, factor, self.block, refit=not self.static_groups)
        if order is not None:
            rounded = rounded[:, torch.argsort(order)]
        return Rounded(grid.pack(codes, order), rounded)


def damped_factor(gram: Tensor, damping: float) -> Tensor:
    """R, upper triangular fp32 [in, in], with R Rᵀ = gram + damping · mean diagonal · I.

    Zeros on the diagonal become 1 first and do not count for the mean. Computed in fp64. If rounding errors
    have made the matrix indefinite, damping is raised tenfold, with a warning.

    Raises:
        FloatingPointError: the matrix is not finite, or indefinite even under heavy damping.
    """
    hessian = gram.double().flip(0, 1)  # reversed, so that Cholesky's lower factor becomes an upper one
    energy = hessian.diagonal()
    alive = energy != 0
    mean = energy.sum() / alive.sum().clamp(min=1)
    energy.masked_fill_(~alive, 1)
    if not hessian.isfinite().all():
        raise FloatingPointError("a Gram matrix is not finite: activations overflow; run the model in fp32")
    for _ in range(ATTEMPTS):
        damped = hessian + torch.diag((damping * mean).expand_as(energy))
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            return lower.flip(0, 1).float()
        stronger = 10 * max(damping, 1e-3)
        log.warning("a Gram matrix with damping %g is not positive definite; trying %g", damping, stronger)
        damping = stronger
    raise FloatingPointError("a Gram matrix is far from positive definite; check how it was accumulated")


def _sweep(weight: Tensor, grid: Grid, factor: Tensor, block: int, refit: bool) -> tuple[Tensor, Tensor]:
    """Codes and the weights they stand for, both [out, in], of columns rounded from left to right.

    Works on the transposed matrix, where a column is contiguous. Across blocks it looks left: one product per
    block pulls in the error of all finished columns. Inside a block it looks right, as the paper does.
    """
    columns = weight.shape[1]
    target = weight.t().contiguous()  # [in, out]
    rounded, error = torch.empty_like(target), torch.empty_like(target)
    codes: list[Tensor] = []
    if refit and grid.group_size < columns:  # a group to be refitted must not straddle blocks
        block = max(block - block % grid.group_size, grid.group_size)
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        diagonal = factor[start:stop, start:stop]
        inverse = torch.linalg.solve_triangular(diagonal, torch.eye(stop - start).to(diagonal), upper=True)
        pull = inverse.t() @ (factor[:start, start:stop].t() @ error[:start])  # [block, out]
        codes += _round_block(target[start:stop] + pull, grid, inverse, start, refit, rounded[start:stop])
        torch.sub(target[start:stop], rounded[start:stop], out=error[start:stop])
    return torch.cat(codes, dim=1), rounded.t().contiguous()


def _round_block(
    current: Tensor, grid: Grid, inverse: Tensor, start: int, refit: bool, rounded: Tensor
) -> list[Tensor]:
    """Round the columns from `start` on.

    Args:
        current: compensated weights [block, out]; overwritten.
        inverse: of the factor's diagonal block, that is the diagonal block of the paper's U.
        rounded: receives the rounded weights [block, out].

    Returns:
        The codes, column by column, each [out, 1].
    """
    share = inverse / inverse.diagonal().unsqueeze(1)  # row i: what later columns absorb of column i's error
    size = grid.group_size
    codes = []
    for i, column in enumerate(current):
        group, offset = divmod(start + i, size)
        if refit and group and not offset:
            grid.refit(group, current[i : i + size].t())
        codes.append(grid.encode(column.unsqueeze(1), start + i))
        rounded[i] = grid.decode(codes[-1], start + i).squeeze(1)
        current[i + 1 :].addr_(share[i, i + 1 :], column - rounded[i], alpha=-1)
    return codes
