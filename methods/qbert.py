"""Q-BERT (Shen et al., AAAI 2020, arXiv 1909.05840)."""

from __future__ import annotations

from dataclasses import dataclass, replace

from methods.base import register
from methods.budget import Budget
from methods.formats.base import Format
from methods.mixed_precision import MixedPrecision
from methods.sensitivity.omega import QBERTOmega


@register("qbert")
@dataclass(frozen=True)
class QBERT(MixedPrecision):
    """Symmetric group-wise codes, with widths in the order of Ω = (|mean λ| + std λ) · ‖ΔW‖² over shards of text.

    The paper gives a whole encoder layer one width of 2, 3 or 4 bits, picked by hand in the order of |mean λ| +
    std λ, and splits each matrix into groups of output rows; here a group is so many columns of a row, as in all
    methods of this project, and `methods.allocation.ordered` picks the widths. Embeddings, which the paper
    quantizes too, stay in 16 bits. Nothing is trained.

    Args:
        shards, tolerance, max_iterations, sequences, context, blockwise: see `methods.sensitivity.omega`.
    """

    bits: tuple[int, ...] = (2, 3, 4, 8)
    granularity: str = "block"
    solver: str = "ordered"
    shards: int = QBERTOmega.shards
    tolerance: float = QBERTOmega.tolerance
    max_iterations: int = QBERTOmega.max_iterations
    sequences: int = QBERTOmega.sequences
    context: int = QBERTOmega.context
    blockwise: bool = QBERTOmega.blockwise

    def sensitivity(self) -> QBERTOmega:
        return QBERTOmega(
            shards=self.shards,
            tolerance=self.tolerance,
            max_iterations=self.max_iterations,
            sequences=self.sequences,
            context=self.context,
            blockwise=self.blockwise,
        )

    def candidates(self, budget: Budget) -> tuple[Format, ...]:
        """Symmetric, whatever the budget's formats are."""
        return super().candidates(replace(budget, symmetric=True))
