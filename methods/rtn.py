"""Round to nearest: the baseline that needs no data."""

from __future__ import annotations

from dataclasses import dataclass

from methods.base import Context, Parts, Quantized, register
from methods.pipeline import quantize_network
from methods.rounding.nearest import Nearest
from methods.uniform import AnyFormat


@register("rtn")
@dataclass(frozen=True)
class RTN(AnyFormat):
    """Every weight to its nearest grid point.

    Args:
        clip: search for the range of each group that minimizes Σ|Q(w) − w|^2.4, instead of [min w, max w].
    """

    clip: bool = False

    @property
    def parts(self) -> Parts:
        return Parts(self.format or "integer")

    def quantize_weights(self, ctx: Context) -> Quantized:
        plan = dict.fromkeys(ctx.network.linears, self.fitted(ctx.budget, clip=self.clip))
        return Quantized(quantize_network(ctx, plan, Nearest()))
