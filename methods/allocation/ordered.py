"""HAWQ's precision order (Dong et al., ICCV 2019, arXiv 1905.03696): the more sensitive, the wider."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from methods.allocation.base import SOLVERS, Choice, Problem, Solver
from methods.allocation.ilp import minimize


@SOLVERS.register("ordered")
@dataclass(frozen=True)
class Ordered(Solver):
    """Widths that never increase from more to less sensitive groups. All groups must offer the same options.

    Groups are ordered by their loss in the narrowest option, largest first. The paper then picks the widths
    by hand; here, of the plans that respect the order and fill the budget, the flattest is taken: least Σ
    n·(width − level)², with `level` the uniform width that the limit allows, and n the group's cost in its
    narrowest option (the size of the group, in whatever unit). Where that fills the budget, the first groups
    get the width above the level and the others the width below it; else, a few more widths are used.

    HAWQ orders blocks of layers rather than layers: what a group is, the caller decides.
    """

    def solve(self, problem: Problem[Choice], low: int, high: int) -> dict[str, Choice] | None:
        narrowest = {group: min(options, key=lambda option: option.bits) for group, options in problem.costs.items()}
        order = sorted(narrowest, key=lambda group: problem.losses[group][narrowest[group]], reverse=True)
        flat = uniform_width(problem, high)

        def unevenness(group: str, option: Choice) -> float:
            return problem.costs[group][narrowest[group]] * (option.bits - flat) ** 2

        return minimize(problem, low, high, unevenness, order)


def uniform_width(problem: Problem[Choice], high: int) -> float:
    """The width at which all groups together would cost `high`, interpolated between the widths on offer.

    Within the range of these widths. Where costs do not rise with the width, the largest such width.
    """
    widths = sorted({option.bits for options in problem.costs.values() for option in options})
    totals = np.array([_cost_at(problem, width) for width in widths])
    fitting = np.flatnonzero(totals <= high)
    if not len(fitting):
        return widths[0]
    last = int(fitting[-1])
    if last == len(widths) - 1:
        return widths[-1]
    share = (high - totals[last]) / (totals[last + 1] - totals[last])
    return float(widths[last] + share * (widths[last + 1] - widths[last]))


def _cost_at(problem: Problem[Choice], width: float) -> float:
    """Cost of all groups at one width; a group that does not offer it counts between its neighboring widths."""
    total = 0.0
    for options in problem.costs.values():
        ascending = sorted(options, key=lambda option: (option.bits, -options[option]))
        cheapest = {option.bits: options[option] for option in ascending}  # the last, cheapest, of each width
        total += float(np.interp(width, list(cheapest), list(cheapest.values())))
    return total
