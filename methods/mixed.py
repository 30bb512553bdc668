"""Mixed precision: a loss for every linear in every format, a plan that spends the budget, and a rounding.

The three are free to combine. What a published method adds is how it scores a linear.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import methods.allocation.ilp
import methods.allocation.ordered
import methods.allocation.pareto  # noqa: F401  (these register themselves, so that SOLVERS is complete)
from methods.allocation.base import SOLVERS, Plan, Problem
from methods.base import Budget, Context, Method, Quantized
from methods.formats.base import Format
from methods.network import Network
from methods.pipeline import quantize_network
from methods.rounding.base import ROUNDINGS

Number = TypeVar("Number", int, float)

GRANULARITIES = ("group", "layer")


@dataclass(frozen=True)
class MixedPrecision(Method):
    """A width for each group of linears, by scores times squared rounding errors.

    Linear i at width b is charged Ωᵢ(b) = scoreᵢ · ‖Q_b(Wᵢ) − Wᵢ‖², with Q_b rounding to nearest whatever
    `rounding` is used in the end. A budget that names a width allows what this width stores uniformly.

    Args:
        bits: candidate widths.
        granularity: what shares a width: a `group` of linears with the same input (q/k/v, gate/up), as
            serving engines that fuse them need, or a single `layer`.
        solver: see `methods.allocation`.
        rounding: see `methods.rounding`.
    """

    bits: tuple[int, ...] = (2, 3, 4, 5, 6, 8)
    granularity: str = "group"
    solver: str = "pareto"
    rounding: str = "nearest"

    def __post_init__(self) -> None:
        if not self.bits:
            raise ValueError("method.bits is empty; give candidate widths such as [2,3,4,8]")
        if self.granularity not in GRANULARITIES:
            raise ValueError(f"unknown granularity {self.granularity!r}: there are {' and '.join(GRANULARITIES)}")
        # Unknown names fail here, rather than after an hour of sensitivities.
        SOLVERS[self.solver]()
        ROUNDINGS[self.rounding]()

    @abstractmethod
    def scores(self, ctx: Context) -> dict[str, float]:
        """How much each linear's squared rounding error matters."""

    def supports(self, network: Network, budget: Budget) -> str | None:
        formats = self._formats(budget)
        least = sum(min(fmt.stored_bits(shape) for fmt in formats) for shape in network.shapes)
        weights = sum(out * columns for out, columns in network.shapes)
        limit = budget.limit(network.shapes)
        if least / weights > limit:
            narrowest = min(formats, key=lambda fmt: fmt.bits)
            return f"{narrowest.name} stores {least / weights:.4g} bits a weight; the limit is {limit:g}"
        return None

    def plan(self, ctx: Context, scores: Mapping[str, float]) -> Plan:
        """A format for every linear."""
        network, formats = ctx.network, self._formats(ctx.budget)
        units = self._units(network)
        losses = {name: _losses(network, name, formats, scores[name]) for name in network.linears}
        bits = {name: {f: f.stored_bits(network.shape(name)) for f in formats} for name in network.linears}
        weights = sum(out * columns for out, columns in network.shapes)
        limit = ctx.budget.limit(network.shapes)
        problem = Problem(_summed(losses, units), _summed(bits, units), weights, limit)
        chosen = SOLVERS[self.solver]()(problem)
        return {name: chosen[unit] for unit, names in units.items() for name in names}

    def quantize(self, ctx: Context) -> Quantized:
        """`sensitivity` of the result holds the scores."""
        scores = self.scores(ctx)
        plan = self.plan(ctx, scores)
        packed = quantize_network(ctx, plan, ROUNDINGS[self.rounding]())
        return Quantized(packed, sensitivity=scores)

    def _units(self, network: Network) -> dict[str, tuple[str, ...]]:
        """What shares a width: a name, and its linears."""
        if self.granularity == "layer":
            return {name: (name,) for name in network.linears}
        return {group.name: group.linears for group in network.groups}

    def _formats(self, budget: Budget) -> list[Format]:
        return [budget.format(width) for width in self.bits]


def _losses(network: Network, linear: str, formats: list[Format], score: float) -> dict[Format, float]:
    weight = network.weight(linear)
    return {fmt: score * float((fmt.fit(weight).snap(weight) - weight).square().sum()) for fmt in formats}


def _summed(
    values: Mapping[str, Mapping[Format, Number]], units: Mapping[str, tuple[str, ...]]
) -> dict[str, dict[Format, Number]]:
    """From values a linear to values a unit."""
    return {
        unit: {fmt: sum(values[name][fmt] for name in names) for fmt in values[names[0]]}
        for unit, names in units.items()
    }
