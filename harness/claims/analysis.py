"""Analyses: the few ways in which the ledger tests claims. Each is a frozen dataclass whose fields are its options in
`conf/claims`; `@ANALYSES.register("name")` registers it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar

from harness.claims.evidence import Evidence, Overrides
from harness.claims.verdicts import Case, Region, Rule
from methods.base import Registry

SIDE = float("inf")


@dataclass(frozen=True, kw_only=True)
class Analysis(ABC):
    """One part of a claim: what it needs, and what that says.

    Attributes:
        says: the part of the claim that is tested, in a few words.
        scale: `cpu` for what the embedded model can decide, `gpu` for what needs larger models: the same cells with
            another model, left out until they are asked for.
        supported, refuted, floor: see `harness.claims.verdicts.Rule`; by default those of the analysis. Who names a
            region that supports, and none that refutes, means the opposite of the former.
        share: see `harness.claims.verdicts.of_part`.
    """

    says: str
    scale: str = "cpu"
    supported: tuple[float, ...] = ()
    refuted: tuple[float, ...] = ()
    floor: float | None = None
    share: float = 2 / 3

    name: ClassVar[str]
    """Set by the registry."""
    default: ClassVar[Rule] = Rule((-SIDE, 0.0), (0.0, SIDE))

    @property
    def uses_study(self) -> bool:
        """Whether it looks at `Evidence.study`."""
        return False

    def needs(self) -> Iterable[Overrides]:
        """The cells that `cases` looks at, as overrides of the base configuration."""
        return ()

    @abstractmethod
    def cases(self, evidence: Evidence) -> list[Case]:
        """What the evidence says. A case that lacks its records says so in `missing`."""

    @property
    def rule(self) -> Rule:
        """The rule of this part."""
        chosen = self.default
        if self.supported:
            chosen = Rule(_region(self.supported), _region(self.refuted) if self.refuted else None)
        floor = chosen.floor if self.floor is None else self.floor
        return replace(chosen, floor=floor)


def _region(ends: tuple[float, ...]) -> Region:
    if len(ends) != 2 or not ends[0] <= ends[1]:
        raise ValueError(f"a region has two ends in order, not {list(ends)}")
    return ends[0], ends[1]


ANALYSES: Registry[Analysis] = Registry("analysis", "harness.claims.analyses")
