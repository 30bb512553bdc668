"""HAWQ-V2 (Dong et al., NeurIPS 2020, arXiv 1911.03852)."""

from __future__ import annotations

from dataclasses import dataclass

from methods.base import register
from methods.mixed_precision import MixedPrecision
from methods.sensitivity.omega import HAWQV2Omega


@register("hawq_v2")
@dataclass(frozen=True)
class HAWQV2(MixedPrecision):
    """Ωᵢ(b) = tr(Hᵢ)/nᵢ · ‖Q_b(Wᵢ) − Wᵢ‖², summed and minimized under the budget.

    A linear with a negative trace keeps its negative Ω: to second order, rounding it then lowers the loss.
    The paper fine-tunes afterwards; here that is `transform=qat`.

    Args:
        tolerance, max_probes, context, blockwise: see `methods.sensitivity.hutchinson`.
    """

    tolerance: float = HAWQV2Omega.tolerance
    max_probes: int = HAWQV2Omega.max_probes
    context: int = HAWQV2Omega.context
    blockwise: bool = HAWQV2Omega.blockwise

    def sensitivity(self) -> HAWQV2Omega:
        return HAWQV2Omega(self.tolerance, self.max_probes, self.context, self.blockwise)
