"""HAWQ-V2 (Dong et al., NeurIPS 2020, arXiv 1911.03852)."""

from __future__ import annotations

from dataclasses import dataclass

from methods.base import Context, register
from methods.mixed import MixedPrecision
from methods.sensitivity.base import measure
from methods.sensitivity.hutchinson import Hutchinson


@register("hawq_v2")
@dataclass(frozen=True)
class HAWQV2(MixedPrecision):
    """Ωᵢ(b) = tr(Hᵢ)/nᵢ · ‖Q_b(Wᵢ) − Wᵢ‖², summed and minimized under the budget.

    A linear with a negative trace keeps its negative Ω: to second order, rounding it then lowers the loss.
    The paper fine-tunes afterwards; here nothing is trained.

    Args:
        tolerance, max_probes, context: see `methods.sensitivity.hutchinson`.
    """

    tolerance: float = Hutchinson.tolerance
    max_probes: int = Hutchinson.max_probes
    context: int = Hutchinson.context

    def scores(self, ctx: Context) -> dict[str, float]:
        """The average trace, tr(Hᵢ)/nᵢ."""
        trace = measure(Hutchinson(self.tolerance, self.max_probes, self.context), ctx).values
        return {name: trace[name] / ctx.network.linear(name).weight.numel() for name in ctx.network.linears}
