"""What mixed precision chooses for a linear: a number format, and a width for its inputs; and what that costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from methods.base import Latency
from methods.budget import Budget
from methods.formats.base import Format
from methods.network import Network

FULL_WIDTH = 16  # bits of an input that is not rounded
RELATIVE_SLACK = 0.005  # of the limits that are not in bits a weight
BITS_SLACK = 0.02


@dataclass(frozen=True)
class Recipe:
    """A format for the weight, and a width in bits to which inputs are rounded, token by token, or None."""

    weight: Format
    input_bits: int | None = None

    @property
    def name(self) -> str:
        """Such as `int4-g128` or `int4-g128/a8`."""
        return self.weight.name + (f"/a{self.input_bits}" if self.input_bits else "")

    @property
    def bits(self) -> float:
        """Nominal width of the weight."""
        return self.weight.bits


Costs: TypeAlias = dict[str, dict[Recipe, int]]
"""Linear name to recipe to cost."""
CostOf: TypeAlias = Callable[[tuple[int, int], Recipe], int]
"""Cost of a linear of a shape [out, in] in a recipe."""


@dataclass(frozen=True)
class Bound:
    """A budget as allocation sees it: what recipes cost, and the limit; see `methods.allocation.base.Problem`."""

    costs: Costs
    divisor: int
    limit: float
    slack: float
    unit: str


def bound(network: Network, recipes: Sequence[Recipe], budget: Budget, latency: Latency | None) -> Bound:
    """The cost of every linear in every recipe, and the limit, in the unit that the budget bounds.

    Raises:
        ValueError: the budget bounds time, and there is no latency table.
    """

    def costs(cost: CostOf) -> Costs:
        return {name: {recipe: cost(network.shape(name), recipe) for recipe in recipes} for name in network.linears}

    if budget.gigabops is not None:
        return Bound(costs(bit_operations), 10**9, budget.gigabops, RELATIVE_SLACK * budget.gigabops, "gigabops")
    if budget.microseconds is not None:
        if latency is None:
            raise ValueError("a budget in microseconds needs a latency table, which only the harness can give")
        picoseconds = costs(lambda shape, recipe: round(1e6 * latency(shape, recipe.weight)))
        return Bound(picoseconds, 10**6, budget.microseconds, RELATIVE_SLACK * budget.microseconds, "microseconds")
    stored = budget.limit(network.shapes, network.other_parameters)
    assert stored is not None  # the two bounds that say nothing about storage were handled above
    weights = sum(out * columns for out, columns in network.shapes)
    bits = costs(lambda shape, recipe: recipe.weight.stored_bits(shape))
    return Bound(bits, weights, stored, BITS_SLACK, "effective bits")


def bit_operations(shape: tuple[int, int], recipe: Recipe) -> int:
    """BOPs of one token: multiplications times the widths of both factors (HAWQ-V3, section 3.4)."""
    return shape[0] * shape[1] * round(recipe.bits) * (recipe.input_bits or FULL_WIDTH)
