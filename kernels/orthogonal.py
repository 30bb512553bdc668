"""Random orthogonal matrices, regenerated from a seed, that multiply a vector in far less than n² operations.

Two constructions are known to make a matrix incoherent, that is without outliers: the Kronecker product of two small
random orthogonal factors between random permutations (Chee et al., QuIP, NeurIPS 2023, arXiv 2307.13304, section 4),
and a Hadamard matrix after random signs (Tseng et al., QuIP#, ICML 2024, arXiv 2402.04396, section 3).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


class Orthogonal(ABC):
    """An orthogonal matrix Q [n, n]."""

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """Q times each vector of x [..., n]: the same shape and dtype."""

    @abstractmethod
    def inverse(self, x: Tensor) -> Tensor:
        """Qᵀ times each vector of x [..., n]: the same shape and dtype."""

    @abstractmethod
    def to(self, device: torch.device) -> Orthogonal:
        """The same matrix on another device."""


@dataclass(frozen=True)
class Permutation(Orthogonal):
    """Element i of the product is element `order[i]` of the vector; int64 [n]."""

    order: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return x[..., self.order]

    def inverse(self, x: Tensor) -> Tensor:
        return x[..., torch.argsort(self.order)]

    def to(self, device: torch.device) -> Permutation:
        return Permutation(self.order.to(device))


@dataclass(frozen=True)
class Signs(Orthogonal):
    """A diagonal matrix of ±1, fp32 [n]."""

    signs: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return x * self.signs.to(x.dtype)

    def inverse(self, x: Tensor) -> Tensor:
        return self(x)

    def to(self, device: torch.device) -> Signs:
        return Signs(self.signs.to(device))


@dataclass(frozen=True)
class Kronecker(Orthogonal):
    """F₁ ⊗ F₂ ⊗ … of small orthogonal factors, each fp32 [p, p]: n · Σ p operations a vector instead of n²."""

    factors: tuple[Tensor, ...]

    def __call__(self, x: Tensor) -> Tensor:
        return _multiply(x, self.factors)

    def inverse(self, x: Tensor) -> Tensor:
        return _multiply(x, tuple(factor.mT for factor in self.factors))

    def to(self, device: torch.device) -> Kronecker:
        return Kronecker(tuple(factor.to(device) for factor in self.factors))


@dataclass(frozen=True)
class Product(Orthogonal):
    """The product of matrices, the first to multiply first; of none, the identity."""

    steps: tuple[Orthogonal, ...] = ()

    def __call__(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = step(x)
        return x

    def inverse(self, x: Tensor) -> Tensor:
        for step in reversed(self.steps):
            x = step.inverse(x)
        return x

    def to(self, device: torch.device) -> Product:
        return Product(tuple(step.to(device) for step in self.steps))


def random_orthogonal(kind: str, size: int, seed: int) -> Orthogonal:
    """The matrix [size, size] that a seed stands for, on the CPU.

    The same seed gives the same matrix on every machine, up to rounding errors of a QR factorization.

    Args:
        kind: `kronecker`, `hadamard`, or `identity` for none at all.

    Raises:
        ValueError: there is no such kind.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown orthogonal transform {kind!r}: there are {', '.join(KINDS)}")
    return KINDS[kind](size, torch.Generator().manual_seed(seed))


def _identity(size: int, generator: torch.Generator) -> Orthogonal:
    del size, generator
    return Product()


def _kronecker(size: int, generator: torch.Generator) -> Orthogonal:
    """Factors as near to √size as its divisors allow: of a prime size, one dense matrix."""
    small = max(p for p in range(1, math.isqrt(size) + 1) if size % p == 0)
    factors = tuple(_haar(p, generator) for p in (size // small, small))
    before, after = (Permutation(torch.randperm(size, generator=generator)) for _ in range(2))
    return Product((before, Kronecker(factors), after))


def _hadamard(size: int, generator: torch.Generator) -> Orthogonal:
    """The largest power of two in `size` becomes a Hadamard matrix, itself the product of two; its odd rest a random
    orthogonal factor. (QuIP# has tables of Hadamard matrices for some odd rests.)"""
    odd = size
    while odd % 2 == 0:
        odd //= 2
    power = (size // odd).bit_length() - 1
    signs = 2.0 * torch.randint(2, (size,), generator=generator) - 1
    factors = (_sylvester(power - power // 2), _sylvester(power // 2), _haar(odd, generator))
    return Product((Signs(signs), Kronecker(factors)))


KINDS: dict[str, Callable[[int, torch.Generator], Orthogonal]] = {
    "kronecker": _kronecker,
    "hadamard": _hadamard,
    "identity": _identity,
}


def _haar(size: int, generator: torch.Generator) -> Tensor:
    """Uniformly distributed over all orthogonal matrices: fp32 [size, size].

    A QR factorization leaves the signs of R's diagonal open; made positive, Q is unique and uniform (Mezzadri, How to
    generate random matrices from the classical compact groups, 2007).
    """
    q, r = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator))
    return (q * r.diagonal().sign()).float()


def _sylvester(power: int) -> Tensor:
    """The Hadamard matrix of order 2^power, divided by its norm: fp32 [2^power, 2^power]."""
    matrix = torch.ones(1, 1)
    for _ in range(power):
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), matrix)
    return matrix / 2 ** (power / 2)


def _multiply(x: Tensor, factors: tuple[Tensor, ...]) -> Tensor:
    """The Kronecker product of `factors` times x [..., n].

    Each factor multiplies the leading axis of a vector and moves it to the end: after all, every axis is back.
    """
    size = x.shape[-1]
    flat = x.reshape(-1, size)
    for factor in factors:
        order = len(factor)
        flat = (flat.view(-1, order, size // order).mT @ factor.to(x.dtype).mT).view(-1, size)
    return flat.view(x.shape)
