"""ModelOpt's search for its KL scores (NVIDIA TensorRT Model Optimizer, `auto_quantize` with `kl_div`): the smallest
bound on a single group's loss that the budget allows."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

from methods.allocation.base import SOLVERS, Choice, Problem, Solver
from methods.allocation.completion import by_cost, completed


@SOLVERS.register("threshold")
@dataclass(frozen=True)
class Threshold(Solver):
    """Each group takes its cheapest option that loses at most t, for the smallest t whose plan fits.

    This minimizes the largest loss of a group, not the sum. The plan changes only where t passes a loss, so the
    losses themselves are bisected; the published code halves the interval between the smallest and the largest
    loss a hundred times, which ends at the same plan. A group all of whose options lose more than t takes the one
    that loses least; with the option "not quantized" among the published ones, at loss 0, this does not come up.

    Args:
        fill: spend what t leaves of the budget: the group that now loses most takes the next option that loses
            less, as long as one fits. Without it, as published, the plan may end well below the budget, and is
            not comparable with plans that spend theirs.
    """

    fill: bool = True

    def solve(self, problem: Problem[Choice], low: int, high: int) -> dict[str, Choice] | None:
        levels = sorted({loss for losses in problem.losses.values() for loss in losses.values()})
        # The cost falls as the level rises, down to that of the cheapest options, which fits.
        first = bisect_left(levels, True, key=lambda level: problem.cost(below(problem, level)) <= high)
        plan = below(problem, levels[first])
        if self.fill:
            return completed(problem, _filled(problem, plan, high), low, high)
        return plan if problem.cost(plan) >= low else None


def below(problem: Problem[Choice], level: float) -> dict[str, Choice]:
    """The cheapest plan in which each group loses no more than `level`, or as little as it can."""
    plan = {}
    for group, losses in problem.losses.items():
        bound = max(level, min(losses.values()))
        plan[group] = next(option for option in by_cost(problem, group) if losses[option] <= bound)
    return plan


def _filled(problem: Problem[Choice], plan: dict[str, Choice], high: int) -> dict[str, Choice]:
    plan, cost, open_groups = dict(plan), problem.cost(plan), list(plan)
    while open_groups:
        worst = max(open_groups, key=lambda group: problem.losses[group][plan[group]])
        costs, losses = problem.costs[worst], problem.losses[worst]
        room = high - cost + costs[plan[worst]]
        better = [o for o in by_cost(problem, worst) if losses[o] < losses[plan[worst]] and costs[o] <= room]
        if better:
            cost += costs[better[0]] - costs[plan[worst]]
            plan[worst] = better[0]
        else:
            open_groups.remove(worst)  # the room only shrinks: it will not fit later either
    return plan
