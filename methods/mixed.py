"""Any metric, solver, rounding and transform, as pure configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from methods.allocation.base import SOLVERS, Solver
from methods.base import hint, register
from methods.mixed_precision import MixedPrecision
from methods.sensitivity.base import METRICS, Metric


@register("mixed")
@dataclass(frozen=True)
class Mixed(MixedPrecision):
    """Mixed precision with parts of your choice; the published methods are such choices under their own names.

    Args:
        metric: see `methods.sensitivity`.
        metric_options: options of the metric, such as {tolerance: 0.05}.
        solver_options: options of the solver.
    """

    metric: str = "hawq_v2"
    metric_options: dict[str, Any] = field(default_factory=dict)
    solver_options: dict[str, Any] = field(default_factory=dict)

    def sensitivity(self) -> Metric:
        return _configured(METRICS[self.metric], self.metric_options, "method.metric_options")

    def allocation(self) -> Solver:
        return _configured(SOLVERS[self.solver], self.solver_options, "method.solver_options")


def _configured(cls: type[Any], options: Mapping[str, Any], where: str) -> Any:
    """An instance with these options; ValueError for one that it does not have."""
    known = [f.name for f in fields(cls)]
    for name in options:
        if name not in known:
            raise ValueError(f"unknown option {where}.{name} of {cls.name}: {hint(name, known)}")
    return cls(**options)
