"""Allocation as an integer linear programme, as in HAWQ-V3 (Yao et al., ICML 2021, arXiv 2011.10680)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import gcd

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from methods.allocation.base import SOLVERS, Plan, Problem, Solver
from methods.formats.base import Format

INFEASIBLE = 2  # status of scipy.optimize.milp

SCALE = 1e6  # of the largest difference in cost: HiGHS stops at an absolute gap of 1e-6


@SOLVERS.register("ilp")
@dataclass(frozen=True)
class ILP(Solver):
    """Least total loss, by branch and bound (HiGHS)."""

    def solve(self, problem: Problem, low: int, high: int) -> Plan | None:
        return minimize(problem, low, high, lambda group, fmt: problem.losses[group][fmt])


def minimize(
    problem: Problem,
    low: int,
    high: int,
    cost: Callable[[str, Format], float],
    order: Sequence[str] = (),
) -> Plan | None:
    """The plan of least total cost that stores between `low` and `high` bits; None if there is none.

    `order` names groups whose nominal widths must not increase from one to the next.
    """
    choices = [(group, fmt) for group, options in problem.bits.items() for fmt in options]
    constraints = [_one_each(choices), _between(problem, choices, low, high)]
    if len(order) > 1:
        constraints.append(_not_increasing(choices, order))
    costs = np.array([cost(group, fmt) for group, fmt in choices])
    spread = np.ptp(costs) or 1.0
    result = milp(
        (costs - costs.min()) * (SCALE / spread),  # one choice a group: a common offset changes nothing
        integrality=np.ones(len(choices), dtype=int),
        bounds=Bounds(0, 1),
        constraints=constraints,
        options={"mip_rel_gap": 0},
    )
    if result.status == INFEASIBLE:
        return None
    if not result.success:
        raise RuntimeError(f"HiGHS: {result.message}")
    return {group: fmt for (group, fmt), chosen in zip(choices, result.x, strict=True) if chosen > 0.5}


def _one_each(choices: list[tuple[str, Format]]) -> LinearConstraint:
    rows = {group: row for row, group in enumerate(dict(choices))}
    entries = [rows[group] for group, _ in choices]
    matrix = csr_array((np.ones(len(choices)), (entries, range(len(choices)))))
    return LinearConstraint(matrix, 1, 1)


def _between(problem: Problem, choices: list[tuple[str, Format]], low: int, high: int) -> LinearConstraint:
    """In the largest unit that leaves whole numbers, with half a unit of room for the solver's tolerance."""
    least = {group: min(options.values()) for group, options in problem.bits.items()}
    extra = [problem.bits[group][fmt] - least[group] for group, fmt in choices]
    unit, base = gcd(*extra) or 1, sum(least.values())
    row = np.array([[bits // unit for bits in extra]], dtype=float)
    return LinearConstraint(row, -((base - low) // unit) - 0.5, (high - base) // unit + 0.5)


def _not_increasing(choices: list[tuple[str, Format]], order: Sequence[str]) -> LinearConstraint:
    """Width of a group minus width of the next in order: at least 0."""
    place = {group: index for index, group in enumerate(order)}
    matrix = np.zeros((len(order), len(choices)))
    for column, (group, fmt) in enumerate(choices):
        matrix[place[group], column] = fmt.bits
    return LinearConstraint(csr_array(matrix[:-1] - matrix[1:]), 0, np.inf)
