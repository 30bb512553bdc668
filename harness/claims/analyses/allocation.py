"""Is a plan better than chance? Guided plans among random ones at the same budget, and on the way to the best."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from scipy.stats import binomtest

from harness.claims.analyses.paired import label
from harness.claims.analysis import ANALYSES, SIDE, Analysis
from harness.claims.evidence import Evidence, Missing, Overrides, grid, seeded
from harness.claims.statistics import CHUNK, RESAMPLES, Floats, from_resamples
from harness.claims.verdicts import Case, Rule

WIDEST = 10.0
"""Shares of a gap beyond ± this say only that the gap is nothing."""


@dataclass(frozen=True, kw_only=True)
class AmongRandom(Analysis):
    """What analyses of plans share: each point of `over` is a case, with its own random plans.

    All plans see the same calibration text, so that plans are what differs.

    Attributes:
        guided: overrides of the method under test.
        random: overrides of random plans, such as `method=mixed method.solver=random method.metric=output_mse`;
            plan i has `seed=i`.
        over: a grid of overrides, such as budgets.
        plans: random plans at each point.
    """

    guided: str
    random: str
    over: str
    plans: int = 20

    def __post_init__(self) -> None:
        if self.plans < 2:
            raise ValueError(f"plans={self.plans} shows no distribution; take 20 or more")

    def needs(self) -> Iterable[Overrides]:
        for point in grid(self.over):
            for cell in (self._cell(point, self.guided), *self._plans(point)):
                yield from seeded(cell, 1)

    def _cell(self, point: Overrides, side: str) -> Overrides:
        return (*point, *grid(side)[0])

    def _plans(self, point: Overrides) -> list[Overrides]:
        return [(*self._cell(point, self.random), f"seed={i}") for i in range(self.plans)]

    def losses(self, evidence: Evidence, point: Overrides) -> tuple[Floats, Floats]:
        """Loss of the guided plan [windows] and of the random ones [plans, windows]. May raise Missing."""
        guided = evidence.nll(self._cell(point, self.guided))[0]
        return guided, np.array([evidence.nll(plan)[0] for plan in self._plans(point)])


@ANALYSES.register("percentile")
@dataclass(frozen=True, kw_only=True)
class Percentile(AmongRandom):
    """The share of random plans that lose more than the guided one, with the exact interval of Clopper and Pearson
    (Biometrika 1934), and a binomial test against one half.

    By default the claim is that the plan is better than chance: it is supported where the guided plan beats at least
    95 % of the random ones, refuted where it beats no more than half.
    """

    default: ClassVar[Rule] = Rule((0.5, 1.0), (0.0, 0.5), 0.95)

    def cases(self, evidence: Evidence) -> list[Case]:
        return [self._case(evidence, point) for point in grid(self.over)]

    def _case(self, evidence: Evidence, point: Overrides) -> Case:
        try:
            guided, random = self.losses(evidence, point)
        except Missing as reason:
            return Case(label(point), missing=str(reason))
        found = binomtest(int((random.mean(1) > guided.mean()).sum()), self.plans)
        interval = found.proportion_ci(method="exact")
        test = f"Clopper–Pearson and binomial test, {self.plans} random plans"
        unit = "share of random plans beaten"
        return Case(
            label(point), float(found.statistic), float(interval.low), float(interval.high), unit, found.pvalue, test
        )


@ANALYSES.register("gap_closed")
@dataclass(frozen=True, kw_only=True)
class GapClosed(AmongRandom):
    """How much of the way from the median random plan to the oracle's the guided plan goes: 0 is chance, 1 the oracle.

    The bootstrap resamples test windows and random plans. Where the oracle gains nothing in a resample there is no way
    to go: the share then counts as far below zero.

    Attributes:
        oracle: overrides of the plan by the measured loss: `method=mixed method.metric=measured method.solver=ilp`.
    """

    oracle: str

    default: ClassVar[Rule] = Rule((0.0, SIDE))

    def needs(self) -> Iterable[Overrides]:
        yield from super().needs()
        for point in grid(self.over):
            yield from seeded(self._cell(point, self.oracle), 1)

    def cases(self, evidence: Evidence) -> list[Case]:
        return [self._case(evidence, point) for point in grid(self.over)]

    def _case(self, evidence: Evidence, point: Overrides) -> Case:
        try:
            guided, random = self.losses(evidence, point)
            oracle = evidence.nll(self._cell(point, self.oracle))[0]
        except Missing as reason:
            return Case(label(point), missing=str(reason))
        value = float(_share(guided.mean(), oracle.mean(), np.median(random.mean(1))))
        effect = from_resamples(value, resampled_shares(guided, oracle, random))
        test = f"bootstrap, {self.plans} random plans × {len(guided)} windows"
        return Case(label(point), effect.value, effect.low, effect.high, "share of the gap", effect.p, test)


def resampled_shares(guided: Floats, oracle: Floats, random: Floats, seed: int = 0) -> Floats:
    """Shares of the gap in resamples of windows and random plans: [resamples]."""
    plans, windows = random.shape
    generator = np.random.default_rng(seed)
    shares = np.empty(RESAMPLES)
    for start in range(0, RESAMPLES, CHUNK):
        weights = generator.multinomial(windows, np.full(windows, 1 / windows), size=CHUNK) / windows
        drawn = generator.integers(plans, size=(CHUNK, plans))
        middle = np.median(np.take_along_axis(weights @ random.T, drawn, axis=1), axis=1)
        shares[start : start + CHUNK] = _share(weights @ guided, weights @ oracle, middle)
    return shares


def _share(guided: Floats, oracle: Floats, middle: Floats) -> Floats:
    gap = np.asarray(middle - oracle)
    share = np.divide(middle - guided, gap, out=np.full_like(gap, -WIDEST), where=gap > 0)
    return np.clip(share, -WIDEST, WIDEST)
