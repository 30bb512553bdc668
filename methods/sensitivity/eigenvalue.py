"""Top eigenvalues of the Hessian's diagonal blocks, one a linear: HAWQ (ICCV 2019, arXiv 1905.03696)."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from math import copysign
from typing import ClassVar

import torch
from torch import Tensor

from methods.sensitivity.base import METRICS, Metric, Sensitivity, Subject, exact
from methods.sensitivity.blockwise import open_hessian
from methods.sensitivity.hvp import Operator, diagonal_block

log = logging.getLogger(__name__)


@METRICS.register("eigenvalue")
@dataclass(frozen=True)
class TopEigenvalue(Metric):
    """The top eigenvalue λ of HAWQ (2019): of ∂²loss/∂W², the largest in magnitude, with its sign, by power iteration.

    Only the start is random, so the standard error is 0. The Hessian is that of one batch of text.

    Args:
        tolerance: relative change of the eigenvalue at which the iteration stops (PyHessian's 1e-3). Where
            the second eigenvalue is close to the first, the error left is larger than this.
        max_iterations: Hessian-vector products after which a linear is left as it is.
        sequences: sequences of the text in the batch.
        context: tokens used of each sequence, from its beginning.
        blockwise: hold one block's graph at a time, for models that do not fit otherwise; each product then runs
            the blocks again.
    """

    derivatives: ClassVar[int] = 2

    tolerance: float = 1e-3
    max_iterations: int = 100
    sequences: int = 2
    context: int = 128
    blockwise: bool = False

    def __post_init__(self) -> None:
        if min(self.max_iterations, self.sequences, self.context) < 1:
            raise ValueError("max_iterations, sequences and context of the top eigenvalue must be positive")

    def __call__(self, subject: Subject) -> Sensitivity:
        network, generator = subject.network, subject.generator()
        batch = subject.tokens[: self.sequences, : self.context].to(next(network.model.parameters()).device)
        values, unconverged = {}, 0
        opened = open_hessian(network, batch, network.linears, self.blockwise)
        with subject.cost() as cost, opened as product:
            cost.passes += 2
            for name in network.linears:
                weight = network.linear(name).weight
                start = torch.randn(weight.shape, generator=generator).to(weight.device)
                values[name], iterations, converged = self._iterate(diagonal_block(product, name), start)
                cost.passes += iterations
                unconverged += not converged
        negative = sum(value < 0 for value in values.values())
        log.info("top eigenvalues: %d linears, %d negative, %d unconverged", len(values), negative, unconverged)
        return exact(values, cost)

    def _iterate(self, operator: Operator, vector: Tensor) -> tuple[float, int, bool]:
        """Eigenvalue, products used, and whether it converged.

        The magnitude is ‖Hv‖ and only the sign that of vᵀHv: unlike vᵀHv, ‖Hv‖ never decreases and keeps its
        meaning where λ and −λ compete.
        """
        value = 0.0
        for iteration in range(1, self.max_iterations + 1):
            vector = vector / vector.norm()
            image = operator(vector)
            before, value = value, copysign(float(image.norm()), float(torch.sum(vector * image)))
            if abs(abs(value) - abs(before)) <= self.tolerance * abs(value):
                return value, iteration, True
            vector = image
        return value, self.max_iterations, False
