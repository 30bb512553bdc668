"""HAWQ (Dong et al., ICCV 2019, arXiv 1905.03696), the first version."""

from __future__ import annotations

from dataclasses import dataclass

from methods.base import register
from methods.mixed_precision import MixedPrecision
from methods.sensitivity.omega import HAWQV1Omega


@register("hawq_v1")
@dataclass(frozen=True)
class HAWQV1(MixedPrecision):
    """Widths in the order of Ωᵢ = |λᵢ| · ‖Q(Wᵢ) − Wᵢ‖², with λᵢ the top eigenvalue of linear i's Hessian.

    The paper orders widths by λᵢ/nᵢ and fine-tuning by Ωᵢ, and picks the widths by hand. As nothing is
    trained here, Ω orders the widths, and `methods.allocation.ordered` picks them. The magnitude is taken
    because a linear whose curvature is dominated by a negative eigenvalue is not an insensitive one; Q-BERT
    (arXiv 1909.05840) does the same.

    Args:
        tolerance, max_iterations, sequences, context, blockwise: see `methods.sensitivity.eigenvalue`.
    """

    solver: str = "ordered"
    tolerance: float = HAWQV1Omega.tolerance
    max_iterations: int = HAWQV1Omega.max_iterations
    sequences: int = HAWQV1Omega.sequences
    context: int = HAWQV1Omega.context
    blockwise: bool = HAWQV1Omega.blockwise

    def sensitivity(self) -> HAWQV1Omega:
        return HAWQV1Omega(
            tolerance=self.tolerance,
            max_iterations=self.max_iterations,
            sequences=self.sequences,
            context=self.context,
            blockwise=self.blockwise,
        )
