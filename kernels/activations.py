"""Rounding of a linear's input at run time."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from kernels.minifloat import Element, FixedPoint


def integers(bits: int) -> FixedPoint:
    """The whole numbers from −(2^(bits−1) − 1) to 2^(bits−1) − 1."""
    return FixedPoint(bits - 1, 0)


class InputRounding(nn.Module, ABC):
    """Rounds an input x [..., in] to a symmetric grid: scale · element.

    Args:
        element: the number format of x / scale.
    """

    def __init__(self, element: Element) -> None:
        super().__init__()
        self.element = element

    @property
    def bits(self) -> int:
        """Width of a rounded number."""
        return self.element.bits

    @abstractmethod
    def scale(self, x: Tensor) -> Tensor:
        """The scale of x, fp32 [..., in]; positive, and of a shape that broadcasts with x."""

    def forward(self, x: Tensor) -> Tensor:
        """The same shape and dtype."""
        values = x.float()
        scale = self.scale(values)
        return (self.element.snap(values / scale) * scale).to(x.dtype)

    def extra_repr(self) -> str:
        return self.element.name


class TokenScale(InputRounding):
    """max|x| of each token becomes the largest element: dynamic, per token (ZeroQuant; SmoothQuant O1)."""

    def scale(self, x: Tensor) -> Tensor:
        return _positive(x.abs().amax(-1, keepdim=True) / self.element.max)


class TensorScale(InputRounding):
    """max|x| of the whole input becomes the largest element: dynamic, per tensor (SmoothQuant O2)."""

    def scale(self, x: Tensor) -> Tensor:
        largest = x.abs().amax() if x.numel() else x.new_zeros(())  # an expert to which no token was routed
        return _positive(largest / self.element.max)


class StaticScale(InputRounding):
    """A maximum from calibration becomes the largest element (SmoothQuant O3). What exceeds it saturates.

    Args:
        maximum: of |x|, a positive number.
    """

    step: Tensor

    def __init__(self, element: Element, maximum: float) -> None:
        super().__init__(element)
        if not maximum > 0:
            raise ValueError(f"a static range needs a positive maximum, not {maximum:g}")
        self.register_buffer("step", torch.tensor(maximum / element.max))

    def scale(self, x: Tensor) -> Tensor:
        del x
        return self.step


class ExceptOutliers(nn.Module):
    """Leaves the columns of an input that hold outliers as they are, and rounds the others (Dettmers et al.,
    LLM.int8(), NeurIPS 2022, section 3.2).

    Args:
        rounding: for the other columns, whose scales do not see the outliers.
        threshold: a column with |x| of at least this in any token is one with outliers.
    """

    def __init__(self, rounding: InputRounding, threshold: float) -> None:
        super().__init__()
        self.rounding, self.threshold = rounding, threshold

    @property
    def bits(self) -> int:
        """Width of the numbers that are rounded."""
        return self.rounding.bits

    def forward(self, x: Tensor) -> Tensor:
        """The same shape and dtype; columns are judged over all tokens of x [..., in]."""
        outliers = (x.abs() >= self.threshold).flatten(0, -2).any(0)  # [in]
        return torch.where(outliers, x, self.rounding(x.masked_fill(outliers, 0)))

    def extra_repr(self) -> str:
        return f"threshold={self.threshold:g}"


def round_tokens(x: Tensor, bits: int) -> Tensor:
    """Round each token of x [..., in] to a symmetric grid of integers of its own: the same shape and dtype.

    The scale is max|x| / (2^(bits−1) − 1) of the token; a token of zeros stays as it is.
    """
    rounded: Tensor = TokenScale(integers(bits))(x)
    return rounded


def _positive(scale: Tensor) -> Tensor:
    """Inputs of zeros stay as they are under any scale."""
    return torch.where(scale == 0, 1.0, scale)
