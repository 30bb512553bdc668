"""ModelOpt's programme for its gradient scores (NVIDIA TensorRT Model Optimizer, `auto_quantize` with `gradient`)."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

from methods.allocation.base import SOLVERS, Choice, Problem, Solver
from methods.allocation.completion import by_cost
from methods.allocation.ilp import minimize


@SOLVERS.register("lp")
@dataclass(frozen=True)
class LinearProgramme(Solver):
    """Least total score with one option a group, where a dearer option never scores worse than a cheaper one.

    The published "LP" has binary variables: it is HAWQ-V3's integer programme with other scores, and solved here
    by the same code. What differs is the scores: before the search, each is lowered to the least score of the
    options that cost no more, so noise in the estimate cannot make a wide option look worse than a narrow one.

    The published code first sets no lower bound on the cost, and where its solver then reports a failure, tries
    again with 99% and 90% of the limit as the bound. HiGHS solves the programme as it stands, so there is nothing
    to retry. The bound here is the problem's window: a plan that is optimal without a bound and lies in the
    window is optimal with it.
    """

    def solve(self, problem: Problem[Choice], low: int, high: int) -> dict[str, Choice] | None:
        scores = {group: monotone(problem, group) for group in problem.losses}
        return minimize(problem, low, high, lambda group, option: scores[group][option])


def monotone(problem: Problem[Choice], group: str) -> dict[Choice, float]:
    """Option to the least loss among the options of the group that cost no more."""
    options = by_cost(problem, group)
    return dict(zip(options, accumulate((problem.losses[group][option] for option in options), min), strict=True))
