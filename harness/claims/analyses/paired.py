"""Is one way of quantizing better than another, or as good? Paired on windows, over calibration texts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

from harness.claims.analysis import ANALYSES, SIDE, Analysis
from harness.claims.evidence import Evidence, Missing, Overrides, grid, seeded
from harness.claims.statistics import crossed_bootstrap
from harness.claims.verdicts import Case, Rule

UNIT = "Δ ln PPL"
FLOOR = 0.005
"""Half a per cent of perplexity: what is smaller has no practical meaning here."""


@ANALYSES.register("paired")
@dataclass(frozen=True, kw_only=True)
class Paired(Analysis):
    """The difference in mean negative log-likelihood, `first` minus `second`, at each point of `over`.

    By default the claim is that the first is better: it is supported where the interval lies below zero and the
    difference is half a per cent at least, refuted where the interval lies above minus half a per cent.

    Attributes:
        first, second: overrides, such as `method=awq method.clip=false`.
        over: a grid of overrides in Hydra's language; each of its points is a case.
        seeds: calibration texts.
    """

    first: str
    second: str
    over: str
    seeds: int = 3

    default: ClassVar[Rule] = Rule((-SIDE, 0.0), (-FLOOR, SIDE), FLOOR)

    def needs(self) -> Iterable[Overrides]:
        for _, first, second in self._pairs():
            yield from (*seeded(first, self.seeds), *seeded(second, self.seeds))

    def cases(self, evidence: Evidence) -> list[Case]:
        return [self._case(evidence, *pair) for pair in self._pairs()]

    def _pairs(self) -> Iterator[tuple[str, Overrides, Overrides]]:
        for point in grid(self.over):
            first, second = (tuple(grid(side)[0]) for side in (self.first, self.second))
            yield label(point), (*point, *first), (*point, *second)

    def _case(self, evidence: Evidence, name: str, first: Overrides, second: Overrides) -> Case:
        try:
            differences = evidence.nll(first, self.seeds) - evidence.nll(second, self.seeds)
        except Missing as reason:
            return Case(name, missing=str(reason))
        effect = crossed_bootstrap(differences)
        seeds, windows = differences.shape
        test = f"paired bootstrap, {seeds} calibration text{'s' if seeds > 1 else ''} × {windows} windows"
        p = effect.p if 0.0 in self.rule.supported else None  # a margin is decided by the interval alone
        return Case(name, effect.value, effect.low, effect.high, UNIT, p, test)


def label(point: Overrides) -> str:
    """A point of a grid as people read it: choices by value, options by their last name and value."""
    parts = [part.split("=", 1) for part in point]
    return ", ".join(f"{name.rsplit('.', 1)[1]} {value}" if "." in name else value for name, value in parts)
