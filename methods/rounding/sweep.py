"""Round column by column, and let the columns still to come absorb the error: the engine of GPTQ (Frantar et al.,
ICLR 2023, arXiv 2210.17323), SparseGPT, SpQR and SliM-LLM.

With H = R Rᵀ the damped Gram matrix and R *upper* triangular, the loss tr(ΔW H ΔWᵀ) is ‖ΔW R‖², and its
column i involves only the columns j ≤ i of ΔW. Rounding from left to right is therefore Babai's nearest-plane
algorithm in the lattice that R spans. The paper's factor, the Cholesky factor U of H⁻¹, is R⁻¹: one
factorization of H suffices, H is never inverted, and only the small diagonal blocks of R are. In particular
1 / U_jj = R_jj: a change d of column j, once compensated by the later ones, costs (d · R_jj)².
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

log = logging.getLogger(__name__)

ATTEMPTS = 5

Inner = Callable[[Tensor, Tensor, int], Tensor]


class Columns(ABC):
    """What becomes of each column.

    Attributes:
        period: columns from one call of `begin` to the next; at least 1.
    """

    period: int

    @abstractmethod
    def begin(self, start: int, weight: Tensor) -> None:
        """The columns from `start` on are next. `weight` [out, up to `period`] has all compensation so far.

        Where there are several periods it is a view of the sweep's working copy, in which later compensation
        appears.
        """

    @abstractmethod
    def take(self, column: Tensor, index: int) -> Tensor:
        """What the compensated column [out, 1] becomes: fp32 [out, 1]."""

    def take_all(self, current: Tensor, factor: Tensor, start: int) -> Tensor:
        """What the columns from `start` on become, none of which is beyond the period: fp32 [columns, out].

        Looks right, as the paper does, so that `current` shows the compensation by all columns taken.

        Args:
            current: compensated weights [columns, out]; overwritten.
            factor: the diagonal block of R that belongs to them [columns, columns].
        """
        result = torch.empty_like(current)
        inverse = inverted(factor)
        share = inverse / inverse.diagonal().unsqueeze(1)  # row i: what later columns absorb of column i's error
        for i, column in enumerate(current):
            result[i] = self.take(column.unsqueeze(1), start + i).squeeze(1)
            current[i + 1 :].addr_(share[i, i + 1 :], column - result[i], alpha=-1)
        return result


def sweep(weight: Tensor, factor: Tensor, columns: Columns, block: int = 128) -> Tensor:
    """The matrix fp32 [out, in] that comes of `weight` [out, in], column by column from left to right.

    Works on the transposed matrix, where a column is contiguous.

    Args:
        factor: R of the input's Gram matrix, see `damped_factor`.
        block: columns between two updates of the rest; affects speed only.
    """
    count, period = weight.shape[1], columns.period
    if period < count:  # a period must not straddle blocks
        block = max(block - block % period, period)
    else:
        columns.begin(0, weight)

    def take(current: Tensor, diagonal: Tensor, start: int) -> Tensor:
        if period < count:
            columns.begin(start, current.t())
        return columns.take_all(current, diagonal, start)

    def within(current: Tensor, diagonal: Tensor, start: int) -> Tensor:
        return by_blocks(current, diagonal, period, take, start)

    result = by_blocks(weight.t().contiguous(), factor, block, within if period < block else take)
    return result.t().contiguous()


def by_blocks(target: Tensor, factor: Tensor, size: int, inner: Inner, first: int = 0) -> Tensor:
    """What becomes of `target` [columns, out], block by block from the first: fp32 [columns, out].

    Looks left: one product per block pulls in the error of all finished columns, as if they had been rounded at once
    and each later column had done its best.

    Args:
        factor: the diagonal block of R that belongs to `target` [columns, columns].
        size: columns of a block.
        inner: what becomes of a block, from its compensated weights [size, out], which it may overwrite, the diagonal
            block of R that belongs to it, and the index of its first column.
        first: index of the first column of `target`.
    """
    result, error = torch.empty_like(target), torch.empty_like(target)
    for start in range(0, len(target), size):
        block = slice(start, start + size)
        diagonal = factor[block, block]
        pull = factor[:start, block].t() @ error[:start]
        current = torch.addmm(target[block], inverted(diagonal).t(), pull)
        result[block] = inner(current, diagonal, first + start)
        torch.sub(target[block], result[block], out=error[block])
    return result


def inverted(factor: Tensor) -> Tensor:
    """The inverse of an upper triangular matrix [n, n]; of a diagonal block of R, that block of the paper's U."""
    return torch.linalg.solve_triangular(factor, torch.eye(len(factor)).to(factor), upper=True)


def by_energy(gram: Tensor) -> Tensor:
    """Inputs in decreasing order of their energy, the diagonal of the Gram matrix: int64 [in]."""
    return torch.argsort(gram.diagonal(), descending=True, stable=True)


def dead_inputs(gram: Tensor) -> Tensor:
    """Inputs that are always zero, and say nothing about their weights: bool [in].

    None where no data came at all (an expert never reached): its weights are all to be kept.
    """
    energy = gram.diagonal()
    return (energy == 0) & energy.any()


def damped_factor(gram: Tensor, damping: float) -> Tensor:
    """R, upper triangular fp32 [in, in], with R Rᵀ = gram + damping · mean diagonal · I.

    Zeros on the diagonal become 1 first and do not count for the mean. Computed in fp64. If rounding errors
    have made the matrix indefinite, damping is raised tenfold, with a warning.

    Raises:
        FloatingPointError: the matrix is not finite, or indefinite even under heavy damping.
    """
    energy = gram.diagonal().double()
    alive = energy != 0
    mean = energy.sum() / alive.sum().clamp(min=1)
    energy = energy.masked_fill(~alive, 1)
    failed = torch.empty((), dtype=torch.int32, device=gram.device)
    for _ in range(ATTEMPTS):
        # Reversed, so that Cholesky's lower factor becomes an upper one; transposed, so that LAPACK works in place.
        matrix = gram.flip(0, 1).double().t()
        matrix.diagonal().copy_((energy + damping * mean).flip(0))
        torch.linalg.cholesky_ex(matrix, out=(matrix, failed))
        if not failed and matrix.diagonal().isfinite().all():
            return matrix.float().flip(0, 1)
        if not gram.isfinite().all():
            raise FloatingPointError("a Gram matrix is not finite: activations overflow; run the model in fp32")
        stronger = 10 * max(damping, 1e-3)
        log.warning("a Gram matrix with damping %g is not positive definite; trying %g", damping, stronger)
        damping = stronger
    raise FloatingPointError("a Gram matrix is far from positive definite; check how it was accumulated")
