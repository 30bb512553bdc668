"""Is it a fact? Arithmetic, equivalences, and published problems solved again; see `harness.claims.checks`."""

from __future__ import annotations

from dataclasses import dataclass, replace

from harness.claims.analysis import ANALYSES, Analysis
from harness.claims.checks import fallback, formats, hawq_v3, rounding  # noqa: F401 - they register checks
from harness.claims.checks.base import CHECKS
from harness.claims.evidence import Evidence, Missing
from harness.claims.verdicts import Case, Rule
from methods.base import hint


@ANALYSES.register("exact")
@dataclass(frozen=True, kw_only=True)
class Exact(Analysis):
    """What a check finds, judged by its own rule where the ledger gives none.

    Attributes:
        check: its name.
    """

    check: str

    def __post_init__(self) -> None:
        if self.check not in CHECKS:
            raise ValueError(f"unknown check {self.check!r}: {hint(self.check, CHECKS)}")

    @property
    def uses_study(self) -> bool:
        return CHECKS[self.check].uses_study

    @property
    def rule(self) -> Rule:
        if self.supported:
            return super().rule
        own = CHECKS[self.check].rule
        return own if self.floor is None else replace(own, floor=self.floor)

    def cases(self, evidence: Evidence) -> list[Case]:
        try:
            return CHECKS[self.check].run(evidence)
        except Missing as reason:
            return [Case(self.check, missing=str(reason))]
