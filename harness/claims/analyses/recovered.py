"""How much of a loss does a remedy win back?"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from harness.claims.analyses.allocation import resampled_shares
from harness.claims.analyses.paired import label
from harness.claims.analysis import ANALYSES, SIDE, Analysis
from harness.claims.evidence import Evidence, Missing, Overrides, grid, seeded
from harness.claims.statistics import from_resamples
from harness.claims.verdicts import Case, Rule


@ANALYSES.register("recovered")
@dataclass(frozen=True, kw_only=True)
class Recovered(Analysis):
    """The share of the gap between `worst` and `best` that `first` wins back, on one calibration text.

    Attributes:
        first, worst, best: overrides: the remedy, what it mends, and what cannot be beaten.
        over: a grid of overrides; each of its points is a case.
    """

    first: str
    worst: str
    best: str
    over: str

    default: ClassVar[Rule] = Rule((0.0, SIDE))

    def needs(self) -> Iterable[Overrides]:
        for point in grid(self.over):
            for cell in self._cells(point):
                yield from seeded(cell, 1)

    def cases(self, evidence: Evidence) -> list[Case]:
        return [self._case(evidence, point) for point in grid(self.over)]

    def _cells(self, point: Overrides) -> list[Overrides]:
        return [(*point, *grid(side)[0]) for side in (self.first, self.worst, self.best)]

    def _case(self, evidence: Evidence, point: Overrides) -> Case:
        try:
            first, worst, best = (evidence.nll(cell)[0] for cell in self._cells(point))
        except Missing as reason:
            return Case(label(point), missing=str(reason))
        share = float((worst - first).mean() / (worst - best).mean())
        effect = from_resamples(share, resampled_shares(first, best, worst[None]))
        test = f"paired bootstrap, {len(first)} windows"
        return Case(label(point), effect.value, effect.low, effect.high, "share of the gap", effect.p, test)
