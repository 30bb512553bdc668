"""Every weight to its nearest grid point."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from methods.formats.base import Format
from methods.rounding.base import ROUNDINGS, Rounded, Rounder, Rounding


@ROUNDINGS.register("nearest")
@dataclass(frozen=True)
class Nearest(Rounding):
    """Round to nearest on the grid fitted to the weights; needs no data."""

    def given(self, gram: Tensor | None) -> Rounder:
        del gram
        return round_to_nearest


def round_to_nearest(weight: Tensor, fmt: Format) -> Rounded:
    """Fit the grid to `weight`, fp32 [out, in], and take the nearest codes."""
    grid = fmt.fit(weight)
    codes = grid.encode(weight)
    return Rounded(grid.pack(codes), grid.decode(codes))
