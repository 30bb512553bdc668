"""Is one way of spending bits better over a whole curve of loss against stored bits? Than mixing two formats?"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from harness.claims.analyses.paired import FLOOR, UNIT, label
from harness.claims.analysis import ANALYSES, SIDE, Analysis
from harness.claims.evidence import Evidence, Missing, Overrides, grid, seeded
from harness.claims.statistics import Floats, crossed_bootstrap
from harness.claims.verdicts import Case, Rule


@dataclass(frozen=True, kw_only=True)
class Curve(Analysis):
    """What analyses of differences at matched bits share: lower loss supports, by half a per cent of perplexity.

    Attributes:
        over: a grid of overrides; each of its points is a case.
        seeds: calibration texts.
    """

    over: str = ""
    seeds: int = 3

    default: ClassVar[Rule] = Rule((-SIDE, 0.0), (-FLOOR, SIDE), FLOOR)

    def cases(self, evidence: Evidence) -> list[Case]:
        return [self._case(evidence, point) for point in grid(self.over)]

    def _case(self, evidence: Evidence, point: Overrides) -> Case:
        try:
            differences, how = self.differences(evidence, point)
        except Missing as reason:
            return Case(label(point), missing=str(reason))
        effect = crossed_bootstrap(differences)
        seeds, windows = differences.shape
        test = f"{how}; paired bootstrap, {seeds} calibration text{'s' if seeds > 1 else ''} × {windows} windows"
        return Case(label(point), effect.value, effect.low, effect.high, UNIT, effect.p, test)

    @abstractmethod
    def differences(self, evidence: Evidence, point: Overrides) -> tuple[Floats, str]:
        """Differences of the loss [seeds, windows], and at which bits, in words. May raise Missing."""


@ANALYSES.register("area")
@dataclass(frozen=True, kw_only=True)
class Area(Curve):
    """The mean vertical distance of two curves of loss against stored bits, `first` minus `second`.

    Each curve is a straight line between its budgets. The mean is over all bits that both curves reach, at the bits
    that were stored rather than those allowed.

    Attributes:
        first, second: overrides of both methods.
        budgets: a grid of overrides: the points of a curve.
    """

    first: str
    second: str
    budgets: str = "budget=b2.5,b3,b3.5,b4"

    def needs(self) -> Iterable[Overrides]:
        for point in grid(self.over):
            for side in (self.first, self.second):
                for one in self._curve(point, side):
                    yield from seeded(one, self.seeds)

    def _curve(self, point: Overrides, side: str) -> list[Overrides]:
        return [(*point, *budget, *grid(side)[0]) for budget in grid(self.budgets)]

    def differences(self, evidence: Evidence, point: Overrides) -> tuple[Floats, str]:
        sides = [self._curve(point, side) for side in (self.first, self.second)]
        bits = [np.array([evidence.bits(one, self.seeds) for one in side]) for side in sides]  # [budgets, seeds]
        losses = [np.array([evidence.nll(one, self.seeds) for one in side]) for side in sides]
        rows = []
        for seed in range(self.seeds):
            weights, low, high = area_weights(bits[0][:, seed], bits[1][:, seed])
            rows.append(weights[0] @ losses[0][:, seed] - weights[1] @ losses[1][:, seed])
        return np.array(rows), f"mean over {low:.2f} to {high:.2f} bits"


@ANALYSES.register("chord")
@dataclass(frozen=True, kw_only=True)
class Chord(Curve):
    """The loss of `first` minus that of the straight line between two others, at the bits that the first stores.

    For mixtures: is mixing two formats layer by layer better than its linear interpolation? And for a method whose
    storage no uniform format matches: is it better than a reference method at the same bits?

    Attributes:
        first: overrides of the method.
        low, high: overrides of what stores less and what stores more, on top of the point as the first is.
    """

    first: str
    low: str
    high: str

    def needs(self) -> Iterable[Overrides]:
        for point in grid(self.over):
            for side in (self.first, self.low, self.high):
                yield from seeded((*point, *grid(side)[0]), self.seeds)

    def differences(self, evidence: Evidence, point: Overrides) -> tuple[Floats, str]:
        cells = [(*point, *grid(side)[0]) for side in (self.first, self.low, self.high)]
        first, low, high = (evidence.nll(cell, self.seeds) for cell in cells)
        at, least, most = (evidence.bits(cell, self.seeds) for cell in cells)
        if not ((least <= at) & (at <= most) & (least < most)).all():
            raise Missing(
                f"{at.mean():.3f} bits are not between the {least.mean():.3f} and {most.mean():.3f} of both ends"
            )
        share = ((at - least) / (most - least))[:, None]
        return first - (1 - share) * low - share * high, f"at {at.mean():.3f} bits"


def area_weights(first: Floats, second: Floats) -> tuple[tuple[Floats, Floats], float, float]:
    """Weights of the points of two piecewise linear curves at these abscissae in their means over the common range,
    and that range.

    Raises:
        Missing: they have none.
    """
    low, high = max(first.min(), second.min()), min(first.max(), second.max())
    if not low < high:
        raise Missing(f"the curves reach no common range of stored bits: {_range(first)} and {_range(second)}")
    knots = np.unique(np.clip(np.concatenate([first, second]), low, high))
    return (_weights(first, knots), _weights(second, knots)), float(low), float(high)


def _weights(abscissae: Floats, knots: Floats) -> Floats:
    """The mean over the knots' range is linear in the ordinates: the integral of each ordinate's hat function."""
    order = np.argsort(abscissae, kind="stable")
    hats = [np.interp(knots, abscissae[order], unit[order]) for unit in np.eye(len(abscissae))]
    return np.array([np.trapezoid(hat, knots) for hat in hats]) / (knots[-1] - knots[0])


def _range(bits: Floats) -> str:
    return f"{bits.min():.3f} to {bits.max():.3f}"
