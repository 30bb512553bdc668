"""Rounding: which grid point each weight takes, for any format."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

from torch import Tensor

from kernels.packed import Packed
from methods.base import Registry, Stat
from methods.formats.base import Format


@dataclass(frozen=True)
class Rounded:
    """A rounded weight matrix: in storage form, and as the fp32 matrix [out, in] that the codes stand for."""

    packed: Packed
    weight: Tensor


Rounder: TypeAlias = Callable[[Tensor, Format], Rounded]
"""Rounds a weight, fp32 [out, in], to a format."""


@dataclass(frozen=True)
class Rounding(ABC):
    """An algorithm that rounds one weight matrix at a time. Fields are its options, defaults the paper's."""

    name: ClassVar[str]
    needs: ClassVar[frozenset[Stat]] = frozenset()
    """Statistics of the linear's input without which it cannot round."""

    @abstractmethod
    def given(self, gram: Tensor | None) -> Rounder:
        """The rounding of all linears whose input has this Gram matrix, fp32 [in, in] of any positive scale.

        What depends on the input alone (a factorization) is computed here, once. `gram` may be None unless
        `needs` names it.
        """

    def __call__(self, weight: Tensor, fmt: Format, gram: Tensor | None = None) -> Rounded:
        """Round one weight, fp32 [out, in]."""
        return self.given(gram)(weight, fmt)


ROUNDINGS: Registry[Rounding] = Registry("rounding", "methods.rounding")
