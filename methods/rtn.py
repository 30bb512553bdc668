"""Round to nearest: the baseline that needs no data."""

from __future__ import annotations

from dataclasses import dataclass

from methods.base import Context, Quantized, UniformMethod, register
from methods.pipeline import quantize_network
from methods.rounding.nearest import Nearest


@register("rtn")
@dataclass(frozen=True)
class RTN(UniformMethod):
    """Every weight to its nearest grid point.

    Args:
        clip: search for the range of each group that minimizes Σ|Q(w) − w|^2.4, instead of [min w, max w].
    """

    clip: bool = False

    def quantize(self, ctx: Context) -> Quantized:
        plan = dict.fromkeys(ctx.network.linears, ctx.budget.format(clip=self.clip))
        return Quantized(quantize_network(ctx, plan, Nearest()))
