"""Do two scores give high widths to the same linears? The overlap of their choices at an equal budget."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from harness.claims import ranks
from harness.claims.analysis import ANALYSES, Analysis
from harness.claims.evidence import Evidence, Missing
from harness.claims.scores import scores
from harness.claims.statistics import CHUNK, RESAMPLES, Floats
from harness.claims.verdicts import Case, Rule

Chosen = NDArray[np.bool_]


@ANALYSES.register("jaccard")
@dataclass(frozen=True, kw_only=True)
class Jaccard(Analysis):
    """|A ∩ B| / |A ∪ B| of the sets of linears that get the wide format, and a bootstrap interval over linears.

    Under each score the linears go wide in the order of what a weight gains by it, as a Lagrange multiplier would have
    it, until a share of all weights is reached. Each share is a case.

    Attributes:
        first, second: metrics of the study that give losses in formats: `hawq_v2`, or `kfac Ω` for a score's Ω.
        narrow, wide: formats of the study.
        shares: of all weights that may go wide.
    """

    first: str
    second: str
    narrow: str = "int3-g128"
    wide: str = "int4-g128"
    shares: tuple[float, ...] = (0.25, 0.5, 0.75)

    default: ClassVar[Rule] = Rule((0.7, 1.0))

    @property
    def uses_study(self) -> bool:
        return True

    def cases(self, evidence: Evidence) -> list[Case]:
        return [self._case(evidence, share) for share in self.shares]

    def _case(self, evidence: Evidence, share: float) -> Case:
        label = f"{share:.0%} of weights in {self.wide}"
        try:
            gains, sizes = self._gains(evidence)
        except Missing as reason:
            return Case(label, missing=str(reason))
        value = float(overlap(*(wide_set(gain, sizes, share) for gain in gains)))
        drawn = np.concatenate(list(self._resampled(gains, sizes, share)))
        low, high = np.nanquantile(drawn, [0.025, 0.975])
        test = f"{len(sizes)} linears in {self.narrow} or {self.wide}, {RESAMPLES:,} resamples"
        return Case(label, value, float(low), float(high), "Jaccard index", test=test)

    def _gains(self, evidence: Evidence) -> tuple[Floats, Floats]:
        """What each weight gains by the wide format under both scores [2, linears], and the weights [linears]."""
        names = [self.first, self.second]
        narrow, wide = (scores(evidence, fmt, [*names, "weights"]) for fmt in (self.narrow, self.wide))
        sizes = narrow["weights"]
        gains: pd.DataFrame = (narrow[names] - wide[names]).div(sizes, axis=0)
        for name in names:
            if not gains[name].any():
                raise ValueError(f"{name} is a score that knows no format; compare losses such as '{name} Ω'")
        return gains[names].to_numpy(float).T, sizes.to_numpy(float)

    def _resampled(self, gains: Floats, sizes: Floats, share: float) -> Iterator[Floats]:
        rows = ranks.resampled(np.zeros(len(sizes), dtype=np.int64))
        for start in range(0, len(rows), CHUNK):
            part = rows[start : start + CHUNK]
            yield overlap(*(wide_set(gain[part], sizes[part], share) for gain in gains))


def wide_set(gain: Floats, sizes: Floats, share: float) -> Chosen:
    """Which linears go wide, the greatest gain first, until the next would exceed a share of all weights [..., n]."""
    order = np.argsort(-gain, axis=-1, kind="stable")
    spent = np.cumsum(np.take_along_axis(sizes, order, -1), axis=-1)
    fits = spent <= share * spent[..., -1:] * (1 + 1e-9)
    chosen = np.zeros(gain.shape, dtype=np.bool_)
    np.put_along_axis(chosen, order, fits, -1)
    return chosen


def overlap(first: Chosen, second: Chosen) -> Floats:
    """The Jaccard index of sets [..., n]: [...]; NaN where both are empty."""
    union = (first | second).sum(-1).astype(float)
    return np.divide((first & second).sum(-1), union, out=np.full_like(union, np.nan), where=union > 0)
