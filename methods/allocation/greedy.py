"""Allocation by a Lagrange multiplier (Everett, 1963; for bits, Shoham and Gersho, IEEE Trans. ASSP 36(9), 1988)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic

from methods.allocation.base import SOLVERS, Choice, Problem, Solver
from methods.allocation.completion import by_cost, cheapest, completed


@dataclass(frozen=True)
class Step(Generic[Choice]):
    """One group goes to a dearer option.

    Attributes:
        cost: how much dearer, at least 1.
        slope: change of the loss per unit of cost; negative where the dearer option loses less.
    """

    group: str
    option: Choice
    cost: int
    slope: float


@SOLVERS.register("greedy")
@dataclass(frozen=True)
class Greedy(Solver):
    """Each group takes argmin loss + λ·cost, with the one multiplier λ that spends the budget; the rest is filled.

    As λ falls, a group walks along the lower convex hull of its options, and takes a step of slope s (loss per
    cost) when λ passes −s. Sorting the steps of all groups by slope therefore visits every plan that some λ gives,
    which is what a bisection on λ homes in on. Where a step of slope ≥ 0 comes next, λ has reached 0, and further
    steps are taken only to reach `low`.

    A plan visited is optimal for its own cost (Everett). The last one that fits leaves less room than its next
    step costs; that room goes to single raises of a group, hull or not, the best loss per cost first, while they
    fit. With no `low` to reach, the result exceeds the optimum by no more than the first step that did not fit
    would have gained.
    """

    def solve(self, problem: Problem[Choice], low: int, high: int) -> dict[str, Choice] | None:
        plan = cheapest(problem)
        cost = problem.cost(plan)
        for step in hull_steps(problem):
            if cost + step.cost > high or (cost >= low and step.slope >= 0):
                break
            plan[step.group] = step.option
            cost += step.cost
        return completed(problem, _filled(problem, plan, low, high), low, high)


def hull_steps(problem: Problem[Choice]) -> list[Step[Choice]]:
    """All steps along the lower convex hulls of the groups' (cost, loss), from the cheapest options on, the steepest
    fall first. A group's own steps come in its order."""
    steps = [step for group in problem.costs for step in _hull(problem, group)]
    return sorted(steps, key=lambda step: step.slope)


def _hull(problem: Problem[Choice], group: str) -> list[Step[Choice]]:
    hull: list[Step[Choice]] = []
    before = [by_cost(problem, group)[0]]  # option before each step, and after the last
    for option in by_cost(problem, group)[1:]:
        while True:
            step = _step(problem, group, before[-1], option)
            if step is None or not hull or step.slope > hull[-1].slope:
                break
            hull.pop()  # the option in between lies on or above the chord
            before.pop()
        if step is not None:
            hull.append(step)
            before.append(option)
    return hull


def _step(problem: Problem[Choice], group: str, start: Choice, option: Choice) -> Step[Choice] | None:
    """From one option to another; None if that is not dearer."""
    cost = problem.costs[group][option] - problem.costs[group][start]
    if cost <= 0:
        return None
    gained = problem.losses[group][option] - problem.losses[group][start]
    return Step(group, option, cost, gained / cost)


def _filled(problem: Problem[Choice], plan: dict[str, Choice], low: int, high: int) -> dict[str, Choice]:
    cost = problem.cost(plan)
    while True:
        steps = (_step(problem, group, plan[group], option) for group in plan for option in problem.costs[group])
        fitting = [step for step in steps if step is not None and cost + step.cost <= high]
        best = min(fitting, key=lambda step: step.slope, default=None)
        if best is None or (cost >= low and best.slope >= 0):
            return plan
        plan = {**plan, best.group: best.option}
        cost += best.cost
