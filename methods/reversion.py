"""What the tools do that start from a quantized model and take quantization back where it hurts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from methods.base import Context
from methods.mixed_precision import MixedPrecision, Plan
from methods.recipe import Recipe, bound


@dataclass(frozen=True)
class Reversion(MixedPrecision):
    """Mixed precision that starts from one width everywhere, the widest candidate with which the budget holds.

    The tools start from 8 bits, and know no budget. To start from the narrowest candidate instead would leave most
    linears there, since what is taken back goes to the widest.
    """

    def plan(self, ctx: Context, losses: Mapping[str, Mapping[Recipe, float]]) -> Plan:
        recipes = list(next(iter(losses.values())))
        limits = bound(ctx.network, recipes, ctx.budget, ctx.latency)
        totals = {recipe: sum(costs[recipe] for costs in limits.costs.values()) for recipe in recipes}
        fitting = [total for total in totals.values() if total <= limits.limit * limits.divisor]
        offered = [recipe for recipe in recipes if totals[recipe] >= max(fitting, default=0)]
        return super().plan(ctx, {name: {recipe: row[recipe] for recipe in offered} for name, row in losses.items()})
