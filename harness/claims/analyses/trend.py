"""Does the loss rise along an order that was told in advance? Page's test over test windows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from scipy.stats import page_trend_test, rankdata

from harness.claims.analyses.paired import label
from harness.claims.analysis import ANALYSES, Analysis
from harness.claims.evidence import Evidence, Missing, Overrides, grid, seeded
from harness.claims.statistics import Floats, crossed_bootstrap
from harness.claims.verdicts import Case, Rule


@ANALYSES.register("trend")
@dataclass(frozen=True, kw_only=True)
class Trend(Analysis):
    """The mean over test windows of Spearman's ρ between an order and the loss, and Page's trend test (JASA 1963).

    Windows are the blocks: each has a loss under every alternative. Page's statistic is a linear function of the mean
    ρ, whose interval is a bootstrap over windows. 1 means that every window follows the order.

    Attributes:
        ordered: overrides of the alternatives, from the least loss expected to the largest.
        over: a grid of overrides; each of its points is a case.
        seeds: calibration texts, over which losses are averaged.
    """

    ordered: tuple[str, ...]
    over: str = ""
    seeds: int = 3

    default: ClassVar[Rule] = Rule((0.0, 1.0))

    def __post_init__(self) -> None:
        if len(self.ordered) < 3:
            raise ValueError(
                f"a trend needs three alternatives at least, not {len(self.ordered)}; compare two as paired"
            )

    def needs(self) -> Iterable[Overrides]:
        for point in grid(self.over):
            for cell in self._cells(point):
                yield from seeded(cell, self.seeds)

    def cases(self, evidence: Evidence) -> list[Case]:
        return [self._case(evidence, point) for point in grid(self.over)]

    def _cells(self, point: Overrides) -> list[Overrides]:
        return [(*point, *grid(side)[0]) for side in self.ordered]

    def _case(self, evidence: Evidence, point: Overrides) -> Case:
        try:
            losses = np.array([evidence.nll(cell, self.seeds).mean(0) for cell in self._cells(point)]).T
        except Missing as reason:
            return Case(label(point), missing=str(reason))
        effect = crossed_bootstrap(follows(losses)[None, :])
        test = f"Page's trend test, {losses.shape[1]} alternatives × {len(losses)} windows"
        return Case(label(point), effect.value, effect.low, effect.high, "mean Spearman ρ", two_sided(losses), test)


def follows(losses: Floats) -> Floats:
    """Spearman's ρ of each row [windows, alternatives] with the order of the columns: [windows]; 0 where constant."""
    ranks = rankdata(losses, axis=1)
    order = np.arange(losses.shape[1]) - (losses.shape[1] - 1) / 2
    centered = ranks - ranks.mean(1, keepdims=True)
    norms = np.linalg.norm(centered, axis=1) * np.linalg.norm(order)
    return np.divide(centered @ order, norms, out=np.zeros(len(losses)), where=norms > 0)


def two_sided(losses: Floats) -> float:
    """Twice the smaller p-value of Page's test for the order and for its reverse."""
    return min(1.0, 2 * min(float(page_trend_test(way).pvalue) for way in (losses, losses[:, ::-1])))
