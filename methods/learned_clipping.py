"""Rounding to integers that can be learned: differentiable in the ends of each group's range, in an offset added
before rounding, and in the weights. What it computes is bit for bit what the packed matrix stands for.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.packed import PackedInteger
from methods.formats.integer import Integer, IntegerGrid
from methods.reconstruction import straight_through


class LearnedInteger:
    """The integers of one weight matrix.

    Args:
        fmt: the format; its own search for ranges is not used.
        columns: of the matrix.
    """

    def __init__(self, fmt: Integer, columns: int) -> None:
        self.format, self.columns = fmt, columns
        self.bounds = fmt.lowest, 2**fmt.width - 1

    def groups(self, weight: Tensor) -> Tensor:
        """`weight` [out, in] as [out, groups, group size]. A short last group ends in zeros, which every range
        contains."""
        size = self.format.columns_per_group(self.columns)
        return F.pad(weight, (0, -self.columns % size)).unflatten(1, (-1, size))

    def rounded(self, groups: Tensor, low: Tensor, high: Tensor, offset: Tensor | None = None) -> Tensor:
        """The rounded matrix, fp32 [out, in].

        Args:
            groups: the weights, see `groups`.
            low, high: the ranges, [out, groups] with low ≤ 0 ≤ high.
            offset: added to the weights in units of the scale, of the shape of `groups`.
        """
        result: Tensor = _Round.apply(groups, *self._scale_and_zero(low, high), offset, self.bounds)
        return self._matrix(result)

    @torch.no_grad()
    def pack(self, groups: Tensor, low: Tensor, high: Tensor, offset: Tensor | None = None) -> PackedInteger:
        """The same in storage form."""
        scale, zero = self._scale_and_zero(low, high)
        codes = self._matrix(_codes(groups, scale, zero, offset).clamp_(*self.bounds))
        return IntegerGrid(self.format, scale, zero, self.columns).pack(codes.to(torch.uint8))

    def _matrix(self, groups: Tensor) -> Tensor:
        return groups.flatten(1)[:, : self.columns]

    def _scale_and_zero(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """As they are stored, [out, groups] each. Gradients ignore that scales are rounded to fp16 and zero points to
        whole numbers."""
        scale, zero = self.format.scale_and_zero(torch.stack([low, high], dim=-1).detach())
        steps = self.bounds[1] - self.bounds[0]
        if self.format.symmetric:
            return straight_through(2 * torch.maximum(-low, high) / steps, scale), zero
        scale = straight_through((high - low) / steps, scale)
        return scale, straight_through(-low / scale, zero)


def ranges(groups: Tensor) -> tuple[Tensor, Tensor]:
    """The ranges of rounding to nearest, low and high [out, groups] each, of weights [out, groups, group size]."""
    return groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)


def _codes(groups: Tensor, scale: Tensor, zero: Tensor, offset: Tensor | None) -> Tensor:
    """Before they are clamped: whole numbers."""
    steps = groups / scale.unsqueeze(-1)
    if offset is not None:
        steps += offset
    return steps.round_().add_(zero.unsqueeze(-1))


class _Round(torch.autograd.Function):
    """ŵ = s (c − z) with c = clamp(round(w/s + v) + z), and round's derivative taken to be 1 (straight-through).

    With m = 1 where nothing is clamped and 0 elsewhere, the derivatives are m by w, s m by v, c − z − m w/s by s, and
    s (m − 1) by z. One function, because autograd would keep and multiply a matrix for every operation in it.
    """

    @staticmethod
    def forward(
        ctx: Any, groups: Tensor, scale: Tensor, zero: Tensor, offset: Tensor | None, bounds: tuple[int, int]
    ) -> Tensor:
        codes = _codes(groups, scale, zero, offset)
        clamped = codes.clamp(*bounds)
        inside = clamped == codes
        steps = clamped.sub_(zero.unsqueeze(-1))
        ctx.save_for_backward(groups, scale, steps, inside)
        return steps * scale.unsqueeze(-1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = gradients
        groups, scale, steps, inside = ctx.saved_tensors
        passed = grad * inside
        by_scale = by_zero = by_offset = None
        if ctx.needs_input_grad[1]:
            by_scale = (grad * steps).sum(-1) - (passed * groups).sum(-1) / scale
        if ctx.needs_input_grad[2]:
            by_zero = scale * (passed - grad).sum(-1)
        if ctx.needs_input_grad[3]:
            by_offset = passed * scale.unsqueeze(-1)
        return passed, by_scale, by_zero, by_offset, None
