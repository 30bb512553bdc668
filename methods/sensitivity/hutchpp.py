"""Traces of the Hessian's diagonal blocks by Hutch++ (Meyer, Musco, Musco & Woodruff, SOSA 2021, arXiv 2010.09649).

Hutchinson's variance is twice the squared Frobenius norm off the diagonal, and where the spectrum decays fast, a few
large eigenvalues make up most of it. Hutch++ spends a third of its products on finding a subspace Q that holds them,
a third on their trace tr QᵀHQ, which is then exact, and only the last third on Hutchinson's estimate of what
remains. For positive semidefinite matrices, m products give an error of order 1/m instead of 1/√m. It wins where a
few eigenvalues dominate, and loses where the spectrum is flat: there the subspace captures little, and the estimate
is Hutchinson's with a third of the probes.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from statistics import fmean
from typing import ClassVar

import torch
from torch import Tensor

from methods.sensitivity.base import METRICS, Metric, Sensitivity, Subject
from methods.sensitivity.blockwise import open_hessian
from methods.sensitivity.hutchinson import report_negative, standard_error
from methods.sensitivity.hvp import Operator, diagonal_block, probe

log = logging.getLogger(__name__)

FEWEST = 4  # probes of the remainder before their spread is trusted


@METRICS.register("hutchpp")
@dataclass(frozen=True)
class HutchPlusPlus(Metric):
    """tr ∂²loss/∂W² of every linear by Hutch++ (Meyer et al., 2021), with its sign.

    The Hessian is that of one batch of text, because the subspace must belong to the matrix whose trace is wanted.
    The standard error is that of the remainder's probes; unlike Hutchinson's here, it does not cover the choice of
    text.

    Args:
        products: most Hessian-vector products a linear: a third each for the subspace, its trace, and the probes.
            Three times a third as many vectors of the size of one linear may be in memory.
        tolerance: standard error, relative to the trace, at which no more probes are drawn.
        sequences: sequences of the text in the batch.
        context: tokens used of each sequence, from its beginning.
        blockwise: hold one block's graph at a time, for models that do not fit otherwise; each product then runs
            the blocks again.
    """

    derivatives: ClassVar[int] = 2
    is_trace: ClassVar[bool] = True

    products: int = 30
    tolerance: float = 0.15
    sequences: int = 2
    context: int = 128
    blockwise: bool = False

    def __post_init__(self) -> None:
        if self.products < 4 or min(self.sequences, self.context) < 1 or self.tolerance < 0:
            raise ValueError(
                "Hutch++ needs at least 4 products a linear, positive sequences and context, and no negative tolerance"
            )

    def __call__(self, subject: Subject) -> Sensitivity:
        network, generator = subject.network, subject.generator()
        batch = subject.tokens[: self.sequences, : self.context].to(next(network.model.parameters()).device)
        values, error = {}, {}
        opened = open_hessian(network, batch, network.linears, self.blockwise)
        with subject.cost() as cost, opened as product:
            cost.passes += 2
            for name in network.linears:
                operator, weight = diagonal_block(product, name), network.linear(name).weight
                found = trace(operator, weight, self.products, generator, self.tolerance)
                values[name], error[name] = found.value, found.error
                cost.passes += found.products
        report_negative(values)
        log.info("Hutch++: %d linears, %d passes", len(values), cost.passes)
        return Sensitivity(values, error, cost)


@dataclass(frozen=True)
class Trace:
    """A trace, its standard error, and the products it took."""

    value: float
    error: float
    products: int


def trace(operator: Operator, like: Tensor, products: int, generator: torch.Generator, tolerance: float = 0.0) -> Trace:
    """The trace of a symmetric operator on tensors shaped like `like`, from 4 products or more.

    Algorithm 1 of the paper, unbiased for every symmetric matrix. With a tolerance, the probes of the remainder end
    early, at a standard error of `tolerance` times the trace.
    """
    size = min(products // 3, like.numel())
    sketch = torch.stack([operator(probe(like, generator)).flatten() for _ in range(size)], dim=1)
    basis = torch.linalg.qr(sketch).Q  # [n, size]
    captured = sum(_quadratic_form(operator, column.view_as(like)) for column in basis.T)
    remainder: list[float] = []
    while len(remainder) < products - 2 * size:
        z = probe(like, generator).flatten()
        for _ in range(2):  # once leaves rounding errors along the directions that matter most
            z = z - basis @ (basis.T @ z)
        remainder.append(_quadratic_form(operator, z.view_as(like)))
        if len(remainder) >= FEWEST and standard_error(remainder) <= tolerance * abs(captured + fmean(remainder)):
            break
    return Trace(captured + fmean(remainder), standard_error(remainder), 2 * size + len(remainder))


def _quadratic_form(operator: Operator, vector: Tensor) -> float:
    return float(torch.sum(vector * operator(vector)))
