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

import torch
from torch import Tensor

log = logging.getLogger(__name__)

ATTEMPTS = 5


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


def sweep(weight: Tensor, factor: Tensor, columns: Columns, block: int = 128) -> Tensor:
    """The matrix fp32 [out, in] that comes of `weight` [out, in], column by column from left to right.

    Works on the transposed matrix, where a column is contiguous. Across blocks it looks left: one product per
    block pulls in the error of all finished columns. Inside a block it looks right, as the paper does.

    Args:
        factor: R of the input's Gram matrix, see `damped_factor`.
        block: columns between two updates of the rest; affects speed only.
    """
    count = weight.shape[1]
    if columns.period < count:  # a period must not straddle blocks
        block = max(block - block % columns.period, columns.period)
    else:
        columns.begin(0, weight)
    target = weight.t().contiguous()  # [in, out]
    result, error = torch.empty_like(target), torch.empty_like(target)
    for start in range(0, count, block):
        stop = min(start + block, count)
        diagonal = factor[start:stop, start:stop]
        inverse = torch.linalg.solve_triangular(diagonal, torch.eye(stop - start).to(diagonal), upper=True)
        pull = inverse.t() @ (factor[:start, start:stop].t() @ error[:start])  # [block, out]
        _sweep_block(target[start:stop] + pull, inverse, columns, start, count, result[start:stop])
        torch.sub(target[start:stop], result[start:stop], out=error[start:stop])
    return result.t().contiguous()


def _sweep_block(current: Tensor, inverse: Tensor, columns: Columns, start: int, count: int, result: Tensor) -> None:
    """The columns from `start` on.

    Args:
        current: compensated weights [block, out]; overwritten.
        inverse: of the factor's diagonal block, that is the diagonal block of the paper's U.
        count: columns of the whole matrix.
        result: receives what becomes of them [block, out].
    """
    share = inverse / inverse.diagonal().unsqueeze(1)  # row i: what later columns absorb of column i's error
    for i, column in enumerate(current):
        if columns.period < count and not (start + i) % columns.period:
            columns.begin(start + i, current[i : i + columns.period].t())
        result[i] = columns.take(column.unsqueeze(1), start + i).squeeze(1)
        current[i + 1 :].addr_(share[i, i + 1 :], column - result[i], alpha=-1)


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
