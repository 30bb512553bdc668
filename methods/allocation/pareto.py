"""HAWQ-V2's Pareto frontier of size and loss (Dong et al., NeurIPS 2020, arXiv 1911.03852), exactly.

The paper enumerates configurations whose widths do not increase in the order of the traces. Here a dynamic
programme over groups visits all configurations: a partial plan is dropped only if another one of the same
groups is at least as small and loses no more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from methods.allocation.base import SOLVERS, Choice, Problem, Solver

Sizes: TypeAlias = NDArray[np.int64]
Losses: TypeAlias = NDArray[np.float64]
Prune: TypeAlias = Callable[[Sizes, Losses], NDArray[np.intp]]
"""Sizes and losses of partial plans, each [plans], to indices of those worth keeping."""
Step: TypeAlias = tuple[str, list[Any], NDArray[np.intp], NDArray[np.intp]]
"""A group, its formats, and of each partial plan kept: which one it extends, and by which format."""


@SOLVERS.register("pareto")
@dataclass(frozen=True)
class Pareto(Solver):
    """Least total loss.

    Args:
        resolution: partial plans kept a group. Equal layers have equal sizes, so models stay far below it
            and the result is exact. Beyond, sizes are divided into so many bins, and the partial plan that
            loses least stands for its bin; its size stays exact, so the limit still holds.
    """

    resolution: int = 100_000

    def solve(self, problem: Problem[Choice], low: int, high: int) -> dict[str, Choice] | None:
        plan = self._search(problem, 0, high, _nondominated)
        if plan is None or problem.cost(plan) >= low:
            return plan
        # Losses that do not fall with the width leave room: now larger plans that lose more count as well.
        return self._search(problem, low, high, _cheapest_of_each_size)

    def _search(self, problem: Problem[Choice], low: int, high: int, prune: Prune) -> dict[str, Choice] | None:
        least, most = problem.range  # what the groups still to come store at least and at most
        sizes, losses = np.zeros(1, dtype=np.int64), np.zeros(1)
        steps: list[Step] = []
        for group, options in problem.costs.items():
            least, most = least - min(options.values()), most - max(options.values())
            added = np.array([problem.losses[group][fmt] for fmt in options])
            sizes = np.add.outer(sizes, np.array(list(options.values()))).ravel()
            losses = np.add.outer(losses, added).ravel()
            kept = np.flatnonzero((sizes + least <= high) & (sizes + most >= low))
            kept = kept[prune(sizes[kept], losses[kept])]
            kept = kept[_thinned(sizes[kept], losses[kept], self.resolution)]
            sizes, losses = sizes[kept], losses[kept]
            steps.append((group, list(options), *np.divmod(kept, len(options))))
        if not len(losses):
            return None
        return _trace_back(steps, int(np.argmin(losses)))


def _cheapest_of_each_size(sizes: Sizes, losses: Losses) -> NDArray[np.intp]:
    order = np.lexsort((losses, sizes))
    return order[np.diff(sizes[order], prepend=-1) > 0]


def _nondominated(sizes: Sizes, losses: Losses) -> NDArray[np.intp]:
    order = _cheapest_of_each_size(sizes, losses)
    best_of_smaller = np.minimum.accumulate(np.concatenate([[np.inf], losses[order]]))[:-1]
    return order[losses[order] < best_of_smaller]


def _thinned(sizes: Sizes, losses: Losses, count: int) -> NDArray[np.intp]:
    if len(sizes) <= count:
        return np.arange(len(sizes))
    width = -(-(int(sizes.max()) - int(sizes.min()) + 1) // count)
    return _cheapest_of_each_size((sizes - sizes.min()) // width, losses)


def _trace_back(steps: list[Step], index: int) -> dict[str, Any]:
    plan = {}
    for group, formats, predecessors, choices in reversed(steps):
        plan[group] = formats[choices[index]]
        index = predecessors[index]
    return dict(reversed(plan.items()))
