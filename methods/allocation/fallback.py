"""The HAWQ-V2 strategy of Intel Neural Compressor (removed there in 2026): fall back in the order of the traces."""

from __future__ import annotations

from dataclasses import dataclass

from methods.allocation.base import SOLVERS, Choice, Problem, Solver
from methods.allocation.completion import cheapest, completed, reverted


@SOLVERS.register("inc")
@dataclass(frozen=True)
class Fallback(Solver):
    """From everything at its cheapest, one group after another goes to its dearest option, and stays there.

    The order is that of the losses at the cheapest options, largest first. The strategy orders by the trace alone,
    without the ‖ΔW‖² of HAWQ-V2; losses of the form trace · 4^−bits give that order where all groups have the
    same cheapest width. Nothing else of the losses is used.

    The strategy evaluates after every step and keeps the best. With a judge, so do the steps that end inside the
    window; without one, the last step is taken. Near the limit, a group takes the dearest option that still fits.

    Args:
        as_shipped: smallest first. The shipped code takes the direction of the sort from whether the metric is
            better when higher, so with a loss or a perplexity the least sensitive groups fall back first.
    """

    as_shipped: bool = False

    def solve(self, problem: Problem[Choice], low: int, high: int) -> dict[str, Choice] | None:
        plan = cheapest(problem)
        order = sorted(plan, key=lambda group: problem.losses[group][plan[group]], reverse=not self.as_shipped)
        visited = [plan]
        for group in order:
            step = reverted(problem, visited[-1], group, high)
            if step is not None:
                visited.append(step)
        inside = [plan for plan in visited if problem.cost(plan) >= low]
        if not inside:
            return completed(problem, visited[-1], low, high)
        return inside[-1] if problem.judge is None else min(inside, key=problem.judge)
