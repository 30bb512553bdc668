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


@METRICS.register("hutchpp")
@dataclass(frozen=True)
class HutchPlusPlus(Metric):
    """tr ∂²loss/∂W² of every linear by Hutch++ (Meyer et al., 2021), with its sign.

    The Hessian is that of one batch of text, because the subspace must belong to the matrix whose trace is wanted.
    The standard error is that of the remainder's probes; unlike Hutchinson's here, it does not cover the choice of
    text.

    Args:
        products: Hessian-vector products a linear: a third each for the subspace, its trace, and the probes. Three
            times a third as many vectors of the size of one linear may be in memory.
        sequences: sequences of the text in the batch.
        context: tokens used of each sequence, from its beginning.
        blockwise: hold one block's graph at a time, for models that do not fit otherwise; each product then runs
            the blocks again.
    """

    derivatives: ClassVar[int] = 2
    is_trace: ClassVar[bool] = True

    products: int = 30
    sequences: int = 2
    context: int = 128
    blockwise: bool = False

    def __post_init__(self) -> None:
        if self.products < 4 or min(self.sequences, self.context) < 1:
            raise ValueError("Hutch++ needs at least 4 products a linear, and positive sequences and context")

    def __call__(self, subject: Subject) -> Sensitivity:
        network, generator = subject.network, subject.generator()
        batch = subject.tokens[: self.sequences, : self.context].to(next(network.model.parameters()).device)
        values, error = {}, {}
        opened = open_hessian(network, batch, network.linears, self.blockwise)
        with subject.cost() as cost, opened as product:
            cost.passes += 2
            for name in network.linears:
                operator, weight = diagonal_block(product, name), network.linear(name).weight
                values[name], error[name] = trace(operator, weight, self.products, generator)
                cost.passes += self.products
        report_negative(values)
        log.info("Hutch++: %d linears, %d products each", len(values), self.products)
        return Sensitivity(values, error, cost)


def trace(operator: Operator, like: Tensor, products: int, generator: torch.Generator) -> tuple[float, float]:
    """The trace of a symmetric operator on tensors shaped like `like`, from at least 4 products; and its standard
    error.

    Algorithm 1 of the paper, unbiased for every symmetric matrix.
    """
    size = min(products // 3, like.numel())
    sketch = torch.stack([operator(probe(like, generator)).flatten() for _ in range(size)], dim=1)
    basis = torch.linalg.qr(sketch).Q  # [n, size]
    captured = [_quadratic_form(operator, column.view_as(like)) for column in basis.T]
    remainder = []
    for _ in range(products - 2 * size):
        z = probe(like, generator).flatten()
        for _ in range(2):  # once leaves rounding errors along the directions that matter most
            z = z - basis @ (basis.T @ z)
        remainder.append(_quadratic_form(operator, z.view_as(like)))
    return sum(captured) + fmean(remainder), standard_error(remainder)


def _quadratic_form(operator: Operator, vector: Tensor) -> float:
    return float(torch.sum(vector * operator(vector)))
