"""The contract of an allocation: which option (a format, or a format with a width of the inputs) each group of
linears gets, under a bound on what the options cost.

The cost is stored bits where the budget bounds effective bits or bytes; it may as well be BOPs or nanoseconds.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import ceil, floor, isfinite
from typing import ClassVar, Generic, Protocol, TypeVar

from methods.base import Registry

ROUNDOFF = 1e-12  # a limit computed as bits / weights, times weights, may fall short of the bits by this much


class Option(Hashable, Protocol):
    """What a group can be given; a `Format` is one."""

    @property
    def name(self) -> str: ...

    @property
    def bits(self) -> float:
        """Nominal width."""
        ...


Choice = TypeVar("Choice", bound=Option)


@dataclass(frozen=True)
class Problem(Generic[Choice]):
    """Choose one option for each group: least total loss at a total cost of no more than `limit` · `divisor`.

    Attributes:
        losses: group to option to loss. Any finite numbers: neither positive nor monotone in the width.
        costs: group to option to cost, in whole bits, bit operations or picoseconds; groups and options as in
            `losses`.
        divisor: costs in one unit of the limit: the number of weights where the limit is in bits a weight.
        limit: highest total cost, in `unit`.
        slack: how far below `limit` a plan may end where another could come closer.
        unit: of the limit, for messages.
        judge: the measured loss of a whole plan, for solvers that try plans out; the sum of losses by default.
        seed: of solvers that draw random numbers.

    Raises:
        ValueError: the limit is below what the cheapest options cost, or a loss is not finite.
    """

    losses: Mapping[str, Mapping[Choice, float]]
    costs: Mapping[str, Mapping[Choice, int]]
    divisor: int
    limit: float
    slack: float = 0.02
    unit: str = "effective bits"
    judge: Callable[[Mapping[str, Choice]], float] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for group, losses in self.losses.items():
            for option, loss in losses.items():
                if not isfinite(loss):
                    raise ValueError(f"the loss of {group} in {option.name} is {loss}; losses must be finite")
        least, most = self.range
        if self.window[1] < least:
            raise ValueError(
                f"a limit of {self.limit:g} {self.unit} is out of reach: these options take "
                f"{least / self.divisor:.4g} to {most / self.divisor:.4g}"
            )

    @cached_property
    def range(self) -> tuple[int, int]:
        """Cost with every group at its cheapest, and at its dearest."""
        return (
            sum(min(options.values()) for options in self.costs.values()),
            sum(max(options.values()) for options in self.costs.values()),
        )

    @cached_property
    def window(self) -> tuple[int, int]:
        """Lowest and highest cost of a plan that meets the limit.

        A limit beyond the dearest options is met by them alone.
        """
        low = ceil((self.limit - self.slack) * self.divisor)
        high = floor(self.limit * self.divisor * (1 + ROUNDOFF))
        return min(low, self.range[1]), high

    def cost(self, plan: Mapping[str, Choice]) -> int:
        """Cost of a plan."""
        return sum(self.costs[group][option] for group, option in plan.items())

    def loss(self, plan: Mapping[str, Choice]) -> float:
        """Total loss of a plan: the sum over its groups."""
        return sum(self.losses[group][option] for group, option in plan.items())

    def measured(self, plan: Mapping[str, Choice]) -> float:
        """What `judge` says of a plan.

        Raises:
            FloatingPointError: that is no number.
        """
        loss = self.loss(plan) if self.judge is None else self.judge(plan)
        if not isfinite(loss):
            raise FloatingPointError(f"the measured loss of a plan is {loss}; offer wider options or other text")
        return loss


@dataclass(frozen=True)
class Solver(ABC):
    """A way to choose. Fields are its options."""

    name: ClassVar[str]

    def __call__(self, problem: Problem[Choice]) -> dict[str, Choice]:
        """The plan inside the problem's window.

        Where groups are too large to hit the window, it is doubled until a plan is inside. (To take any plan
        below the limit would leave most of the budget unspent where losses do not fall with the width.)
        """
        low, high = problem.window
        plan = self.solve(problem, low, high)
        while plan is None and low > 0:
            low = max(0, high - 2 * max(high - low, 1))
            plan = self.solve(problem, low, high)
        if plan is None:
            raise ValueError(f"the {self.name} solver finds no plan within {problem.limit:g} {problem.unit}")
        check(problem, plan)
        return plan

    @abstractmethod
    def solve(self, problem: Problem[Choice], low: int, high: int) -> dict[str, Choice] | None:
        """The plan that costs between `low` and `high`, both included; None if there is none."""


SOLVERS: Registry[Solver] = Registry("solver", "methods.allocation")


def check(problem: Problem[Choice], plan: Mapping[str, Choice]) -> None:
    """ValueError, if a plan leaves out a group, uses an option not on offer, or costs more than the limit."""
    for group, options in problem.costs.items():
        if plan.get(group) not in options:
            raise ValueError(f"the plan gives {group} {plan.get(group)}, which is not one of its options")
    cost = problem.cost(plan)
    if cost > problem.window[1]:
        raise ValueError(f"the plan takes {cost / problem.divisor:.4f} {problem.unit}, more than {problem.limit:g}")
