"""Allocations that know nothing of the losses: what a sensitivity has to beat."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd, inf

import numpy as np
from numpy.typing import NDArray

from methods.allocation.base import SOLVERS, Choice, Problem, Solver
from methods.allocation.completion import cheapest, completed

log = logging.getLogger(__name__)


@SOLVERS.register("uniform")
@dataclass(frozen=True)
class Uniform(Solver):
    """The same width everywhere; where the budget allows more, the first groups of the network get the next one.

    From the cheapest options, in rounds: each group, in the order of the network, goes to its next width if that
    fits. The round that ends inside the window is the last.
    """

    def solve(self, problem: Problem[Choice], low: int, high: int) -> dict[str, Choice] | None:
        ladders = {group: _by_width(problem, group) for group in problem.costs}
        plan = cheapest(problem)
        before = None
        while problem.cost(plan) < low and plan != before:
            before, plan = plan, _raised_once(problem, plan, ladders, high)
        return completed(problem, plan, low, high)


def _by_width(problem: Problem[Choice], group: str) -> list[Choice]:
    return sorted(problem.costs[group], key=lambda option: (option.bits, problem.costs[group][option]))


def _raised_once(
    problem: Problem[Choice], plan: dict[str, Choice], ladders: dict[str, list[Choice]], high: int
) -> dict[str, Choice]:
    plan, cost = dict(plan), problem.cost(plan)
    for group, options in ladders.items():
        costs, at = problem.costs[group], plan[group]
        dearer = [option for option in options[options.index(at) + 1 :] if costs[option] > costs[at]]
        if dearer and cost + costs[dearer[0]] - costs[at] <= high:
            cost += costs[dearer[0]] - costs[at]
            plan[group] = dearer[0]
    return plan


@SOLVERS.register("random")
@dataclass(frozen=True)
class Random(Solver):
    """A plan drawn from all plans inside the window, each with the same probability, by the problem's seed.

    Counting, for each group and each cost so far, the ways to end inside the window, gives the probability of
    each option of the next group. What the cheapest options leave of the budget is counted in at most `resolution`
    units. Where that rounds costs, the window is widened by what rounding can do, and draws whose true cost is
    outside are drawn again, which leaves the distribution exact. Should `draws` of them all miss (a window that
    hardly any plan meets), the plan of the window nearest to the last draw is taken.
    """

    resolution: int = 1 << 14
    draws: int = 1000

    def solve(self, problem: Problem[Choice], low: int, high: int) -> dict[str, Choice] | None:
        least, _ = problem.range
        options = {group: list(costs) for group, costs in problem.costs.items()}
        extra = [np.array(list(costs.values())) - min(costs.values()) for costs in problem.costs.values()]
        unit = _unit(extra, high - least, self.resolution)
        rounded = [(costs + unit // 2) // unit for costs in extra]
        error = sum(int(np.abs(costs - unit * units).max()) for costs, units in zip(extra, rounded, strict=True))
        ways = _ways(rounded, -((least + error - low) // unit), (high - least + error) // unit)
        if not ways[0].size or ways[0][0] == -inf:
            return None
        rng = np.random.default_rng(problem.seed)
        plan: dict[str, Choice] = {}
        for _ in range(self.draws):
            choices = _draw(rounded, ways, rng)
            plan = {group: options[group][choice] for group, choice in zip(options, choices, strict=True)}
            if low <= problem.cost(plan) <= high:
                return plan
        log.info("%d random plans missed the window %d to %d", self.draws, low, high)
        return completed(problem, plan, low, high)


def _unit(extra: Sequence[NDArray[np.int64]], room: int, resolution: int) -> int:
    """The largest unit that leaves whole numbers, or one that leaves no more than `resolution` of them."""
    return max(gcd(*(int(cost) for costs in extra for cost in costs)), -(-room // resolution), 1)


def _ways(extra: Sequence[NDArray[np.int64]], low: int, high: int) -> list[NDArray[np.float64]]:
    """For each group, and at last for none left: log of the number of ways to end at `low` to `high`, by the cost
    so far, 0 to `high`."""
    spent = np.arange(max(high + 1, 0))
    ways = [np.where(spent >= low, 0.0, -inf)]
    for costs in reversed(extra):
        after = np.full((len(costs), len(spent)), -inf)
        for row, cost in zip(after, costs, strict=True):
            row[: max(len(spent) - cost, 0)] = ways[-1][cost:]
        ways.append(np.logaddexp.reduce(after, axis=0))
    return ways[::-1]


def _draw(
    extra: Sequence[NDArray[np.int64]], ways: Sequence[NDArray[np.float64]], rng: np.random.Generator
) -> list[int]:
    """One option for each group, by the number of ways that it leaves."""
    spent, choices = 0, []
    for costs, after in zip(extra, ways[1:], strict=True):
        fitting = np.flatnonzero(spent + costs < len(after))
        weight = np.exp(after[spent + costs[fitting]] - after[spent + costs[fitting]].max())
        choice = int(rng.choice(fitting, p=weight / weight.sum()))
        choices.append(choice)
        spent += int(costs[choice])
    return choices
