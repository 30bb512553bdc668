"""Allocation as an integer linear programme, as in HAWQ-V3 (Yao et al., ICML 2021, arXiv 2011.10680)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import gcd

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from methods.allocation.base import SOLVERS, Choice, Problem, Solver

INFEASIBLE = 2  # status of scipy.optimize.milp

SCALE = 1e6  # of the largest difference in price: HiGHS stops at an absolute gap of 1e-6


@SOLVERS.register("ilp")
@dataclass(frozen=True)
class ILP(Solver):
    """Least total loss, by branch and bound (HiGHS)."""

    def solve(self, problem: Problem[Choice], low: int, high: int) -> dict[str, Choice] | None:
        return minimize(problem, low, high, lambda group, option: problem.losses[group][option])


def minimize(
    problem: Problem[Choice],
    low: int,
    high: int,
    price: Callable[[str, Choice], float],
    order: Sequence[str] = (),
) -> dict[str, Choice] | None:
    """The plan of least total price that costs between `low` and `high`; None if there is none.

    `order` names groups whose nominal widths must not increase from one to the next.
    """
    choices = [(group, option) for group, options in problem.costs.items() for option in options]
    constraints = [_one_each(choices), _between(problem, choices, low, high)]
    if len(order) > 1:
        constraints.append(_not_increasing(choices, order))
    prices = np.array([price(group, option) for group, option in choices])
    spread = np.ptp(prices) or 1.0
    result = milp(
        (prices - prices.min()) * (SCALE / spread),  # one choice a group: a common offset changes nothing
        integrality=np.ones(len(choices), dtype=int),
        bounds=Bounds(0, 1),
        constraints=constraints,
        options={"mip_rel_gap": 0},
    )
    if result.status == INFEASIBLE:
        return None
    if not result.success:
        raise RuntimeError(f"HiGHS: {result.message}")
    return {group: option for (group, option), chosen in zip(choices, result.x, strict=True) if chosen > 0.5}


def relaxation(problem: Problem[Choice], low: int, high: int) -> float:
    """Least total loss if groups could be split between options: no plan that costs `low` to `high` loses less.

    The bounds are first narrowed to what whole options can cost, in multiples of their common divisor.
    """
    choices = [(group, option) for group, options in problem.costs.items() for option in options]
    losses = np.array([problem.losses[group][option] for group, option in choices])
    shift, spread = losses.min(), np.ptp(losses) or 1.0
    constraints = [_one_each(choices), _between(problem, choices, low, high, room=0)]
    result = milp((losses - shift) * (SCALE / spread), bounds=Bounds(0, 1), constraints=constraints)
    if not result.success:
        raise ValueError(f"no mixture of options costs {low} to {high}; HiGHS says: {result.message}")
    return float(result.fun * spread / SCALE + shift * len(problem.costs))


def _one_each(choices: list[tuple[str, Choice]]) -> LinearConstraint:
    rows = {group: row for row, group in enumerate(dict(choices))}
    entries = [rows[group] for group, _ in choices]
    matrix = csr_array((np.ones(len(choices)), (entries, range(len(choices)))))
    return LinearConstraint(matrix, 1, 1)


def _between(
    problem: Problem[Choice], choices: list[tuple[str, Choice]], low: int, high: int, room: float = 0.5
) -> LinearConstraint:
    """In the largest unit that leaves whole numbers, with half a unit of room for the solver's tolerance."""
    least = {group: min(options.values()) for group, options in problem.costs.items()}
    extra = [problem.costs[group][option] - least[group] for group, option in choices]
    unit, base = gcd(*extra) or 1, sum(least.values())
    row = np.array([[cost // unit for cost in extra]], dtype=float)
    return LinearConstraint(row, -((base - low) // unit) - room, (high - base) // unit + room)


def _not_increasing(choices: list[tuple[str, Choice]], order: Sequence[str]) -> LinearConstraint:
    """Width of a group minus width of the next in order: at least 0."""
    place = {group: index for index, group in enumerate(order)}
    matrix = np.zeros((len(order), len(choices)))
    for column, (group, option) in enumerate(choices):
        matrix[place[group], column] = option.bits
    return LinearConstraint(csr_array(matrix[:-1] - matrix[1:]), 0, np.inf)
