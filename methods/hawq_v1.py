"""HAWQ (Dong et al., ICCV 2019, arXiv 1905.03696), the first version."""

from __future__ import annotations

from dataclasses import dataclass

from methods.base import Context, register
from methods.mixed import MixedPrecision
from methods.sensitivity.base import measure
from methods.sensitivity.eigenvalue import TopEigenvalue


@register("hawq_v1")
@dataclass(frozen=True)
class HAWQV1(MixedPrecision):
    """Widths in the order of Ωᵢ = |λᵢ| · ‖Q(Wᵢ) − Wᵢ‖², with λᵢ the top eigenvalue of linear i's Hessian.

    The paper orders widths by λᵢ/nᵢ and fine-tuning by Ωᵢ, and picks the widths by hand. As nothing is
    trained here, Ω orders the widths, and `methods.allocation.ordered` picks them. The magnitude is taken
    because a linear whose curvature is dominated by a negative eigenvalue is not an insensitive one; Q-BERT
    (arXiv 1909.05840) does the same.

    Args:
        tolerance, max_iterations, sequences, context: see `methods.sensitivity.eigenvalue`.
    """

    solver: str = "ordered"
    tolerance: float = TopEigenvalue.tolerance
    max_iterations: int = TopEigenvalue.max_iterations
    sequences: int = TopEigenvalue.sequences
    context: int = TopEigenvalue.context

    def scores(self, ctx: Context) -> dict[str, float]:
        """|λᵢ|."""
        metric = TopEigenvalue(self.tolerance, self.max_iterations, self.sequences, self.context)
        return {name: abs(value) for name, value in measure(metric, ctx).values.items()}
