"""What a check is: a function from the evidence to cases without randomness in their effects, and its default rule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from harness.claims.evidence import Evidence
from harness.claims.verdicts import Case, Rule

ALL_EQUAL = Rule((1.0 - 1e-12, 1.0))
"""For shares of what agrees, and for correlations of orders: all of it, or the claim that they agree is refuted."""


@dataclass(frozen=True)
class Check:
    """A check and the rule that judges its cases where the ledger does not give another."""

    run: Callable[[Evidence], list[Case]]
    rule: Rule
    uses_study: bool = False


Run = Callable[[Evidence], list[Case]]
CHECKS: dict[str, Check] = {}


def check(name: str, rule: Rule, uses_study: bool = False) -> Callable[[Run], Run]:
    """Register a check under the name by which the ledger asks for it."""

    def decorate(run: Run) -> Run:
        if name in CHECKS:
            raise ValueError(f"two checks are called {name!r}")
        CHECKS[name] = Check(run, rule, uses_study)
        return run

    return decorate


def fact(label: str, value: float, unit: str, test: str) -> Case:
    """A case whose interval is a point."""
    return Case(label, value, value, value, unit, test=test)
