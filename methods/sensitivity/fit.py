"""FIT: the trace of the Fisher information times the power of the rounding error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from methods.sensitivity.base import METRICS, Metric, Sensitivity, Subject
from methods.sensitivity.fisher import FisherTrace


@METRICS.register("fit")
@dataclass(frozen=True)
class FIT(Metric):
    """tr F/n of the n weights of each linear: FIT (Zandonati et al., ICLR 2023, arXiv 2210.08502), its part of the
    weights.

    The trace is that of `fisher_trace`. The paper multiplies it by the mean squared rounding error of a weight,
    which it models as uniform noise; here ‖Q(W) − W‖²/n is measured.

    Args:
        sequences, context: see `FisherTrace`.
    """

    derivatives: ClassVar[int] = 1

    sequences: int = FisherTrace.sequences
    context: int = FisherTrace.context

    def __call__(self, subject: Subject) -> Sensitivity:
        trace = subject.measure(FisherTrace(self.sequences, self.context))
        weights = {name: subject.network.linear(name).weight.numel() for name in trace.values}
        values = {name: value / weights[name] for name, value in trace.values.items()}
        error = {name: value / weights[name] for name, value in trace.error.items()}
        return Sensitivity(values, error, trace.cost)
