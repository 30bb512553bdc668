"""Accuracy-aware quantization (NNCF, `quantize_with_accuracy_control`; before it, OpenVINO's POT)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import inf

from methods.allocation.base import SOLVERS, Choice, Problem, Solver
from methods.allocation.completion import cheapest, completed, dearest, reachable, reverted


@SOLVERS.register("accuracy_aware")
@dataclass(frozen=True)
class AccuracyAware(Solver):
    """From everything at its cheapest, revert the group whose reversal alone gains most, and measure again.

    A step that makes the loss worse is undone, and the remaining groups, this one included, are ranked anew on
    the plan as it stands; the step after that is kept whatever it does, so the search goes on. The gain is not
    weighed against the cost. All plans are judged by `Problem.measured`; on what text, and on how much of it the
    ranking is done (`ranking_subset_size` in NNCF), is the judge's matter. A ranking takes as many measurements
    as there are groups.

    Reverting goes to the dearest option that the budget still allows. NNCF knows no budget: it stops at
    `max_drop`, `max_num_iterations`, or when everything is reverted. To compare on equal budgets, a plan that
    stops below the window is filled up in the order of the last ranking, unmeasured.

    Args:
        max_drop: measured loss, above that of the plan with everything at its dearest, at which to stop. NNCF's
            0.01 is in units of accuracy; here the default spends the budget.
        max_num_iterations: reversals tried at most; 0 is no bound.
    """

    max_drop: float = 0.0
    max_num_iterations: int = 0

    def solve(self, problem: Problem[Choice], low: int, high: int) -> dict[str, Choice] | None:
        if not reachable(problem, low, high):
            return None
        plan, ranked = self._search(problem, high)
        for group in ranked:
            if problem.cost(plan) >= low:
                break
            plan = reverted(problem, plan, group, high) or plan
        return completed(problem, plan, low, high)

    def _search(self, problem: Problem[Choice], high: int) -> tuple[dict[str, Choice], list[str]]:
        """The plan at the end of the search, and the groups not tried since the last ranking, best first."""
        plan = cheapest(problem)
        loss = problem.measured(plan)
        goal = problem.measured(dearest(problem)) + self.max_drop
        tries = self.max_num_iterations or inf
        stepped_back = False
        ranked = _ranked(problem, plan, loss, plan, high)
        while ranked and loss > goal and tries > 0:
            group = ranked.pop(0)
            trial = reverted(problem, plan, group, high)
            if trial is None:
                continue
            tries -= 1
            measured = problem.measured(trial)
            if measured > loss and not stepped_back:
                stepped_back = True
                ranked = _ranked(problem, plan, loss, [*ranked, group], high)
            else:
                plan, loss, stepped_back = trial, measured, False
        return plan, ranked


def _ranked(
    problem: Problem[Choice], plan: dict[str, Choice], loss: float, groups: Iterable[str], high: int
) -> list[str]:
    """The groups that can be reverted, those whose reversal alone lowers the loss most first."""
    trials = {group: reverted(problem, plan, group, high) for group in groups}
    gains = {group: loss - problem.measured(trial) for group, trial in trials.items() if trial is not None}
    return sorted(gains, key=lambda group: gains[group], reverse=True)
