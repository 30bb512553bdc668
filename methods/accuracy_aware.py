"""NNCF's accuracy-aware quantization (OpenVINO; formerly in the Post-training Optimization Tool)."""

from __future__ import annotations

from dataclasses import dataclass

from methods.allocation.accuracy_aware import AccuracyAware
from methods.base import register
from methods.reversion import Reversion
from methods.sensitivity.output_error import OutputMSE


@register("accuracy_aware")
@dataclass(frozen=True)
class AccuracyAwareMethod(Reversion):
    """Everything at one width, then the groups whose return to 16 bits gains most, one by one, while the budget lasts.

    Gains are measured losses on scoring text, no estimates. NNCF starts from 8 bits and bounds the drop in
    accuracy, not the bits; here the budget bounds the bits, and `max_drop` may end the search earlier.

    Args:
        max_drop, max_num_iterations: see `methods.allocation.accuracy_aware`.
        judge_sequences: the size of NNCF's ranking subset (`ranking_subset_size`, 300 samples by default there).
    """

    bits: tuple[int, ...] = (2, 3, 4, 5, 6, 8, 16)
    solver: str = "accuracy_aware"
    judge_sequences: int = 4
    max_drop: float = AccuracyAware.max_drop
    max_num_iterations: int = AccuracyAware.max_num_iterations

    def sensitivity(self) -> OutputMSE:
        return OutputMSE()

    def allocation(self) -> AccuracyAware:
        return AccuracyAware(max_drop=self.max_drop, max_num_iterations=self.max_num_iterations)
