"""What solvers that walk from plan to plan share: where they start, how they raise a group, and how they end up
inside the window."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from methods.allocation.base import Choice, Problem
from methods.allocation.ilp import minimize

log = logging.getLogger(__name__)


def by_cost(problem: Problem[Choice], group: str) -> list[Choice]:
    """The options of a group from the cheapest to the dearest; of equally dear ones, the one that loses less first."""
    costs, losses = problem.costs[group], problem.losses[group]
    return sorted(costs, key=lambda option: (costs[option], losses[option]))


def cheapest(problem: Problem[Choice]) -> dict[str, Choice]:
    """Every group at its cheapest option."""
    return {group: by_cost(problem, group)[0] for group in problem.costs}


def dearest(problem: Problem[Choice]) -> dict[str, Choice]:
    """Every group at its dearest option; of equally dear ones, the one that loses least."""
    return {
        group: min(options, key=lambda option: (-options[option], problem.losses[group][option]))
        for group, options in problem.costs.items()
    }


def reverted(problem: Problem[Choice], plan: Mapping[str, Choice], group: str, high: int) -> dict[str, Choice] | None:
    """The plan with one group at the dearest option that leaves the cost at no more than `high`.

    The published searches go back to the original precision. Here that is the dearest option, or what the budget
    still allows of it. None if nothing dearer fits.
    """
    costs = problem.costs[group]
    most = costs[plan[group]] + high - problem.cost(plan)
    fitting = [option for option in by_cost(problem, group) if costs[plan[group]] < costs[option] <= most]
    if not fitting:
        return None
    top = costs[fitting[-1]]
    return {**plan, group: next(option for option in fitting if costs[option] == top)}


def reachable(problem: Problem[Choice], low: int, high: int) -> bool:
    """Whether any plan costs between `low` and `high`. To be asked before plans are measured, which takes long."""
    return minimize(problem, low, high, lambda *_: 0.0) is not None


def completed(problem: Problem[Choice], plan: dict[str, Choice], low: int, high: int) -> dict[str, Choice] | None:
    """The plan itself if it costs between `low` and `high`, else the nearest plan that does; None if there is none.

    Nearest means least Σ |cost of the group's new option − cost of its old one|. The losses have no say, so that a
    control stays a control and a heuristic is not repaired into an exact solver.
    """
    cost = problem.cost(plan)
    if low <= cost <= high:
        return plan
    nearest = minimize(
        problem, low, high, lambda group, option: abs(problem.costs[group][option] - problem.costs[group][plan[group]])
    )
    if nearest is not None:
        changed = sum(nearest[group] != option for group, option in plan.items())
        log.info("a plan of cost %d missed the window %d to %d: %d groups changed", cost, low, high, changed)
    return nearest
