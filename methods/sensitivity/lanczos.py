"""Eigenvalues and spectral densities by the Lanczos process.

After m products with a symmetric matrix, the process has an orthonormal basis of the Krylov space and the
tridiagonal matrix T [m, m] of the operator in it. The eigenvalues of T (Ritz values) approach the extreme
eigenvalues, and faster than a power iteration does, which forgets all products but the last. They are also the
nodes of Gauss quadrature over the spectrum (Golub & Welsch, 1969), from which PyHessian (Yao et al., 2020, arXiv
1912.07145) takes spectral densities.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from math import pi
from typing import ClassVar

import torch
from torch import Tensor

from methods.sensitivity.base import METRICS, Metric, Sensitivity, Subject, exact
from methods.sensitivity.blockwise import open_hessian
from methods.sensitivity.hvp import Operator, diagonal_block, probe

log = logging.getLogger(__name__)


@METRICS.register("lanczos")
@dataclass(frozen=True)
class Lanczos(Metric):
    """Top eigenvalues of ∂²loss/∂W² of every linear by the Lanczos process (1950), with a bound on their error.

    The score is the sum, with their signs, of the `count` eigenvalues that are largest in magnitude: HAWQ's λ for
    one, and the trace of HAWQ-V2 for all. Only the start is random, so the standard error is 0. The Hessian is that
    of one batch of text.

    Args:
        count: eigenvalues that are added up.
        tolerance: bound on the eigenvalues' errors, relative to the largest, at which the process stops.
        max_products: Hessian-vector products after which a linear is left as it is. As many vectors of the size
            of one linear may be in memory.
        sequences: sequences of the text in the batch.
        context: tokens used of each sequence, from its beginning.
        blockwise: hold one block's graph at a time, for models that do not fit otherwise; each product then runs
            the blocks again.
    """

    derivatives: ClassVar[int] = 2

    count: int = 1
    tolerance: float = 1e-3
    max_products: int = 50
    sequences: int = 2
    context: int = 128
    blockwise: bool = False

    def __post_init__(self) -> None:
        if min(self.count, self.max_products, self.sequences, self.context) < 1:
            raise ValueError("count, max_products, sequences and context of the Lanczos process must be positive")

    def __call__(self, subject: Subject) -> Sensitivity:
        network, generator = subject.network, subject.generator()
        batch = subject.tokens[: self.sequences, : self.context].to(next(network.model.parameters()).device)
        values, unconverged = {}, 0
        opened = open_hessian(network, batch, network.linears, self.blockwise)
        with subject.cost() as cost, opened as product:
            cost.passes += 2
            for name in network.linears:
                operator, weight = diagonal_block(product, name), network.linear(name).weight
                top = top_eigenvalues(operator, weight, self.count, self.tolerance, self.max_products, generator)
                values[name] = sum(top.values)
                cost.passes += top.products
                unconverged += not top.converged
        negative = sum(value < 0 for value in values.values())
        log.info("Lanczos: %d linears, %d negative, %d unconverged", len(values), negative, unconverged)
        return exact(values, cost)


@dataclass(frozen=True)
class TopEigenvalues:
    """What `top_eigenvalues` found.

    Attributes:
        values: eigenvalues, the largest in magnitude first.
        bounds: for each, how far the nearest true eigenvalue can be away (the residual ‖Hv − θv‖).
        products: products that were taken.
        converged: whether all bounds are within the tolerance.
    """

    values: list[float]
    bounds: list[float]
    products: int
    converged: bool


def top_eigenvalues(
    operator: Operator, like: Tensor, count: int, tolerance: float, max_products: int, generator: torch.Generator
) -> TopEigenvalues:
    """The `count` eigenvalues that are largest in magnitude, of a symmetric operator on tensors shaped like `like`.

    Stops when every bound is at most `tolerance` times the largest magnitude. Eigenvalues that occur several times
    are found once; where fewer than `count` are distinct, there are fewer.
    """
    krylov = _Krylov(operator, torch.randn(like.shape, generator=generator).to(like))
    for _ in range(min(max_products, like.numel())):
        krylov.grow()
        nodes, vectors = krylov.ritz()
        top = nodes.abs().argsort(descending=True)[:count]
        values, bounds = nodes[top], krylov.remainder * vectors[-1, top].abs()
        enough = len(top) == count and bool((bounds <= tolerance * values[0].abs()).all())
        if enough or krylov.exhausted:
            break
    return TopEigenvalues(values.tolist(), bounds.tolist(), len(krylov.diagonal), enough or krylov.exhausted)


@dataclass(frozen=True)
class Density:
    """The distribution of a matrix's eigenvalues, as a sum of point masses.

    Attributes:
        nodes: eigenvalues: fp64 [points].
        weights: their shares of all eigenvalues, which add up to 1: fp64 [points].
        size: order of the matrix.
    """

    nodes: Tensor
    weights: Tensor
    size: int

    def moment(self, power: int) -> float:
        """The estimate of tr Hᵖ: the order of the matrix for p = 0, its trace for 1, ‖H‖²_F for 2."""
        return self.size * float(self.weights @ self.nodes**power)

    def curve(self, grid: Tensor, sigma: float) -> Tensor:
        """The density at `grid` [n], each point mass a Gaussian of standard deviation `sigma`: fp64 [n]."""
        distance = (grid.to(self.nodes)[:, None] - self.nodes) / sigma
        return torch.exp(-(distance**2) / 2) @ self.weights / (sigma * (2 * pi) ** 0.5)


def spectral_density(operator: Operator, like: Tensor, probes: int, steps: int, generator: torch.Generator) -> Density:
    """Stochastic Lanczos quadrature (Ubaru, Chen & Saad, 2017): the density of a symmetric operator's eigenvalues.

    Each Rademacher probe z takes `steps` products and gives zᵀHᵖz exactly for powers p < 2·steps; with one step, the
    first moment is Hutchinson's trace. At most `steps` tensors like `like` are in memory.
    """
    nodes, weights = [], []
    for _ in range(probes):
        krylov = _Krylov(operator, probe(like, generator))
        for _ in range(min(steps, like.numel())):
            krylov.grow()
            if krylov.exhausted:
                break
        found, vectors = krylov.ritz()
        nodes.append(found)
        weights.append(vectors[0] ** 2 / probes)
    return Density(torch.cat(nodes), torch.cat(weights), like.numel())


class _Krylov:
    """An orthonormal basis, grown by one product at a time, of the space of start, H·start, H²·start, …

    Every new vector is orthogonalized against all others, twice: without, rounding errors let eigenvalues that have
    converged appear again.

    Attributes:
        diagonal: of T, one a product.
        remainder: length of what the latest product adds to the space; T's next off-diagonal element.
    """

    def __init__(self, operator: Operator, start: Tensor) -> None:
        self.operator = operator
        self.diagonal: list[float] = []
        self.remainder = float(start.norm())
        self._beside: list[float] = []
        self._basis: list[Tensor] = []
        self._next = start / self.remainder

    @property
    def exhausted(self) -> bool:
        """Whether the latest product added nothing but rounding errors: the Ritz values are then exact."""
        largest = max(map(abs, [*self.diagonal, *self._beside]))
        return self.remainder <= 10 * torch.finfo(self._next.dtype).eps * largest

    def grow(self) -> None:
        """Take one product."""
        if self.diagonal:
            self._beside.append(self.remainder)
        self._basis.append(self._next)
        image = self.operator(self._next)
        self.diagonal.append(float(torch.sum(self._next * image)))
        for _ in range(2):
            for vector in self._basis:
                image = image - torch.sum(vector * image) * vector
        self.remainder = float(image.norm())
        self._next = image / self.remainder if self.remainder else image

    def ritz(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues [m] and eigenvectors, as columns [m, m], of T: fp64."""
        beside = torch.tensor(self._beside, dtype=torch.float64)
        diagonal = torch.tensor(self.diagonal, dtype=torch.float64)
        return torch.linalg.eigh(diagonal.diag() + beside.diag(1) + beside.diag(-1))
