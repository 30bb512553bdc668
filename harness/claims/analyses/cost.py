"""What does it cost, and how does that grow? Ratios and exponents of seconds and of memory."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pandas as pd
from scipy.stats import linregress, t

from harness.claims.analyses.paired import label
from harness.claims.analysis import ANALYSES, SIDE, Analysis
from harness.claims.evidence import Evidence, Missing, Overrides, grid, seeded
from harness.claims.statistics import Floats
from harness.claims.verdicts import Case, Rule

WHAT = {"seconds": "time", "extra_bytes": "memory beyond the model"}
LEAST = 3
"""Sizes that a line with an interval goes through."""


@dataclass(frozen=True, kw_only=True)
class Benchmark(Analysis):
    """What analyses of the cost benchmark share.

    Attributes:
        length: tokens a sequence.
        what: `seconds` or `extra_bytes`.
        table: of the benchmark, with a row a (row, length, size).
    """

    length: int = 512
    what: str = "seconds"
    table: str = "bench_hessian"

    def __post_init__(self) -> None:
        if self.what not in WHAT:
            raise ValueError(f"what={self.what} is not measured; take {' or '.join(WHAT)}")

    def measured(self, evidence: Evidence, row: str) -> pd.DataFrame:
        """What was measured of a row, by parameters of the model in ascending order.

        Raises:
            Missing: nothing was.
        """
        remedy = f"make {self.table.replace('_', '-')}"
        table = evidence.table(self.table, remedy)
        chosen = table[(table["row"] == row) & (table["length"] == self.length)]
        if chosen.empty:
            raise Missing(f"not run: {row} at {self.length} tokens; {remedy}")
        found = chosen[chosen[self.what].gt(0)].set_index("parameters").sort_index()
        if found.empty:
            raise Missing(f"{row} at {self.length} tokens exceeded the limit of time at every size")
        return found

    def cases(self, evidence: Evidence) -> list[Case]:
        try:
            return [self.compare(evidence)]
        except Missing as reason:
            return [Case(self.title, missing=str(reason))]

    @property
    @abstractmethod
    def title(self) -> str:
        """Of the case."""

    @abstractmethod
    def compare(self, evidence: Evidence) -> Case:
        """The case. May raise Missing."""


@ANALYSES.register("slope")
@dataclass(frozen=True, kw_only=True)
class Slope(Benchmark):
    """The exponent with which a cost, or the ratio of two, grows with the number of parameters: the slope of a
    log–log regression over model sizes, with the t interval of its standard error.

    By default the claim is that it grows: supported where the interval is above 0, refuted where below.

    Attributes:
        first: a row of the benchmark, such as `hutchinson`.
        second: another, to regress the ratio first / second over the sizes at which both were measured; or empty.
    """

    first: str
    second: str = ""

    default: ClassVar[Rule] = Rule((0.0, SIDE))

    @property
    def title(self) -> str:
        ratio = f" / {self.second}" if self.second else ""
        return f"{self.first}{ratio}, {self.length} tokens"

    def compare(self, evidence: Evidence) -> Case:
        costs = self.measured(evidence, self.first)[self.what]
        if self.second:
            costs = (costs / self.measured(evidence, self.second)[self.what]).dropna()
        if len(costs) < LEAST:
            raise Missing(f"{self.title}: {len(costs)} sizes were measured, and a slope needs {LEAST}")
        slope, low, high = exponent(costs.index.to_numpy(float), costs.to_numpy(float))
        test = f"log–log regression of {WHAT[self.what]}, {len(costs)} sizes up to {costs.index.max() / 1e6:.0f}M"
        return Case(self.title, slope, low, high, "exponent", test=test)


@ANALYSES.register("cost_ratio")
@dataclass(frozen=True, kw_only=True)
class CostRatio(Benchmark):
    """What `first` costs in multiples of `second`, at the largest size at which both were measured.

    The interval is from the least of the first over the most of the second to the reverse, among repeats; it is a
    point where a run was too long to repeat, and for memory.

    Attributes:
        first, second: rows of the benchmark.
    """

    first: str
    second: str

    default: ClassVar[Rule] = Rule((3.0, SIDE), (0.0, 1.0))

    @property
    def title(self) -> str:
        return f"{self.first} / {self.second}, {self.length} tokens"

    def compare(self, evidence: Evidence) -> Case:
        first, second = (self.measured(evidence, row) for row in (self.first, self.second))
        common = first.index.intersection(second.index)
        if common.empty:
            raise Missing(f"{self.title}: no size at which both were measured")
        mine, other = first.loc[common.max()], second.loc[common.max()]
        value = float(mine[self.what] / other[self.what])
        low, high, test = value, value, f"{WHAT[self.what]} at {common.max() / 1e6:.0f}M parameters"
        if self.what == "seconds":
            low = float(mine["seconds_low"] / other["seconds_high"])
            high = float(mine["seconds_high"] / other["seconds_low"])
            test += f", range of {mine['repeats']:.0f} and {other['repeats']:.0f} repeats"
        return Case(self.title, value, low, high, "×", test=test)


@ANALYSES.register("cell_cost")
@dataclass(frozen=True, kw_only=True)
class CellCost(Analysis):
    """Seconds that `first` takes to quantize, in multiples of `second`: the geometric mean over calibration texts, with
    the t interval of the logarithm. What a sweep recalled is charged as if it had been computed.

    Attributes:
        first, second: overrides.
        over: a grid of overrides; each of its points is a case.
        seeds: calibration texts, 2 at least.
    """

    first: str
    second: str
    over: str
    seeds: int = 3

    default: ClassVar[Rule] = Rule((1.0, SIDE))

    def __post_init__(self) -> None:
        if self.seeds < 2:
            raise ValueError(f"seeds={self.seeds} gives no interval; take 2 or more")

    def needs(self) -> Iterable[Overrides]:
        for point in grid(self.over):
            for side in (self.first, self.second):
                yield from seeded((*point, *grid(side)[0]), self.seeds)

    def cases(self, evidence: Evidence) -> list[Case]:
        return [self._case(evidence, point) for point in grid(self.over)]

    def _case(self, evidence: Evidence, point: Overrides) -> Case:
        try:
            first, second = (self._seconds(evidence, (*point, *grid(s)[0])) for s in (self.first, self.second))
        except Missing as reason:
            return Case(label(point), missing=str(reason))
        logs = np.log(first / second)
        half = t.ppf(0.975, self.seeds - 1) * logs.std(ddof=1) / np.sqrt(self.seeds)
        value, low, high = (float(np.exp(logs.mean() + step)) for step in (0, -half, half))
        return Case(label(point), value, low, high, "×", test=f"seconds to quantize, {self.seeds} calibration texts")

    def _seconds(self, evidence: Evidence, cell: Overrides) -> Floats:
        costs = [evidence.record(one).cost["seconds"] for one in seeded(cell, self.seeds)]
        return np.array([cost.get("statistics", 0.0) + cost["quantize"] for cost in costs])


def exponent(parameters: Floats, costs: Floats) -> tuple[float, float, float]:
    """The slope of log cost on log parameters, with its 95 % t interval."""
    line = linregress(np.log(parameters), np.log(costs))
    half = t.ppf(0.975, len(costs) - 2) * line.stderr
    return float(line.slope), float(line.slope - half), float(line.slope + half)
