"""HAWQ's precision order (Dong et al., ICCV 2019, arXiv 1905.03696): the more sensitive, the wider."""

from __future__ import annotations

from dataclasses import dataclass

from methods.allocation.base import SOLVERS, Plan, Problem, Solver
from methods.allocation.ilp import minimize
from methods.formats.base import Format


@SOLVERS.register("ordered")
@dataclass(frozen=True)
class Ordered(Solver):
    """Widths that never increase from more to less sensitive groups. All groups must offer the same formats.

    Groups are ordered by their loss in the narrowest format, largest first. The paper then picks the widths
    by hand; here, of the plans that respect the order and fill the budget, the flattest is taken: least Σ
    n·(width − limit)², with n proportional to the group's number of weights. Where that fills the budget,
    the first groups get the width above the limit and the others the width below it; else, a few more widths
    are used.
    """

    def solve(self, problem: Problem, low: int, high: int) -> Plan | None:
        narrowest = {group: min(options, key=lambda fmt: fmt.bits) for group, options in problem.bits.items()}
        order = sorted(narrowest, key=lambda group: problem.losses[group][narrowest[group]], reverse=True)

        def unevenness(group: str, fmt: Format) -> float:
            return problem.bits[group][narrowest[group]] * (fmt.bits - problem.limit) ** 2

        return minimize(problem, low, high, unevenness, order)
