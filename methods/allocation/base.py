"""The contract of an allocation: which format each group of linears gets, under a bound on what is stored."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import ceil, floor, isfinite
from typing import ClassVar, TypeAlias

from methods.base import Registry
from methods.formats.base import Format

Plan: TypeAlias = dict[str, Format]

ROUNDOFF = 1e-12  # a limit computed as bits / weights, times weights, may fall short of the bits by this much


@dataclass(frozen=True)
class Problem:
    """Choose one format for each group: least total loss at no more than `limit` stored bits a weight.

    Attributes:
        losses: group to format to loss. Any finite numbers: neither positive nor monotone in the width.
        bits: group to format to stored bits; the same groups and formats as in `losses`.
        weights: number of weights of all groups together.
        limit: most stored bits a weight.
        slack: how far below `limit` a plan may end where another could come closer, in bits a weight.

    Raises:
        ValueError: the limit is below what the narrowest formats store, or a loss is not finite.
    """

    losses: Mapping[str, Mapping[Format, float]]
    bits: Mapping[str, Mapping[Format, int]]
    weights: int
    limit: float
    slack: float = 0.02

    def __post_init__(self) -> None:
        for group, losses in self.losses.items():
            for fmt, loss in losses.items():
                if not isfinite(loss):
                    raise ValueError(f"the loss of {group} in {fmt.name} is {loss}; losses must be finite")
        least, most = self.range
        if self.window[1] < least:
            raise ValueError(
                f"a limit of {self.limit:g} effective bits is out of reach: these formats store "
                f"{least / self.weights:.4g} to {most / self.weights:.4g} bits a weight"
            )

    @cached_property
    def range(self) -> tuple[int, int]:
        """Stored bits with every group at its narrowest, and at its widest."""
        return (
            sum(min(options.values()) for options in self.bits.values()),
            sum(max(options.values()) for options in self.bits.values()),
        )

    @cached_property
    def window(self) -> tuple[int, int]:
        """Fewest and most stored bits of a plan that meets the limit.

        A limit beyond the widest formats is met by them alone.
        """
        low = ceil((self.limit - self.slack) * self.weights)
        high = floor(self.limit * self.weights * (1 + ROUNDOFF))
        return min(low, self.range[1]), high

    def size(self, plan: Mapping[str, Format]) -> int:
        """Stored bits of a plan."""
        return sum(self.bits[group][fmt] for group, fmt in plan.items())

    def loss(self, plan: Mapping[str, Format]) -> float:
        """Total loss of a plan."""
        return sum(self.losses[group][fmt] for group, fmt in plan.items())


@dataclass(frozen=True)
class Solver(ABC):
    """A way to choose. Fields are its options."""

    name: ClassVar[str]

    def __call__(self, problem: Problem) -> Plan:
        """The plan inside the problem's window; where groups are too large to hit it, the one below."""
        low, high = problem.window
        plan = self.solve(problem, low, high) or self.solve(problem, 0, high)
        if plan is None:
            raise ValueError(f"the {self.name} solver finds no plan within {problem.limit:g} effective bits")
        check(problem, plan)
        return plan

    @abstractmethod
    def solve(self, problem: Problem, low: int, high: int) -> Plan | None:
        """The plan that stores between `low` and `high` bits, both included; None if there is none."""


SOLVERS: Registry[Solver] = Registry("solver")


def check(problem: Problem, plan: Mapping[str, Format]) -> None:
    """ValueError, if a plan leaves out a group, uses a format not on offer, or stores more than the limit."""
    for group, options in problem.bits.items():
        if plan.get(group) not in options:
            raise ValueError(f"the plan gives {group} {plan.get(group)}, which is not one of its formats")
    size = problem.size(plan)
    if size > problem.window[1]:
        raise ValueError(f"the plan stores {size / problem.weights:.4f} bits a weight, more than {problem.limit:g}")
