"""NNCF's scale estimation (openvinotoolkit/nncf, weight compression, `scale_estimation.py`): scales for which a
group's contribution to the output is closest to the original's, then rounding to nearest.

A weight w with code q would like the scale |w| / |q − zero|. A candidate is the mean of these over a group, weighted
by the magnitudes of the inputs; it replaces the group's scale if, with weights rounded anew, the error of the group's
contribution to the output falls. Zero points stay.

Differences from NNCF:
- It knows of each calibration sequence only the mean input over its tokens, weighs by that mean's largest magnitude
  over the sequences, and measures errors on the means. Here both come from the Gram matrix of all tokens: weights are
  root mean squares, and the error is the mean square over tokens.
- It leaves out the weights whose first code is the zero point, and divides by 0.001 for those that come to it later,
  which spoils the candidate. Here weights at the zero point are left out whenever they are there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from methods.base import Stat
from methods.formats.base import Format
from methods.formats.integer import IntegerGrid
from methods.group_error import diagonal_blocks, group_errors
from methods.rounding.base import ROUNDINGS, Rounded, Rounder, Rounding
from methods.rounding.gptq import GPTQRounding
from methods.rounding.nearest import round_to_nearest

SHRINK = 0.05
BACKUP_WIDTH = 8


@ROUNDINGS.register("scale_estimation")
@dataclass(frozen=True)
class ScaleEstimation(Rounding):
    """NNCF's scale estimation, then round to nearest. Linears in 8 bits, its backup, keep the scales of their range.

    Args:
        initial_steps: candidates from the codes under the best scale so far.
        scale_steps: candidates from the codes under the scale of the range, times 1, 0.95, 0.9, ….
    """

    initial_steps: int = 5
    scale_steps: int = 5

    needs: ClassVar[frozenset[Stat]] = frozenset({Stat.GRAM})

    def given(self, gram: Tensor | None) -> Rounder:
        matrix = _required(gram)

        def rounder(weight: Tensor, fmt: Format) -> Rounded:
            return round_to_nearest(weight, self.estimating(fmt, matrix))

        return rounder

    def estimating(self, fmt: Format, gram: Tensor) -> Format:
        """`fmt`, fitted by estimation where it is narrower than NNCF's backup."""
        return fmt if fmt.bits >= BACKUP_WIDTH else Estimated(fmt, gram, self.initial_steps, self.scale_steps)


@ROUNDINGS.register("scale_estimation_gptq")
@dataclass(frozen=True)
class ScaleEstimationGPTQ(ScaleEstimation):
    """NNCF's GPTQ with scale estimation: a group's scale is estimated when its first column is reached.

    Linears in 8 bits are rounded to nearest.

    Args:
        damping: see `methods.rounding.gptq`; NNCF's default is ten times the paper's.
    """

    damping: float = 0.1

    def given(self, gram: Tensor | None) -> Rounder:
        matrix = _required(gram)
        sweep = GPTQRounding(damping=self.damping).given(matrix)

        def rounder(weight: Tensor, fmt: Format) -> Rounded:
            return (round_to_nearest if fmt.bits >= BACKUP_WIDTH else sweep)(weight, self.estimating(fmt, matrix))

        return rounder


@dataclass(frozen=True, eq=False)
class Estimated(Format):
    """A format of integers whose scales are estimated for inputs with this Gram matrix, [in, in]."""

    base: Format
    gram: Tensor
    initial_steps: int
    scale_steps: int

    @property
    def name(self) -> str:
        return f"{self.base.name}-estimated"

    @property
    def bits(self) -> float:
        return self.base.bits

    def fit(self, weight: Tensor) -> EstimatedGrid:
        grid = self.base.fit(weight)
        if not isinstance(grid, IntegerGrid):
            raise ValueError(f"scale estimation is of integers, and {self.base.name} has none; take another rounding")
        return EstimatedGrid(grid, weight, self)

    def stored_bits(self, shape: tuple[int, int]) -> int:
        return self.base.stored_bits(shape)


class EstimatedGrid(IntegerGrid):
    """A grid of integers with estimated scales.

    Args:
        grid: fitted to the range of `weight` [out, in].
        estimated: the format.
    """

    def __init__(self, grid: IntegerGrid, weight: Tensor, estimated: Estimated) -> None:
        super().__init__(grid.format, grid.scale, grid.zero, grid.columns)
        self.estimated = estimated
        self.blocks = diagonal_blocks(estimated.gram, self.group_size)
        self.scale = self._estimate(grid, weight, self.blocks)

    def refit(self, group: int, weight: Tensor) -> None:
        super().refit(group, weight)
        fitted = IntegerGrid(self.format, self.scale[:, [group]], self.zero[:, [group]], weight.shape[1])
        self.scale[:, [group]] = self._estimate(fitted, weight, [self.blocks[group]])

    def _estimate(self, grid: IntegerGrid, weight: Tensor, blocks: Sequence[Tensor]) -> Tensor:
        return estimate_scale(grid, weight, blocks, self.estimated.initial_steps, self.estimated.scale_steps)


def estimate_scale(
    grid: IntegerGrid, weight: Tensor, blocks: Sequence[Tensor], initial_steps: int, scale_steps: int
) -> Tensor:
    """Scales [out, groups] under which no group's error exceeds that under the scales of `grid`.

    Args:
        grid: fitted to the range of `weight` [out, in].
        blocks: of the input's Gram matrix, see `methods.group_error`.
        initial_steps, scale_steps: see `ScaleEstimation`.
    """
    importance = torch.cat([block.diagonal() for block in blocks]).sqrt()  # [in]
    best, least = grid.scale, group_errors(grid.snap(weight) - weight, blocks)
    for step in range(initial_steps + scale_steps):
        start = best if step < initial_steps else (1 - SHRINK * (step - initial_steps)) * grid.scale
        candidate = _rescaled(grid, mean_ideal_scale(_rescaled(grid, start), weight, importance))
        error = group_errors(candidate.snap(weight) - weight, blocks)
        best = torch.where(error < least, candidate.scale, best)
        least = torch.minimum(error, least)
    return best


def mean_ideal_scale(grid: IntegerGrid, weight: Tensor, importance: Tensor) -> Tensor:
    """The mean over each group of |w| / |q − zero|, weighted by `importance` [in]: [out, groups].

    Weights at the zero point do not count; a group in which nothing counts keeps its scale.
    """
    group = torch.tensor(grid.group, device=weight.device)
    steps = (grid.encode(weight) - grid.zero[:, group]).abs()
    counts = torch.where(steps > 0, importance, 0.0)
    ideal = weight.abs() / steps.clamp(min=1)
    total = torch.zeros_like(grid.scale).index_add_(1, group, counts)
    mean = torch.zeros_like(grid.scale).index_add_(1, group, counts * ideal) / total
    return torch.where(total > 0, mean, grid.scale)


def _rescaled(grid: IntegerGrid, scale: Tensor) -> IntegerGrid:
    return IntegerGrid(grid.format, scale, grid.zero, grid.columns)


def _required(gram: Tensor | None) -> Tensor:
    if gram is None:
        raise ValueError("scale estimation weighs by the Gram matrix of the linear's input, and none was given")
    return gram
